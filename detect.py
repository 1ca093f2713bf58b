"""Which attackers does a detector tell from users? ROC of each statistic over streams of queries.

python detect.py -data ./datasets --dataset cifar10 --victim checkpoints/VICTIM/checkpoint.pth.tar

Every stream is an account of the detector (defenses/detection.py), which sees the representations of its queries, and
of PRADA (defenses/prada.py), which sees the images and what the owner's own classifier says of them. Some statistics
grow with a stream, so every attack spends as many queries as a user; sybils share them out among their accounts. Users
have a task: they query images of a few classes of the attackers' data set, or with --dataset-users images of another
data set. An AUC below 0.5 means that users look more like attackers than the attackers do. Streams of a kind share
images, so they are not independent.
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
from evaluation.streams import Streams, load_others, part_images
from evaluation.watching import owner_classifier, score_all, stream_curves, stream_figures, stream_table
from jobs.ending import script
from jobs.machine import Machine, Threads, set_up
from settings import Command, Parser, Settings, setting, settings_of
from training import finding
from utils import UserError


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
    encoder, trained = open_owner(command, path)
    run = victims.open_evaluation(command, path, encoder, precision, victim=str(path))
    shown = run.folder / "table.md"
    if run.done():
        print(shown.read_text(), end="")
        return
    encoder = encoder.to(precision.device, memory_format=precision.memory_format)
    images, labels = load_labelled(streams.dataset, command.data, "test", command.size)
    asked = images, labels, load_others(streams, command.data, command.size)
    *parts, parting = part_images(labels, streams.stream_length, streams.user_classes, machine.seed)
    owner = trained.get("dataset")
    try:
        if not owner:
            raise UserError(f"{path} does not say what it was trained on")
        owned = load_labelled(owner, command.data, "train", command.size)
        classify, said = owner_classifier(streams, owner, owned, encoder, precision, machine.seed)
    except UserError as error:
        classify, said = None, f"without PRADA, which needs labelled images of the owner's: {error}"
    scores = score_all(streams, detector, encoder, precision, asked, parts, machine.seed, classify)
    figures = stream_figures(scores, streams.prada_delta)
    table = stream_table(scores, figures)
    run.start()
    run.say(f"{len(images)} test images of {streams.dataset}, {precision}; {parting}")
    run.say(said)
    run.say(table)
    shown.write_text(table + "\n")
    row = {
        **{"model": "victim", "method": "detection", "losstype": trained.get("losstype")},
        **{"trained_on": trained.get("dataset")},
        **{name: getattr(command, name) for name in (*settings_of(Streams), *settings_of(Detection))},
        **{**figures, "roc": stream_curves(scores), "seed": machine.seed, "checkpoint": str(path)},
        **{"arch": encoder.arch, "images": len(images), "parting": parting},
        **{"seconds": round(time.perf_counter() - started, 1), **run.config["provenance"]},
    }
    run.add_row(row)
    run.finish()
    victims.say_steal(command, path, encoder, trained.get("dataset", ""), "--defence", "detection")


if __name__ == "__main__":
    main()
