"""What each defence adds to a victim's answers: its seconds and their ratio to the encoder's.

python -m benchmarks.defences [--arch resnet34] [--queries 512] [--memory 10000] [--out-dim 128] [--rounds 5]

The encoder answers one call of so many queries with the precision that --precision auto takes on this machine; each
defence, at its defaults, then changes these answers. Poisoning's memory is full, and the head whose projections it
compares is part of its time. All take turns, so only the ratios of one run mean anything.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import alternate, machine
from data_aug.datasets import load_dataset, to_float
from defenses import DEFENCES, Query
from defenses.poisoning import Poisoning
from models import build_encoder
from options import Parser
from utils import Precision, choose_device, seeded
from victim import image_digests


def full_poisoning(earlier: Tensor, project: Callable[[Tensor], Tensor], size: int = 512) -> Poisoning:
    """Poisoning that remembers exactly these representations (M, D) of earlier queries, asked so many in a call."""
    defence = Poisoning(poison_memory=len(earlier))
    for part in earlier.split(size):
        defence.nearest(Query(digests=[], representations=part, project=project))
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
        # A new query each time: it keeps the projections that were computed for it.
        return lambda: defence(h, Query(digests, h, project, first=memory))

    return {"encoder": represent, **{name: call_of(name) for name in DEFENCES}}


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet34", help="architecture")
    parser.add_argument("--queries", type=int, default=512, help="queries in a call")
    parser.add_argument("--memory", type=int, default=10_000, help="earlier queries that poisoning remembers")
    parser.add_argument("--out-dim", type=int, default=128, help="width of the projections that poisoning compares")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each, in turn")
    args = parser.parse_args()
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
