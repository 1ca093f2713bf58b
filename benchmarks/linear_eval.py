"""The project's linear evaluation against the classic way: seconds for 100 epochs, and the ratio.

python -m benchmarks.linear_eval [--arch resnet18] [--images 1000] [--classic-epochs 1] [--rounds 3]

Classic: the whole backbone's forward pass in every epoch, float32, NCHW; a few epochs are timed and scaled to 100,
because all are alike. Ours: representations once, then the 100 epochs of the linear layer, all of it timed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import alternate, machine
from data_aug.datasets import load_dataset
from evaluation import linear_probe, represent
from models import USUAL, arch_name, build_encoder
from settings import Parser, Settings, setting
from utils import Precision, choose_device

EPOCHS = 100


@dataclass(frozen=True)
class Benchmark(Settings):
    arch: str = setting("resnet18", f"architecture: {USUAL}", read=arch_name)
    images: int = setting(1000, "training images; a fifth as many test images", at_least=5)
    classic_epochs: int = setting(1, "epochs of the classic way that are timed", at_least=1)
    rounds: int = setting(3, "timings of both ways", at_least=1)


def classic_epochs(encoder: nn.Module, images: Tensor, labels: Tensor, test_images: Tensor, epochs: int):
    """Returns a function that trains and tests a linear layer for `epochs` epochs the classic way."""
    layer = nn.Linear(encoder.dim, 10).to(images.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-4, weight_decay=8e-4)

    def run() -> None:
        for _ in range(epochs):
            for batch, truth in zip(images.split(256), labels.split(256), strict=True):
                with torch.no_grad():
                    h = encoder(batch / 255)
                loss = F.cross_entropy(layer(h), truth)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                for batch in test_images.split(256):
                    layer(encoder(batch / 255))

    return run


def main() -> None:
    args = Parser(__doc__, [Benchmark]).parse().use(Benchmark)
    device = choose_device()
    precision = Precision.choose("auto", device)
    (images, labels), (test_images, test_labels) = (
        (x[:n].to(device), y[:n].to(device))
        for (x, y), n in (
            (load_dataset("shapes", split="train"), args.images),
            (load_dataset("shapes", split="test"), args.images // 5),
        )
    )
    encoder = build_encoder(args.arch).eval().to(device)
    plain = build_encoder(args.arch).eval().to(device)
    encoder.to(memory_format=precision.memory_format)

    def ours() -> None:
        train = represent(encoder, images, precision), labels
        linear_probe(train, (represent(encoder, test_images, precision), test_labels), epochs=EPOCHS)

    seconds = alternate(
        args.rounds, classic=classic_epochs(plain, images, labels, test_images, args.classic_epochs), ours=ours
    )
    classic = seconds["classic"] * EPOCHS / args.classic_epochs
    print(f"{machine()}, precision auto = {precision.name}, {args.arch}, {len(images)} + {len(test_images)} images")
    print(
        f"classic {classic:.1f} s ({args.classic_epochs} of {EPOCHS} epochs timed), ours {seconds['ours']:.2f} s, ",
        end="",
    )
    print(f"ratio {classic / seconds['ours']:.0f}")


if __name__ == "__main__":
    main()
