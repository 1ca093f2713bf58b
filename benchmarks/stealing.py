"""The row of an attack: squared error on 9,000 answers for 100 epochs, as of 2022 and as here."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import ToTensor

from attacks import Attack
from benchmarks import peers
from benchmarks.row import Ratio, make_row
from benchmarks.steps import COMPILED, OURS, pictures, quietly, seconds_of_steps
from benchmarks.timing import Contest, Effort, Missing, seconds_of
from data_aug.images import Stored
from loss import STEAL_LOSSES
from models import SimCLREncoder, build_encoder
from simclr import SimCLR
from training.recipe import Recipe
from training.run import Run
from utils import Precision
from victim import Victim

QUERIES, EPOCHS, BATCH = 9000, 100, 64


def classic_stealing(
    victim: SimCLREncoder, arch: str, images: Tensor, batch_size: int, device: torch.device
) -> Callable[[], None]:
    """A function that steals for another epoch as in 2022: the victim, in eval mode, is asked anew about every batch.

    Images through a DataLoader with 2 workers, float32, NCHW, Adam.
    """
    victim, copy = victim.to(device).eval(), build_encoder(arch).to(device).train()
    optimizer = torch.optim.Adam(copy.parameters(), lr=1e-3, weight_decay=1e-4)
    batches = peers.loader(peers.Pictures(images, ToTensor()), batch_size, 2, device)

    def epoch() -> None:
        for shown in batches:
            shown = shown.to(device, non_blocking=True)
            with torch.no_grad():
                answers = victim(shown)
            loss = F.mse_loss(copy(shown), answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def our_stealing(
    precision: Precision, victim: SimCLREncoder, images: Tensor, recipe: Recipe, folder: Path
) -> Callable[[], float]:
    """A function that makes a copy by a recipe, and returns the seconds of the whole attack, scaled from that.

    The queries are made once. An epoch's steps grow with the queries; its checkpoint does not.
    """
    trainer = SimCLR(build_encoder(victim.arch), STEAL_LOSSES["mse"], recipe, Run(folder, precision))
    box, times = Victim(victim, precision=precision), QUERIES / len(images)

    def attack() -> float:
        asking = seconds_of(lambda: [box.query(part) for part in images.split(1000)])
        whole = seconds_of(quietly(lambda: trainer.steal(Stored(images), box, Attack())))
        steps = seconds_of_steps(trainer.run)
        others = max(0.0, whole - steps - asking)  # mostly checkpoints, one in each epoch
        return times * asking + EPOCHS / recipe.epochs * (times * steps + others)

    return attack


def stealing(effort: Effort, arch: str) -> dict[str, Any]:
    """The row: seconds of the whole attack, scaled from fewer queries and epochs."""
    count, batch, epochs = effort.size(256, QUERIES, 8), effort.size(BATCH, BATCH, 4), effort.size(2, 5, 1)
    victim, images, contest = build_encoder(arch), pictures(count), Contest(effort)
    whole = count // batch * batch  # images in an epoch of 2022
    with tempfile.TemporaryDirectory() as folder:

        def ours(how: str) -> Callable[[], float]:
            if how == "on" and effort.quick:
                raise Missing("left out by --quick")
            recipe = Recipe(epochs=epochs, batch_size=batch, lr=1e-3, weight_decay=1e-4, compile=how)
            return our_stealing(effort.precision, victim, images, recipe, Path(folder) / how)

        contest.add(OURS, lambda: ours("off"), own_clock=True)
        contest.add(COMPILED, lambda: ours("on"), own_clock=True)
        make = functools.partial(classic_stealing, build_encoder(arch), arch, images, batch, effort.device)
        contest.add("2022", make, whole / (EPOCHS * QUERIES), ours=False)
        contest.run()
    more = {
        "timed": f"ours: {count:,} queries and {epochs} epochs; 2022: an epoch of {whole:,} images",
        "scaled_to": f"{QUERIES:,} queries, {EPOCHS} epochs",
    }
    notes = (
        "2022: the victim is asked anew in every epoch, float32, NCHW, images through a DataLoader, 2 workers",
        "ours: `SimCLR.steal`; compiling, once, is not counted",
    )
    ratios = [Ratio(way, "2022", 10.0 if effort.on_gpu else 4.0) for way in (OURS, COMPILED)]
    title = f"Stealing by mse, {arch}, {QUERIES:,} queries, {EPOCHS} epochs, batch {batch}"
    return make_row(title, contest, "s", ratios, notes, **more)
