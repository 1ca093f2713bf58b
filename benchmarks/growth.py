"""Rows of the cost as the work grows: images, batch, layers, queries in the ledger."""

import functools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import peak_memory
from benchmarks.row import Ratio, make_row, median_of, rounded
from benchmarks.steps import our_training, pictures
from benchmarks.timing import Contest, Effort
from data_aug.digests import HASH_BYTES
from loss import nt_xent
from utils import generator
from victim import Victim

TIMES = ("ratio: how many times as long",)


def images(effort: Effort) -> dict[str, Any]:
    """The row of an epoch of the small network on once, twice and four times as many images: seconds."""
    batch, count = effort.size(256, 256, 8), effort.size(1024, 12_800, 16)
    contest = Contest(effort)
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 2, 4):
            place = Path(folder) / str(times)
            make = functools.partial(
                our_training, "resnet10w32", pictures(times * count), batch, effort.precision, place
            )
            contest.add(f"{times * count:,} images", make)
        contest.run()
    first, *others = contest.seconds
    ratios = [Ratio(first, name) for name in others]
    return make_row(f"An epoch on more images, resnet10w32, batch {batch}", contest, "s", ratios, TIMES)


def loss(effort: Effort) -> dict[str, Any]:
    """The row of nt_xent, forward and backward, on batches of 128 to 4,096 images: time, memory, share of a step."""
    sizes = effort.size((128, 256, 512, 1024, 2048, 4096), (128, 256, 512, 1024, 2048, 4096), (8, 16))
    contest, memory = Contest(effort), {}
    batch, steps = effort.size(256, 256, 8), effort.size(2, 30, 1)
    _loss_alone(8, effort.device)()  # what is loaded for the first call is not the loss's
    for size in sizes:
        work = _loss_alone(size, effort.device)
        with peak_memory() as peak:
            work()
        memory[f"batch {size:,}"] = peak.bytes
        contest.add(f"batch {size:,}", lambda work=work: work, repeat=True)
    with tempfile.TemporaryDirectory() as folder:
        make = functools.partial(
            our_training, "resnet18", pictures(batch * steps), batch, effort.precision, Path(folder)
        )
        contest.add(f"a step, resnet18, batch {batch}", make, steps, own_clock=True)
        contest.run()
    whole = median_of(contest, f"a step, resnet18, batch {batch}")
    seconds = {size: median_of(contest, f"batch {size:,}") for size in sizes}
    shares = {
        f"batch {size:,}": rounded(value / (whole * size / batch)) for size, value in seconds.items() if whole and value
    }
    notes = (
        "two views: the loss compares twice as many rows of 128 numbers, in float32",
        f"share of a step: of the step at batch {batch}, scaled to the batch",
    )
    more = {"share_of_step": shares, "loss_memory_bytes": memory}
    return make_row("The loss nt_xent, forward and backward", contest, "ms", notes=notes, **more)


def _loss_alone(size: int, device: torch.device) -> Callable[[], None]:
    features = torch.randn(2 * size, 128, generator=generator(0, "features")).to(device).requires_grad_()

    def work() -> None:
        features.grad = None
        nt_xent(features).backward()

    return work


def layers(effort: Effort) -> dict[str, Any]:
    """The row of a step of networks of 18, 34 and 50 layers: seconds."""
    batch, steps = effort.size(128, 256, 4), effort.size(1, 30, 1)
    archs = effort.size(*(("resnet18", "resnet34", "resnet50"),) * 2, ("resnet10w32", "resnet18"))
    contest = Contest(effort)
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            place = Path(folder) / arch
            make = functools.partial(our_training, arch, pictures(batch * steps), batch, effort.precision, place)
            contest.add(arch, make, steps, own_clock=True)
        contest.run()
    ratios = [Ratio(archs[0], arch) for arch in archs[1:]]
    return make_row(f"A step of deeper networks, batch {batch} x 2 views", contest, "s", ratios, TIMES)


# ---- the ledger ------------------------------------------------------------------------------------------------------


class Average(nn.Module):
    """An encoder that costs nearly nothing: a linear map of the mean colour."""

    dim = 512

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, self.dim)

    def forward(self, shown: Tensor) -> Tensor:
        return self.layer(shown.mean((2, 3)))


def ledger(effort: Effort) -> dict[str, Any]:
    """The row of 1,000 queries to a cheap encoder, with an empty ledger and with a million queries in it: ms."""
    count, before = effort.size(1000, 1000, 10), effort.size(10**6, 10**6, 1000)
    encoder, shown, contest = Average().to(effort.device), pictures(count), Contest(effort)

    def asking(earlier: int) -> Callable[[], Tensor]:
        victim = Victim(encoder, precision=effort.precision, dim=Average.dim)
        if earlier:
            digests, hashes = (_random_bytes(earlier, size) for size in (16, HASH_BYTES))
            victim.ledger.record(digests, hashes=hashes)
        return lambda: victim.query(shown)

    names = "empty", f"{before:,} queries in the ledger"
    for name, earlier in zip(names, (0, before), strict=True):
        contest.add(name, lambda earlier=earlier: asking(earlier), repeat=True)
    contest.run()
    cost = statistics.median(contest.seconds[names[1]]) - statistics.median(contest.seconds[names[0]])
    notes = ("an encoder that costs nearly nothing: this is what the black box itself costs",)
    more = {"more_ms_when_full": rounded(1e3 * cost)}
    return make_row(f"{count:,} queries and the ledger", contest, "ms", [Ratio(names[1], names[0])], notes, **more)


def _random_bytes(count: int, size: int) -> list[bytes]:
    data = os.urandom(count * size)
    return [data[start : start + size] for start in range(0, count * size, size)]
