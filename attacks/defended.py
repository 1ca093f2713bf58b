"""The black box that a command line asks for: its defences, what they learn of the owner's images, what they can do."""

from pathlib import Path

import torch
from torch import Tensor

from attacks.victims import Opened
from data_aug.datasets import SIZE, load_training
from defenses import Defence
from loss import TRAIN_LOSSES
from models import SimCLREncoder, read_checkpoint
from settings import Command
from utils import Precision, UserError, generator
from victim import AnyVictim, Api, Victim


def black_box(
    command: Command,
    opened: Opened,
    precision: Precision,
    budget: int | None,
    queries: int | None = None,
    output: str = "representations",
) -> AnyVictim:
    """The victim opened, to be asked: as `defend` has it, or where it is behind its owner's defences already.

    output: what its API returns, as `Api` has it.
    """
    if opened.asked:
        opened.asked.budget = budget or queries
        return opened.asked
    api = Api(opened.encoder.to(precision.device), output)
    return defend(command, opened.source, api, precision, budget, queries)


def defend(
    command: Command,
    path: Path,
    encoder: SimCLREncoder | Api,
    precision: Precision,
    budget: int | None,
    queries: int | None = None,
) -> Victim:
    """The victim of this file behind the defences in force, which are shown the owner's images where they want any.

    Prints what they can do to an account that asks so many `queries`, or else the budget, where there is one. UserError
    where the owner's images are not at hand.
    """
    victim = Victim(encoder, budget, command.all(Defence), precision)
    learns = max(victim.defences, key=lambda defence: defence.owner_images, default=None)
    if learns and learns.owner_images:
        victim.prepare(owner_images(path, command.data, learns.owner_images, learns.secret, command.size))
    asked = queries or budget
    for words in (defence.outlook(asked) for defence in victim.defences if asked):
        if words:
            print(words)
    return victim


def owner_images(path: Path, root: Path, count: int, seed: int, size: int = SIZE) -> Tensor:
    """At most `count` of the images that a victim was trained on, drawn by the seed: uint8 (M, 3, size, size).

    UserError where its checkpoint does not name them, or they are not here.
    """
    settings = read_checkpoint(path).get("settings", {})
    loss = TRAIN_LOSSES.get(settings.get("losstype"))
    try:
        if "dataset" not in settings:
            raise UserError(f"{path} does not name its data set")
        number, drawn = settings.get("num_train"), settings.get("seed", 0)
        labelled = bool(loss and loss.needs_labels)
        images, _, _ = load_training(settings["dataset"], root, labelled, number, drawn, size)
    except UserError as error:
        remedy = "give --bucket-cells hyperplanes"  # of all defences only buckets learn
        raise UserError(f"the owner's images, from which a defence learns, are not here ({error}): {remedy}") from None
    return images[torch.randperm(len(images), generator=generator(seed, "owner's images"))[:count]]
