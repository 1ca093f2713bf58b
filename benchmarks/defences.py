"""The row of the time that each defence adds to a victim's answers.

The encoder answers a call; each defence, at its defaults, then changes these answers. Poisoning's memory is full, and
its time includes the head whose projections it compares.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.row import Ratio, make_row
from benchmarks.steps import pictures
from benchmarks.timing import Contest, Effort
from data_aug.datasets import to_float
from defenses import DEFENCES, Call
from defenses.poisoning import Poisoning
from models import build_encoder
from utils import seeded
from victim import image_digests


def full_poisoning(earlier: Tensor, project: Callable[[Tensor], Tensor], size: int = 512) -> Poisoning:
    """Poisoning that remembers exactly these representations (M, D) of earlier queries, from calls of `size`."""
    defence = Poisoning(poison_memory=len(earlier))
    for part in earlier.split(size):
        defence.nearest(Call(digests=[], representations=part, project=project))
    return defence


@torch.no_grad()
def defences(effort: Effort, arch: str) -> dict[str, Any]:
    """The row: milliseconds for a call of the encoder, and of each defence after it."""
    count, remembered, width = effort.size(512, 512, 4), effort.size(10_000, 10_000, 10), 128
    images, precision = pictures(count), effort.precision
    with seeded(0):
        encoder = build_encoder(arch, width).eval()
        earlier = torch.randn(remembered, encoder.dim).to(precision.device)
    encoder = encoder.to(precision.device, memory_format=precision.memory_format)
    digests = image_digests(images)
    floats = to_float(images.to(precision.device)).contiguous(memory_format=precision.memory_format)

    def project(h: Tensor) -> Tensor:
        with precision.autocast():
            return encoder.backbone.fc(h)

    def represent() -> Tensor:
        with precision.autocast():
            return encoder(floats)

    h = represent().float()

    def task(name: str) -> Callable[[], object]:
        defence = full_poisoning(earlier, project) if name == "poisoning" else DEFENCES[name]()
        # A new Call each time: a Call keeps the projections that were computed for it.
        return lambda: defence(h, Call(digests, h, project, first=remembered))

    contest = Contest(effort)
    contest.add("encoder", lambda: represent, repeat=True)
    for name in DEFENCES:
        contest.add(name, lambda name=name: task(name))
    contest.run()
    ratios = [Ratio("encoder", name) for name in DEFENCES]
    notes = (
        "ratio: the defence's time as a share of the encoder's",
        f"poisoning remembers {remembered:,} queries and compares projections of {width} numbers",
    )
    return make_row(f"Defences, {count} queries, {arch}", contest, "ms", ratios, notes)
