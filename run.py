"""Train a victim by SimCLR or another loss.

python run.py -data ./datasets --dataset cifar10 --epochs 200 --arch resnet34
torchrun --nproc-per-node 4 run.py --dataset cifar10 --epochs 200 --arch resnet34
python run.py --dataset cifar10 --preset modern      # a recipe of today
python run.py --sslguard VICTIM          # puts SSLGuard's watermark into a trained victim
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jobs.early  # noqa: F401

from attacks import victims
from data_aug.datasets import DATASET_NAMES, SIZE, Data, channel_statistics, check_name, load_dataset, load_training
from data_aug.images import Stored
from defenses.sslguard import SSLGuard
from defenses.watermark import WatermarkMLP, watermark_line
from evaluation.marks import mark_victim, use_marking
from jobs.ending import script
from jobs.machine import Machine, Threads, set_up
from jobs.place import Processes
from loss import TRAIN_LOSSES
from models import USUAL, arch_name, build_encoder
from settings import Command, Parser, Settings, setting
from simclr import SimCLR
from training.objective import Loss, LossChoice
from training.recipe import PRESETS, PresetChoice, Protocol, Recipe
from training.run import open_run, relative
from utils import seeded


@dataclass(frozen=True)
class Train(Settings):
    """The victim's architecture and training data."""

    dataset: str = setting(
        "cifar10",
        f"data set that the victim is trained on: {DATASET_NAMES}",
        read=check_name,
        flags=("-dataset", "--dataset"),
        title="data",
    )
    num_train: int | None = setting(None, "train on a class-balanced subset of N images", at_least=1, title="data")
    normalize: bool = setting(False, "normalise images by the training set's channel statistics", title="data")
    arch: str = setting("resnet34", f"the victim's architecture: {USUAL}", read=arch_name, flags=("-a", "--arch"))
    out_dim: int = setting(
        128,
        "width of the projections; supervised has one for each class",
        at_least=1,
        flags=("--out_dim",),
        acts=lambda command: "with the loss supervised" if command.losstype == "supervised" else None,
        otherwise="128, of simsiam 2048, of byol 256",
    )
    watermark: bool = setting(False, "train a rotation watermark into the victim, for verify.py")
    n_views: int = setting(2, "random views per image", at_least=1, at_most=1000, otherwise="2, for supervised 1")
    title = "victim"


OWNERS = (Data, Train, LossChoice, PresetChoice, Recipe, *TRAIN_LOSSES.values(), SSLGuard, Machine, Threads, Protocol)


def make_parser() -> Parser:
    return Parser(
        __doc__,
        (*OWNERS, Processes),
        kind="victim",
        core=("dataset", "arch", "losstype", "epochs", "seed"),
        defaults={"epochs": 200, "size": SIZE},
        choices={"losstype": TRAIN_LOSSES},
    )


def parse(line: Sequence[str] | None = None) -> Command:
    command = make_parser().parse(line)
    command.use_all(Data, Machine, Threads, Protocol, Processes)
    if command.victim:
        return use_marking(command)
    preset, loss = PRESETS[command.preset], TRAIN_LOSSES[command.use(LossChoice).losstype]
    views = command.use(PresetChoice, preset).views or loss.augment
    loss = command.use(replace(loss, augment=views), preset)
    command.use(Train, loss.presets, {"n_views": loss.min_views})
    command.use(Recipe, preset, loss.presets, seed=command.seed, recipe=command.recipe)
    newer = loss.companion and f"with the loss {command.losstype}, which is not of 2022 and has a companion of its own"
    command.refuse_idle(recipe=newer, watermark=newer)
    return command


@script
def main() -> None:
    command = parse()
    machine, precision = set_up(command)
    if command.victim:
        mark_victim(command, precision)
        return
    train, loss = command[Train], command[Loss]
    run = open_run(command, machine.checkpoint_dir, precision)
    wide = command.recipe == "released" and loss.augment == "simclr" and not train.watermark
    options = {"number": train.num_train, "seed": machine.seed, "size": command.size, "wide": wide}
    images, labels, split = load_training(train.dataset, command.data, loss.needs_labels, **options)
    width = int(labels.max()) + 1 if loss.head == "linear" else train.out_dim
    with seeded(machine.seed):
        normalize = channel_statistics(images) if train.normalize else None
        model = build_encoder(train.arch, max(1, width), normalize, loss.head, command.size)
        companion = loss.make_companion(model, len(images), command.batch_size)
        companion = WatermarkMLP(model.dim) if train.watermark else companion
    run.record.images = len(images)
    print(f"victim: {train.arch} on {len(images)} images of {train.dataset} ({split}), {precision}")
    print(command.line())
    SimCLR(model, loss, command[Recipe], run, companion).train(Stored(images, command.size), labels, train.n_views)
    if train.watermark:
        test, _ = load_dataset(train.dataset, command.data, "test", command.size)
        print(watermark_line(model, companion.eval(), test, precision, machine.seed))
    print(f"victim: {relative(run.checkpoint)}")
    victims.say_steal(command, run.folder, model, train.dataset)


if __name__ == "__main__":
    main()
