"""Shadows: encoders trained as the victim was, from other seeds, by which the owner knows what chance alone can do.

They see the victim's training images without those that suspects are scored on: otherwise dataset inference, which
asks whether an encoder was trained on these, would find the shadows too.
"""

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from data_aug.datasets import channel_statistics
from data_aug.images import Stored
from evaluation.candidates import Candidate
from files.reading import checked, number, switch
from loss import TRAIN_LOSSES
from models import ARCHITECTURES, build_encoder
from models.simclr import SimCLREncoder
from settings import Command, Parser
from simclr import SimCLR
from training.objective import Loss, LossChoice
from training.recipe import PRESETS, PresetChoice, Protocol, Recipe
from training.run import Run, plain
from utils import Precision, UserError, seeded
from victim import version_of

_WHOLE = number(whole=True, at_least=1)
# Settings of a victim's run that are no settings of its training.
_BUILT = {"seed": number(whole=True), "out_dim": _WHOLE, "n_views": _WHOLE, "normalize": switch()}


def train_shadows(
    victim: Candidate, images: Tensor, labels: Tensor, count: int, precision: Precision, parent: Path
) -> list[Path]:
    """Train `count` shadows on uint8 images (N, 3, H, W) with labels (N,); returns their checkpoints, below `parent`.

    A shadow of the same victim and images that is there already is not trained again, and one that was stopped goes
    on. A watermark is no part of the recipe. UserError for a victim whose file does not say how it was trained.
    """
    known = checked(victim.settings, _BUILT, f"{victim.path}: settings")
    command, paths = _command(victim), []
    digest = hashlib.sha256(version_of(victim.encoder).encode() + images.numpy().tobytes()).hexdigest()[:8]
    for seed in range(known.get("seed", 0) + 1, known.get("seed", 0) + 1 + count):
        loss, recipe = _recipe(command, seed)
        if len(images) < recipe.batch_size:
            raise UserError(
                f"{len(images)} images are left to train shadows on, fewer than the victim's batch of "
                f"{recipe.batch_size}: give a smaller --num-train, or --independent encoders"
            )
        settings = {**{name: plain(value) for name, value in vars(recipe).items()}, "victim": str(victim.path)}
        run = Run(parent / f"shadow-seed{seed}-{digest}", precision, {"kind": "shadow", "settings": settings}, True)
        print(f"shadow {len(paths) + 1} of {count}: seed {seed}, {len(images)} of the victim's images")
        run.record.images = len(images)
        model = _untrained(victim, images, labels, loss, known, seed)
        SimCLR(model, loss, recipe, run).train(Stored(images), labels, known.get("n_views", loss.min_views))
        paths.append(run.checkpoint)
    return paths


def _command(victim: Candidate) -> Command:
    """The victim's settings of training, as if a command line had them."""
    parser = Parser("Shadows.", (LossChoice, PresetChoice, Protocol, Recipe, *TRAIN_LOSSES.values()))
    if victim.settings.get("losstype") not in TRAIN_LOSSES or victim.encoder.arch not in ARCHITECTURES:
        raise UserError(
            f"{victim.path} does not say how it was trained, so no shadow can be trained likewise: train encoders by "
            f"run.py, and give them as --independent"
        )
    given = {}
    for name, declared in parser.settings.items():
        value = victim.settings.get(name)
        if value is None or not declared.named:
            continue
        try:
            given[name] = declared.parse(str(value))
            declared.check(given[name])
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{victim.path}: settings: {name}: {error}") from None
    return Command(parser, given)


def _recipe(command: Command, seed: int) -> tuple[Loss, Recipe]:
    """The loss with its views and hyper-parameters, and the recipe: run.py's rules for what the settings lack."""
    preset, loss = PRESETS[command.preset], TRAIN_LOSSES[command.losstype]
    views = command.use(PresetChoice, preset).views or loss.augment
    loss = command.use(replace(loss, augment=views), preset)
    return loss, command.use(Recipe, preset, loss.presets, seed=seed, recipe=command.recipe)


def _untrained(victim: Candidate, images: Tensor, labels: Tensor, loss: Loss, known: dict, seed: int) -> SimCLREncoder:
    """An encoder of the victim's architecture with a head as it had in its training."""
    supervised = loss.needs_labels and victim.settings["losstype"] == "supervised"
    head = ("linear", int(labels.max()) + 1) if supervised else ("mlp", known.get("out_dim", 128))
    with seeded(seed):
        normalize = channel_statistics(images) if known.get("normalize") else None
        return build_encoder(victim.encoder.arch, max(1, head[1]), normalize, head[0], victim.encoder.input_size)
