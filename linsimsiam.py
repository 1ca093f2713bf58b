"""Evaluate an ImageNet-scale victim, or a copy made by stealsimsiam.py, by a linear layer on representations.

python linsimsiam.py --modeltype stolen --datasetsteal imagenet --num_queries 100000 --dataset cifar10 --lars --lr 1.0
torchrun --nproc-per-node 4 linsimsiam.py --pretrained models/checkpoint_0099-batch256.pth.tar --dataset imagenet --lars
"""

import time
from collections.abc import Sequence
from pathlib import Path

import jobs.early  # noqa: F401

from attacks import victims
from attacks.queries import QueryChoice
from data_aug.images import Loading, picture_name
from data_aug.sizes import Data
from evaluation.encoders import Sought
from evaluation.large_scale import LargeChoice, layer_scores, open_labelled, open_large, train_layer
from evaluation.rows import encoder_row
from evaluation.test_images import unqueried_positions
from files.writing import save_checkpoint
from jobs.ending import script
from jobs.machine import Machine, set_up
from jobs.place import Processes
from loss import STEAL_LOSSES
from settings import Command, Parser
from training import finding
from training.objective import LossChoice
from training.recipe import LargeScale, Recipe, use_large_recipe
from training.record import Record

SOUGHT = [Sought(owner, "stolen") for owner in (victims.CopyChoice, QueryChoice, LossChoice)]


def make_parser() -> Parser:
    return Parser(
        __doc__,
        (Data, LargeScale, LargeChoice, *SOUGHT, Recipe, Machine, Loading, Processes),
        kind="linear-simsiam",
        core=("dataset", "seed"),
        implied=(
            *("modeltype", "arch", "evaluate", "epochstrain"),
            *("datasetsteal", "losstype", "num_queries", "epochssteal"),
        ),
        choices={"losstype": STEAL_LOSSES},
        defaults={"size": 224},
        reads={"datasetsteal": picture_name},
        without=("query_order", "query_space", "force"),
    )


def parse(line: Sequence[str] | None = None) -> Command:
    command = make_parser().parse(line)
    command.use_all(Data, LargeChoice, Machine, Loading, Processes)
    use_large_recipe(command, batch_size=256)
    command.refuse_idle()
    return command


@script
def main() -> None:
    started = time.perf_counter()
    command = parse()
    machine, precision = set_up(command)
    path, checkpoint, encoder = open_large(command)
    run = victims.open_evaluation(command, path, encoder, precision)
    if command.resume is True and not command.evaluate and run.done():
        return
    encoder = encoder.to(precision.device, memory_format=precision.memory_format)
    train, test = (open_labelled(command.dataset, command.data, split) for split in ("train", "test"))
    record = Record.of(checkpoint)
    unqueried_positions(test, record, command.data)  # before anything is trained: are there any?

    probe = run.below("probe", "probe")
    print(f"{encoder.arch}, {len(train)} labelled images of {command.dataset}, {precision}")
    recipe = use_large_recipe(command, batch_size=256)
    layer = train_layer(command, encoder, train, max(train.classes, test.classes), recipe, probe)
    run.start()
    scores, counts = layer_scores(command, encoder, layer, test, record, precision)
    about = {"downstream": command.dataset, "probe": "augmented crops" if command.augment else "centres"}
    more = {
        **{"train_images": len(train), **counts, "seed": machine.seed},
        **{"seconds": round(time.perf_counter() - started, 1), **run.config["provenance"]},
    }
    row = encoder_row(command.modeltype, encoder, path, checkpoint, scores, about, more)
    state = {f"fc.{name}": value.cpu() for name, value in layer.state_dict().items()}
    # The checkpoint first: with its row there, the run counts as done.
    save_checkpoint({"kind": "linear-simsiam", "arch": encoder.arch, "state_dict": state, "row": row}, run.checkpoint)
    run.add_row(row, step=recipe.epochs)
    run.finish()
    if command.modeltype == "victim":
        finding.say_next(command, "stealsimsiam.py", "--pretrained", path, "--datasetsteal", "imagenet", "--lars")
    elif "victim" in checkpoint.get("settings", {}):
        victim = Path(str(checkpoint["settings"]["victim"]))
        finding.say_next(command, "linsimsiam.py", "--pretrained", victim, "--dataset", command.dataset, "--lars")


if __name__ == "__main__":
    main()
