"""Which attackers does a detector tell from users? ROC of each statistic over streams of queries.

python detect.py -data ./datasets --dataset cifar10 --victim checkpoints/VICTIM/checkpoint.pth.tar

Every stream is an account of the detector (defenses/detection.py), which sees the representations of its queries. All
streams have the same length, since some statistics grow with it. Users have a task: they query images of a few classes
of the attackers' data set, or with --dataset-users images of another data set. An AUC below 0.5 means that users look
more like attackers than the attackers do. Streams of a kind share images, so they are not independent.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jobs.early  # noqa: F401

from attacks import victims
from data_aug.datasets import Data, load_labelled
from defenses.detection import Detection
from evaluation.encoders import open_owner
from evaluation.streams import Streams, load_others, score_all, stream_figures, stream_table
from jobs.ending import script
from jobs.machine import Machine, Threads, set_up
from settings import Command, Parser, Settings, setting, settings_of
from training import finding


@dataclass(frozen=True)
class Owner(Settings):
    """The owner of the API."""

    victim: Path | None = setting(
        None, "the owner's checkpoint, run folder or run name", named=False, otherwise="the only victim"
    )
    title = "victim"


def make_parser() -> Parser:
    return Parser(
        __doc__,
        (Data, Owner, Streams, Detection, Machine, Threads),
        kind="detect",
        core=("dataset", "streams", "stream_length", "seed"),
    )


def parse(line: Sequence[str] | None = None) -> Command:
    command = make_parser().parse(line)
    command.use_all(Data, Owner, Streams, Machine, Threads)
    command.use(Detection, secret=command.seed)
    command.refuse_idle()
    return command


@script
def main() -> None:
    started = time.perf_counter()
    command = parse()
    machine, precision = set_up(command)
    streams, detector = command[Streams], command[Detection]
    path = finding.find(command, "victim", "victim", {})
    encoder, trained = open_owner(path)
    run = victims.open_evaluation(command, path, encoder, precision, victim=str(path))
    shown = run.folder / "table.md"
    if run.done():
        print(shown.read_text(), end="")
        return
    encoder = encoder.to(precision.device, memory_format=precision.memory_format)
    images, labels = load_labelled(streams.dataset, command.data, "test")
    asked = images, labels, load_others(streams, command.data)
    scores, parting = score_all(streams, detector, encoder, precision, asked, machine.seed)
    figures = stream_figures(scores)
    table = stream_table(scores, figures)
    run.start()
    run.say(f"{len(images)} test images of {streams.dataset}, {precision}; {parting}")
    run.say(table)
    shown.write_text(table + "\n")
    row = {
        **{"model": "victim", "method": "detection", "losstype": trained.get("losstype")},
        **{"trained_on": trained.get("dataset")},
        **{name: getattr(command, name) for name in (*settings_of(Streams), *settings_of(Detection))},
        **{**figures, "seed": machine.seed, "checkpoint": str(path)},
        **{"arch": encoder.arch, "images": len(images), "parting": parting},
        **{"seconds": round(time.perf_counter() - started, 1), **run.config["provenance"]},
    }
    run.add_row(row)
    run.finish()
    victims.say_steal(command, path, encoder, trained.get("dataset", ""), "--defence", "detection")


if __name__ == "__main__":
    main()
