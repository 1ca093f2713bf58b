"""Rows of a step of SimCLR's training: against the classic way and lightly's, and against ready-made views."""

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, peers
from benchmarks.row import Ratio, claim, make_row, median_of, rounded
from benchmarks.timing import Contest, Effort, Missing, seconds_of, synchronise
from data_aug.augment import apply_views, draw_views
from data_aug.datasets import load_dataset
from data_aug.images import Stored
from data_aug.recipes import VIEW_RECIPES
from jobs.memory import keep_freed_memory
from loss import TRAIN_LOSSES, nt_xent
from models import build_encoder
from simclr import SimCLR
from training.recipe import Recipe
from training.run import Run
from utils import Precision, generator

INFONCE = TRAIN_LOSSES["infonce"]
EPOCH = 50_000  # images of CIFAR-10
OURS, COMPILED, CLASSIC, LIGHTLY = "ours", "ours, compiled", "classic, 2 workers", "lightly, 2 workers"
NOTES = (
    "classic: PIL views in worker processes, float32, NCHW, Adam",
    "lightly: as in its SimCLR example, float32, without blur; this project's network",
    f"ours: `SimCLR.train`; of the draws and the checkpoint, once an epoch, the share in {EPOCH:,} images counts",
    "split: the parts of a step by themselves; idle is the rest of the whole step, less than 0 where parts overlap",
    "FLOPs are those of the network's products and convolutions, forward and backward",
)


def pictures(count: int) -> Tensor:
    """So many images, uint8 (count, 3, 32, 32): shapes, again and again."""
    images = load_dataset("shapes")[0][:count]
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


def our_training(
    arch: str, images: Tensor, batch_size: int, precision: Precision, folder: Path, how: str = "off", augment="simclr"
) -> Callable[[], float]:
    """A function that trains another epoch with the project's trainer, compiled or not (`how`: on, off).

    It returns the seconds of the epoch's steps, and of what comes once an epoch, such as the draws and the checkpoint,
    the share that these images have in an epoch of EPOCH images.
    """
    recipe = Recipe(epochs=1, batch_size=batch_size, lr=3e-4, weight_decay=1e-4, compile=how)
    loss = dataclasses.replace(INFONCE, augment=augment)
    trainer = SimCLR(build_encoder(arch, out_dim=128), loss, recipe, Run(folder, precision))

    def epoch() -> float:
        whole = seconds_of(quietly(lambda: trainer.train(Stored(images))))
        steps = seconds_of_steps(trainer.run)
        return steps + (whole - steps) * len(images) / EPOCH

    return epoch


def seconds_of_steps(run: Run) -> float:
    """What the run has logged: the seconds of its epochs' steps."""
    return sum(line["seconds"] for line in run.lines() if "epoch" in line)


def quietly(work: Callable[[], Any]) -> Callable[[], Any]:
    """The work, without what it prints."""

    def silent() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return work()

    return silent


def step(effort: Effort, arch: str) -> dict[str, Any]:
    """The row of a network: images per second of each way, and the split of our step."""
    batch, device = effort.size(256, 256, 8), effort.device
    few, many = effort.size(2, 8, 1), effort.size(2, 60, 1)  # steps of the others, and ours, in a round
    contest, some = Contest(effort), pictures(batch * few)
    with tempfile.TemporaryDirectory() as folder:

        def ours(how: str) -> Callable[[], float]:
            if how == "on" and effort.quick:
                raise Missing("left out by --quick")
            place = Path(folder) / how
            return our_training(arch, pictures(batch * many), batch, effort.precision, place, how)

        contest.add(OURS, lambda: ours("off"), batch * many, own_clock=True)
        contest.add(COMPILED, lambda: ours("on"), batch * many, own_clock=True)
        contest.add(CLASSIC, lambda: peers.classic_training(arch, some, batch, device), batch * few, ours=False)
        if effort.on_gpu:
            more = pictures(4 * batch * few)
            with_16 = lambda: peers.classic_training(arch, more, batch, device, 16)  # noqa: E731
            contest.add("classic, 16 workers", with_16, 4 * batch * few, ours=False)
        contest.add(LIGHTLY, lambda: peers.lightly_training(arch, some, batch, device), batch * few, ours=False)
        contest.run()
    more = {"share_of_peak": shares_of_peak(effort, arch, contest), "split": splits(effort, arch, batch, contest)}
    ratios, claims = _claimed(effort, arch, contest)
    title = f"SimCLR step, {arch}, batch {batch} x 2 views"
    return make_row(title, contest, "images/s", ratios, NOTES, claims=claims, **more)


def _claimed(effort: Effort, arch: str, contest: Contest) -> tuple[list[Ratio], list[dict]]:
    """The ratios with what is claimed of them, and other claims: for the two networks that the project names."""
    large = arch in ("resnet18", "resnet34")
    limits = {CLASSIC: 10.0 if effort.on_gpu else 4.0, "classic, 16 workers": 3.0, LIGHTLY: 3.5}
    over = [CLASSIC, *(["classic, 16 workers"] if effort.on_gpu else []), LIGHTLY]
    ratios = [Ratio(way, peer, limits[peer] if large else None) for way in (OURS, COMPILED) for peer in over]
    ratios.append(Ratio(COMPILED, OURS))
    best = min((median_of(contest, way) for way in (OURS, COMPILED) if way in contest.seconds), default=None)
    claims = []
    if effort.on_gpu and arch == "resnet34":
        claims = [claim("images per second, the faster of ours", best and 1 / best, at_least=8000)]
    if effort.on_gpu and arch == "resnet18":
        claims = [claim(f"seconds for an epoch of {EPOCH:,} images", best and best * EPOCH, at_most=3)]
    return ratios, claims


# ---- parts -----------------------------------------------------------------------------------------------------------


def flop_of(arch: str) -> float:
    """FLOPs for each image of a training step with two views: of the network, forward and backward."""
    model, images = build_encoder(arch, out_dim=128).train(), torch.rand(4, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model.project(images).sum().backward()
    return counter.get_total_flops() / 2


def shares_of_peak(effort: Effort, arch: str, contest: Contest) -> dict[str, Any]:
    """The peak that the chip shows now, and what share of it each way of training has."""
    peak, flop = machine.peak(effort.precision, effort.quick), flop_of(arch)
    rates = {name: flop / statistics.median(seconds) for name, seconds in contest.seconds.items()}
    shares = {name: rounded(rate / peak["flop_per_second"]) for name, rate in rates.items()}
    return {"peak": peak, "flop_per_image": flop, "ways": shares}


def splits(effort: Effort, arch: str, batch: int, contest: Contest) -> dict[str, dict[str, float]]:
    """Seconds of each part of our steps, and the rest of the whole step."""
    found = {}
    for name in (OURS, COMPILED):
        if name not in contest.seconds:
            continue
        parts = parts_of_step(effort, arch, batch, compiled=name == COMPILED)
        whole = batch * median_of(contest, name)
        found[name] = {"step": rounded(whole), **parts, "idle": rounded(whole - sum(parts.values()))}
    return found


def parts_of_step(effort: Effort, arch: str, batch: int, compiled: bool) -> dict[str, float]:
    """Median seconds of the views, the forward pass with the loss, the backward pass and the optimizer's step."""
    keep_freed_memory()  # the last way of the contest may have been another's
    precision, device = effort.precision, effort.device
    images = pictures(batch).to(device).repeat(2, 1, 1, 1)
    table = draw_views(2 * batch, 32, 32, 32, generator(0, "views"), VIEW_RECIPES["simclr"]).to(device)
    model = build_encoder(arch, out_dim=128).to(device, memory_format=precision.memory_format).train()
    network = torch.compile(model.project, dynamic=False) if compiled else model.project
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, weight_decay=1e-4, fused=True)
    times: dict[str, list[float]] = {"views": [], "forward": [], "backward": [], "optimizer": []}
    for _ in range(1 + effort.size(3, 20, 1)):
        clock = _Clock(times)
        views = apply_views(images, table).contiguous(memory_format=precision.memory_format)
        clock.read("views")
        with precision.autocast():
            features = network(views)
        loss = nt_xent(features.float())
        clock.read("forward")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clock.read("backward")
        optimizer.step()
        clock.read("optimizer")
    return {name: rounded(statistics.median(values[1:])) for name, values in times.items()}


class _Clock:
    """Adds to `times`, by name, the seconds since the last reading."""

    def __init__(self, times: dict[str, list[float]]):
        synchronise()
        self.times, self.before = times, time.perf_counter()

    def read(self, name: str) -> None:
        synchronise()
        now = time.perf_counter()
        self.times[name].append(now - self.before)
        self.before = now


# ---- ready-made views ------------------------------------------------------------------------------------------------


def ready_views(effort: Effort, arch: str) -> dict[str, Any]:
    """The row of the step against the same step whose images are its views."""
    batch, steps = effort.size(256, 256, 8), effort.size(2, 60, 1)
    contest = Contest(effort)
    with tempfile.TemporaryDirectory() as folder:
        for name, augment in (("random views", "simclr"), ("ready-made views", "none")):
            options = {"augment": augment, "folder": Path(folder) / augment}
            make = lambda options=options: our_training(  # noqa: E731
                arch, pictures(batch * steps), batch, effort.precision, **options
            )
            contest.add(name, make, batch * steps, own_clock=True)
        contest.run()
    ratio = Ratio("random views", "ready-made views", 0.9)
    notes = ("ready-made: the images themselves, two of each; the ratio is the speed that random views leave",)
    return make_row(f"Step on ready-made views, {arch}, batch {batch}", contest, "images/s", [ratio], notes)
