"""The project's training step against the classic way: images per second, and the ratio.

python -m benchmarks.train_step [--archs resnet18 resnet34] [--batch-size 256] [--steps 2] [--rounds 3] [--compile]

Classic: PIL transforms image by image in 2 worker processes, float32, NCHW, Adam. Ours: `SimCLR.train`, with the
precision that --precision auto selects on this machine. Both train on two views of the same images.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks import alternate, set_up
from data_aug.datasets import load_dataset
from data_aug.images import Stored
from loss import TRAIN_LOSSES, nt_xent
from models import arch_name, build_encoder
from settings import Parser, Settings, setting
from simclr import SimCLR
from training.recipe import Recipe
from training.run import Run
from utils import Precision


class TwoViews(Dataset):
    """Two random views of each image, made the classic way."""

    def __init__(self, images: Tensor):
        self.images = images.permute(0, 2, 3, 1).numpy()
        self.view = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomResizedCrop(32),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.GaussianBlur(3, sigma=(0.1, 2.0)),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.view(self.images[index]), self.view(self.images[index])


def classic_training(arch: str, images: Tensor, batch_size: int, device: torch.device) -> Callable[[], None]:
    """A function that trains another epoch the classic way."""
    model = build_encoder(arch, out_dim=128).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, weight_decay=1e-4)
    # Persistent workers, as in a long training: their start is not part of a step.
    workers = {"num_workers": 2, "persistent_workers": True, "pin_memory": device.type == "cuda"}
    loader = DataLoader(TwoViews(images), batch_size, shuffle=True, drop_last=True, **workers)

    def epoch() -> None:
        for views in loader:
            loss = nt_xent(model.project(torch.cat(views).to(device)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def our_training(
    arch: str, images: Tensor, batch_size: int, precision: Precision, folder: Path, compiled: bool = False
) -> Callable[[], None]:
    """A function that trains another epoch with the project's trainer."""
    how = "on" if compiled else "off"
    recipe = Recipe(epochs=1, batch_size=batch_size, lr=3e-4, weight_decay=1e-4, compile=how)
    trainer = SimCLR(build_encoder(arch, out_dim=128), TRAIN_LOSSES["infonce"], recipe, Run(folder, precision))

    def epoch() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train(Stored(images))

    return epoch


@dataclass(frozen=True)
class TrainStep(Settings):
    archs: tuple[str, ...] = setting(("resnet18", "resnet34"), "architectures", read=arch_name, several=True)
    batch_size: int = setting(256, "images per batch", at_least=1)
    steps: int = setting(50 if torch.cuda.is_available() else 2, "steps per timing", at_least=1)
    rounds: int = setting(3, "timings of each way", at_least=1)
    compile: bool = setting(False, "time the compiled network too")


def main() -> None:
    args = Parser(__doc__, [TrainStep]).parse().use(TrainStep)
    images = load_dataset("shapes")[0][: args.batch_size * args.steps]
    precision = set_up(f"batch {args.batch_size}")
    ours = ["ours", *(["compiled"] if args.compile else [])]
    print(f"| network | classic, images/s |{''.join(f' {name}, images/s | ratio |' for name in ours)}")
    print("|---" * (2 + 2 * len(ours)) + "|")
    for arch in args.archs:
        with tempfile.TemporaryDirectory() as folder:
            ways = {"classic": classic_training(arch, images, args.batch_size, precision.device)}
            for name in ours:
                place = Path(folder) / name
                ways[name] = our_training(arch, images, args.batch_size, precision, place, name == "compiled")
            seconds = alternate(args.rounds, **ways)
        speed = {name: len(images) / value for name, value in seconds.items()}
        cells = [f" {speed[name]:.1f} | {speed[name] / speed['classic']:.2f} |" for name in ours]
        print(f"| {arch} | {speed['classic']:.1f} |{''.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
