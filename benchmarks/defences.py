"""The time that each defence adds to a victim's answers: seconds, and their ratio to the encoder's.

python -m benchmarks.defences [--arch resnet34] [--queries 512] [--memory 10000] [--out-dim 128] [--rounds 5]

The encoder answers a call of --queries images; each defence, at its defaults, then changes these answers. Poisoning's
memory is full, and its time includes the head whose projections it compares.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import alternate, set_up
from data_aug.datasets import load_dataset, to_float
from defenses import DEFENCES, Call
from defenses.poisoning import Poisoning
from models import arch_name, build_encoder
from settings import Parser, Settings, setting
from utils import seeded
from victim import image_digests


def full_poisoning(earlier: Tensor, project: Callable[[Tensor], Tensor], size: int = 512) -> Poisoning:
    """Poisoning that remembers exactly these representations (M, D) of earlier queries, from calls of `size`."""
    defence = Poisoning(poison_memory=len(earlier))
    for part in earlier.split(size):
        defence.nearest(Call(digests=[], representations=part, project=project))
    return defence


@dataclass(frozen=True)
class Timed(Settings):
    arch: str = setting("resnet34", "architecture", read=arch_name)
    queries: int = setting(512, "queries in a call", at_least=1)
    memory: int = setting(10_000, "earlier queries that poisoning remembers", at_least=1)
    out_dim: int = setting(128, "width of the projections that poisoning compares", at_least=1)
    rounds: int = setting(5, "timings of each defence", at_least=1)


@torch.no_grad()
def main() -> None:
    args = Parser(__doc__, [Timed]).parse().use(Timed)
    images = load_dataset("shapes")[0][: args.queries]
    precision = set_up(f"{args.arch}, {len(images)} queries, poisoning with {args.memory} x {args.out_dim} in memory")
    with seeded(0):
        encoder = build_encoder(args.arch, args.out_dim).eval()
        earlier = torch.randn(args.memory, encoder.dim).to(precision.device)
    encoder = encoder.to(precision.device, memory_format=precision.memory_format)
    digests = image_digests(images)
    floats = to_float(images.to(precision.device)).contiguous(memory_format=precision.memory_format)

    def project(h: Tensor) -> Tensor:
        with precision.autocast():
            return encoder.backbone.fc(h)

    def represent() -> Tensor:
        with precision.autocast():
            return encoder(floats)

    def task(name: str, h: Tensor) -> Callable[[], object]:
        defence = full_poisoning(earlier, project) if name == "poisoning" else DEFENCES[name]()
        # A new Call each time: a Call keeps the projections that were computed for it.
        return lambda: defence(h, Call(digests, h, project, first=args.memory))

    h = represent().float()
    seconds = alternate(args.rounds, encoder=represent, **{name: task(name, h) for name in DEFENCES})
    print("| | seconds | of the encoder's |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.4f} | {value / seconds['encoder']:.4f} |")


if __name__ == "__main__":
    main()
