"""The time that each defence adds to a victim's answers: seconds, and their ratio to the encoder's.

python -m benchmarks.defences [--arch resnet34] [--queries 512] [--memory 10000] [--out-dim 128] [--rounds 5]

The encoder answers a call of --queries images with the precision that --precision auto selects on this machine; each
defence, at its defaults, then changes these answers. Poisoning's memory is full, and its time includes the head whose
projections it compares. All take turns, so only the ratios within a run are meaningful.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import alternate, machine
from data_aug.datasets import load_dataset, to_float
from defenses import DEFENCES, Call
from defenses.poisoning import Poisoning
from models import arch_name, build_encoder
from settings import Parser, Settings, setting
from utils import Precision, choose_device, seeded
from victim import image_digests


def full_poisoning(earlier: Tensor, project: Callable[[Tensor], Tensor], size: int = 512) -> Poisoning:
    """Poisoning that remembers exactly these representations (M, D) of earlier queries, from calls of `size`."""
    defence = Poisoning(poison_memory=len(earlier))
    for part in earlier.split(size):
        defence.nearest(Call(digests=[], representations=part, project=project))
    return defence


def tasks(
    arch: str, images: Tensor, memory: int, out_dim: int, precision: Precision
) -> dict[str, Callable[[], object]]:
    """The encoder on uint8 images (N, 3, H, W), and every defence on its answers (N, D)."""
    with seeded(0):
        encoder = build_encoder(arch, out_dim).eval().requires_grad_(False).to(precision.device)
        earlier = torch.randn(memory, encoder.dim, device=precision.device)
    encoder.to(memory_format=precision.memory_format)
    digests = image_digests(images)
    floats = to_float(images.to(precision.device)).contiguous(memory_format=precision.memory_format)

    def project(h: Tensor) -> Tensor:
        with precision.autocast():
            return encoder.backbone.fc(h)

    def represent() -> Tensor:
        with precision.autocast():
            return encoder(floats)

    h = represent().float()

    def call_of(name: str) -> Callable[[], object]:
        defence = full_poisoning(earlier, project) if name == "poisoning" else DEFENCES[name]()
        # A new Call each time: a Call keeps the projections that were computed for it.
        return lambda: defence(h, Call(digests, h, project, first=memory))

    return {"encoder": represent, **{name: call_of(name) for name in DEFENCES}}


@dataclass(frozen=True)
class Timed(Settings):
    arch: str = setting("resnet34", "architecture", read=arch_name)
    queries: int = setting(512, "queries in a call", at_least=1)
    memory: int = setting(10_000, "earlier queries that poisoning remembers", at_least=1)
    out_dim: int = setting(128, "width of the projections that poisoning compares", at_least=1)
    rounds: int = setting(5, "timings of each defence", at_least=1)


def main() -> None:
    args = Parser(__doc__, [Timed]).parse().use(Timed)
    precision = Precision.choose("auto", choose_device())
    images = load_dataset("shapes")[0][: args.queries]
    with torch.no_grad():
        seconds = alternate(args.rounds, **tasks(args.arch, images, args.memory, args.out_dim, precision))
    print(
        f"{machine()}, precision auto = {precision.name}, {args.arch}, {len(images)} queries, poisoning with "
        f"{args.memory} x {args.out_dim} in memory"
    )
    print("| | seconds | of the encoder's |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.4f} | {value / seconds['encoder']:.4f} |")


if __name__ == "__main__":
    main()
