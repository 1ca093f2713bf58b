"""The project's linear evaluation against the classic way: seconds for 100 epochs, and the ratio.

python -m benchmarks.linear_eval [--arch resnet18] [--images 1000] [--classic-epochs 1] [--rounds 3]

Classic: the whole backbone's forward pass in every epoch, float32, NCHW; a few epochs are timed and scaled to 100,
because all are alike. Ours: representations once, then the 100 epochs of the linear layer, all of it timed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import alternate, set_up
from data_aug.datasets import load_dataset
from evaluation import Labelled, linear_probe, represent_both
from models import USUAL, SimCLREncoder, arch_name, build_encoder
from settings import Parser, Settings, setting

EPOCHS = 100


@dataclass(frozen=True)
class Benchmark(Settings):
    arch: str = setting("resnet18", f"architecture: {USUAL}", read=arch_name)
    images: int = setting(1000, "training images; a fifth as many test images", at_least=5)
    classic_epochs: int = setting(1, "epochs of the classic way that are timed", at_least=1)
    rounds: int = setting(3, "timings of both ways", at_least=1)


def classic(encoder: SimCLREncoder, train: Labelled, test: Labelled, epochs: int) -> None:
    """Trains and tests a linear layer for so many epochs."""
    layer = nn.Linear(encoder.dim, 10).to(train[0].device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-4, weight_decay=8e-4)
    for _ in range(epochs):
        for images, truth in zip(train[0].split(256), train[1].split(256), strict=True):
            with torch.no_grad():
                h = encoder(images / 255)
            loss = F.cross_entropy(layer(h), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for images in test[0].split(256):
                layer(encoder(images / 255))


def main() -> None:
    args = Parser(__doc__, [Benchmark]).parse().use(Benchmark)
    numbers = {"train": args.images, "test": args.images // 5}
    precision = set_up(f"{args.arch}, {numbers['train']} + {numbers['test']} images")
    train, test = (
        tuple(part[:number].to(precision.device) for part in load_dataset("shapes", split=split))
        for split, number in numbers.items()
    )
    plain = build_encoder(args.arch).eval().to(precision.device)
    encoder = build_encoder(args.arch).eval().to(precision.device, memory_format=precision.memory_format)
    seconds = alternate(
        args.rounds,
        classic=lambda: classic(plain, train, test, args.classic_epochs),
        ours=lambda: linear_probe(*represent_both(encoder, train, test, precision), epochs=EPOCHS),
    )
    whole, ours = seconds["classic"] * EPOCHS / args.classic_epochs, seconds["ours"]
    timed = f"{args.classic_epochs} of {EPOCHS} epochs timed"
    print(f"classic {whole:.1f} s ({timed}), ours {ours:.2f} s, ratio {whole / ours:.0f}")


if __name__ == "__main__":
    main()
