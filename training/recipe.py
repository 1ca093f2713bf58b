"""Settings of optimisation, and the schedule of the learning rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_aug.recipes import VIEW_RECIPES
from settings import Command, Settings, setting
from utils import UserError


@dataclass(frozen=True)
class Protocol(Settings):
    """The standard or the released schedule and protocol, for scripts that have both."""

    recipe: str = setting(
        "standard",
        "released: the schedule, repeated queries and evaluation protocol of the 2022 code",
        choices=("standard", "released"),
    )
    title = "run"


# Values of run.py's settings where the command line has none; those of the loss come after these. A setting that the
# loss does not have, such as a temperature, is left out. docs/protocol.md has the measurements behind `modern`.
PRESETS: dict[str, Mapping[str, Any]] = {
    # Dziedzic et al., ICML 2022: the values of each loss; of a newer loss, its authors'.
    "2022": {},
    # The views are those of Chen et al. 2020 on CIFAR-10; temperature, rate and batch size are by a small sweep.
    "modern": {
        "batch_size": 256,
        "temperature": 0.2,
        "views": "simclr-cifar",
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "flat_epochs": 0,
    },
}


def _without_preset(command: Command) -> str | None:
    if command.recipe == "released":
        return "with --recipe released, which is of 2022"
    return "with the loss supervised, which has its own" if command.losstype == "supervised" else None


@dataclass(frozen=True)
class PresetChoice(Settings):
    """How a victim is trained where the command line does not say so, and on which views."""

    preset: str = setting(
        "2022",
        "recipe of a victim: its settings are the defaults; modern: one of today, see docs/protocol.md",
        choices=PRESETS,
        acts=_without_preset,
    )
    # None, so that earlier runs, which have no such setting, have its default.
    views: str | None = setting(
        None,
        "recipe of the random views that the victim is trained on",
        choices=VIEW_RECIPES,
        otherwise="the preset's, else simclr, for supervised crop-flip",
    )
    title = "training"


@dataclass(frozen=True)
class Recipe(Settings):
    """How a model is trained. The defaults of a run are those of its attack, then of its loss.

    seed: seeds every random draw. recipe: see `Protocol`; `released` changes the schedule, see `learning_rate`.
    """

    epochs: int = setting(100, "epochs; 0 saves the untrained model, a control", at_least=0)
    batch_size: int = setting(256, "images per batch", at_least=1, flags=("-b", "--batch-size"), otherwise="the loss's")
    lr: float = setting(1e-3, "learning rate", above=0, flags=("--learning-rate", "--lr"), otherwise="the loss's")
    weight_decay: float = setting(
        1e-4, "weight decay", at_least=0, flags=("--weight-decay", "--wd"), otherwise="the loss's"
    )
    optimizer: str = setting("adam", "optimizer", choices=("adam", "sgd", "lars"), otherwise="the loss's")
    momentum: float = setting(
        0.9,
        "momentum of sgd and lars",
        at_least=0,
        below=1,
        acts=lambda command: "with --optimizer adam" if command.optimizer == "adam" else None,
        otherwise="the loss's",
    )
    schedule: str = setting(
        "cosine",
        "learning rate over the epochs",
        choices=("cosine", "constant"),
        otherwise="the attack's, else cosine",
    )
    flat_epochs: int = setting(
        10,
        "epochs before the learning rate begins to fall by a cosine",
        at_least=0,
        acts=lambda command: "with --schedule constant" if command.schedule == "constant" else None,
    )
    warmup_epochs: float = setting(
        0.0, "epochs in which the learning rate rises linearly from 0, before it falls", at_least=0
    )
    compile: str = setting(
        "auto",
        "compile the network (torch.compile); auto: in long runs on a CPU with bf16",
        choices=("auto", "on", "off"),
        named=False,
    )
    log_every_n_steps: int = setting(200, "steps between tensorboard's points of the loss", at_least=1, named=False)
    print_freq: int | None = setting(
        None, "steps between printed lines (default: none)", at_least=1, flags=("-p", "--print-freq"), named=False
    )
    logdir: Path | None = setting(
        None, "root of tensorboard events, with a folder per run (default: the run's folder)", named=False
    )
    seed: int = 0
    recipe: str = "standard"
    title = "training"


@dataclass(frozen=True)
class LargeScale(Settings):
    """SGD at ImageNet scale: learning rate per 256 images, cosine from the first epoch, optional LARS."""

    lars: bool = setting(False, "the same as --optimizer lars")
    start_epoch: int = setting(0, "epoch to begin with", at_least=0)
    evaluate: bool = setting(False, "evaluate the layer trained before", flags=("-e", "--evaluate"), named=False)
    title = "training"


def use_large_recipe(command: Command, batch_size: int) -> Recipe:
    """Put the recipe of ImageNet scale into force; its learning rate is --lr * --batch-size / 256."""
    large = command.use(LargeScale)
    presets = {
        **{"batch_size": batch_size, "lr": 0.1, "weight_decay": 0.0, "flat_epochs": 0, "print_freq": 10},
        "optimizer": "lars" if large.lars else "sgd",
    }
    recipe = command.use(Recipe, presets, seed=command.seed)
    if large.start_epoch >= recipe.epochs and not large.evaluate:
        raise UserError(f"--start-epoch {large.start_epoch} is beyond the end of --epochs {recipe.epochs}")
    return replace(recipe, lr=recipe.lr * recipe.batch_size / 256)


def learning_rate(recipe: Recipe, epoch: int, steps_per_epoch: int) -> float:
    """The learning rate of an epoch, counted from 0: constant, or the base rate through `flat_epochs`, then a cosine.

    The cosine's half period is the number of epochs that are left. The released recipe takes `steps_per_epoch` instead,
    as the 2022 code did, where these are the batches of all images that can be queried, whatever the budget: its rate
    may come back up, or hardly fall. Through `warmup_epochs`, which may end inside an epoch, the rate is multiplied by
    the epoch's mean of a line from 0 to 1; the cosine begins after that.
    """
    begin = max(recipe.flat_epochs, recipe.warmup_epochs)
    period = steps_per_epoch if recipe.recipe == "released" else max(1, recipe.epochs - begin)
    rate = recipe.lr * _warmth(recipe.warmup_epochs, epoch)
    if recipe.schedule == "constant":
        return rate
    since = max(0, epoch - begin)
    return rate * 0.5 * (1 + math.cos(math.pi * since / period))


def _warmth(warmup: float, epoch: int) -> float:
    """The mean over an epoch of a line from 0 to 1 over the first `warmup` epochs, and of 1 after these."""
    rising = min(1.0, max(0.0, warmup - epoch))  # the part of the epoch in which the line rises
    return 1 - rising * (warmup - epoch - rising / 2) / warmup if rising else 1.0
