"""Which attackers does a detector tell from users? ROC of each statistic over streams of queries.

python detect.py -data ./datasets --dataset cifar10 --victim checkpoints/VICTIM/checkpoint.pth.tar
python detect.py -data ./datasets --dataset cifar10 --victim http://127.0.0.1:8000 --api-key-file key --streams 10

Every stream is an account of the detector (defenses/detection.py), which sees the representations of its queries, and
of PRADA (defenses/prada.py), which sees the images and what the owner's own classifier says of them. Some statistics
grow with a stream, so every attack spends as many queries as a user; sybils share them out among their accounts. Users
have a task: they query images of a few classes of the attackers' data set, or with --dataset-users images of another
data set. An AUC below 0.5 means that users look more like attackers than the attackers do. Streams of a kind share
images, so they are not independent. A victim behind an API is asked about every image and view once: the statistics
are then of its answers, an attacker's estimate of what its owner sees.
"""

import time
from collections.abc import Sequence

import jobs.early  # noqa: F401

from attacks import victims
from attacks.remote import Remote
from data_aug.datasets import load_labelled
from data_aug.sizes import Data
from defenses.detection import Detection
from evaluation.streams import Streams, load_others, part_images
from evaluation.user import keep_answers
from evaluation.watching import (
    Watched,
    open_watched,
    score_all,
    settings_row,
    stream_curves,
    stream_figures,
    stream_table,
    watcher_of,
)
from jobs.ending import script
from jobs.machine import Machine, Threads, set_up
from settings import Command, Parser
from training.run import open_run


def make_parser() -> Parser:
    return Parser(
        __doc__,
        (Data, Watched, Remote, Streams, Detection, Machine, Threads),
        kind="detect",
        core=("dataset", "streams", "stream_length", "seed"),
    )


def parse(line: Sequence[str] | None = None) -> Command:
    command = make_parser().parse(line)
    command.use_all(Data, Watched, Remote, Streams, Machine, Threads)
    command.use(Detection, secret=command.seed)
    command.refuse_idle()
    return command


@script
def main() -> None:
    started = time.perf_counter()
    command = parse()
    machine, precision = set_up(command)
    streams, detector, seed = command[Streams], command[Detection], machine.seed
    opened = open_watched(command)
    encoder, asked, trained = opened.encoder, opened.asked, opened.checkpoint.get("settings", {})
    run = open_run(command, opened.home, precision, weights=opened.version, victim=str(opened.source))
    shown = run.folder / "table.md"
    if run.done():
        print(shown.read_text(), end="")
        return
    images, labels = load_labelled(streams.dataset, command.data, "test", command.size)
    others = load_others(streams, command.data, command.size)
    *parts, parting = part_images(labels, streams.stream_length, streams.user_classes, seed)
    keep, known = keep_answers(run, asked), (images, labels, others)
    watcher = watcher_of(command, opened, keep, precision, known)
    scores = score_all(streams, detector, watcher, known, parts, seed)
    figures = stream_figures(scores, streams.prada_delta)
    table = stream_table(scores, figures)
    if keep is None:
        run.start()
    run.say(f"{len(images)} test images of {streams.dataset}, {precision}; {parting}")
    run.say(watcher.said)
    run.say(table)
    shown.write_text(table + "\n")
    row = {
        **{"model": "victim", "method": "detection", "losstype": trained.get("losstype")},
        **{"trained_on": trained.get("dataset"), **settings_row(streams, detector)},
        **{**figures, "roc": stream_curves(scores), "seed": seed, "checkpoint": str(opened.source)},
        **{"arch": encoder and encoder.arch, "images": len(images), "parting": parting},
        **({**asked.ledger.summary(), **asked.report({})} if asked else {}),
        **{"seconds": round(time.perf_counter() - started, 1), **run.config["provenance"]},
    }
    run.add_row(row)
    run.finish()
    if keep:
        keep.unlink()
    defence = () if asked else ("--defence", "detection")
    victims.say_steal(command, opened.source, encoder, trained.get("dataset", ""), *defence)


if __name__ == "__main__":
    main()
