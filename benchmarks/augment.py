"""Time of random views: this project's recipes, and SimCLR's by kornia (where it is installed) and torchvision on PIL.

    python -m benchmarks.augment [--images 512] [--size 32] [--rounds 15] [--device cuda]

This project is measured as a step of training uses it (rows of an epoch's table that is on the device already), and for
SimCLR's views also with the draws; the table of an epoch of 100,000 views is measured separately. The project does not
need kornia: `pip install --no-deps --target DIR kornia kornia_rs` and PYTHONPATH=DIR add it for a run. Set
OMP_NUM_THREADS=1 on a shared machine: threads that wait for a busy core make every implementation many times slower.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchvision import transforms
from torchvision.transforms import functional as TF

from benchmarks import timings
from data_aug import augment, operations
from data_aug.recipes import VIEW_RECIPES
from settings import Parser, Settings, setting

try:
    import kornia
    from kornia import augmentation as kornia_augment
except ImportError:
    kornia = None

EPOCH = 100_000  # views: two of each image of CIFAR-10
SIMCLR = VIEW_RECIPES["simclr"]
JITTER = dict(zip(("brightness", "contrast", "saturation", "hue"), SIMCLR.jitter, strict=True))


@dataclass(frozen=True)
class Timed(Settings):
    images: int = setting(512, "images in a batch", at_least=1)
    size: int = setting(32, "side of images and views, in pixels", at_least=8)
    rounds: int = setting(15, "timings of each implementation", at_least=1)
    device: torch.device = setting(
        torch.device("cuda" if torch.cuda.is_available() else "cpu"), "device of the batches", read=torch.device
    )


def pil_views(size: int) -> Callable:
    kernel = 2 * operations.blur_radius(size) + 1
    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, SIMCLR.crop_area, SIMCLR.crop_ratio),
            transforms.RandomHorizontalFlip(SIMCLR.flip_rate),
            transforms.RandomApply([transforms.ColorJitter(**JITTER)], SIMCLR.jitter_rate),
            transforms.RandomGrayscale(SIMCLR.grey_rate),
            transforms.GaussianBlur(kernel, SIMCLR.blur_sigma),
            transforms.ToTensor(),
        ]
    )
    return lambda images: torch.stack([view(image) for image in images])


def kornia_views(size: int) -> Callable:
    """A draw per image, except that kornia draws the order of the colour operations once for the batch."""
    kernel = 2 * operations.blur_radius(size) + 1
    view = torch.nn.Sequential(
        kornia_augment.RandomResizedCrop((size, size), SIMCLR.crop_area, SIMCLR.crop_ratio, align_corners=False),
        kornia_augment.RandomHorizontalFlip(p=SIMCLR.flip_rate),
        kornia_augment.ColorJitter(**JITTER, p=SIMCLR.jitter_rate),
        kornia_augment.RandomGrayscale(p=SIMCLR.grey_rate),
        kornia_augment.RandomGaussianBlur((kernel, kernel), SIMCLR.blur_sigma, p=1.0),
    )
    return lambda images: view(images.float() / 255)


@torch.no_grad()
def main() -> None:
    args = Parser(__doc__, [Timed]).parse().use(Timed)
    size, device, draws = args.size, args.device, torch.Generator().manual_seed(0)
    small = torch.rand(args.images, 3, 8, 8, generator=draws)
    smooth = torch.nn.functional.interpolate(small, (size, size), mode="bicubic")
    images = (smooth.clamp(0, 1) * 255).to(torch.uint8)
    pictures, images = [TF.to_pil_image(image) for image in images], images.to(device)
    rows = torch.randint(0, EPOCH, (args.images,)).to(device)
    tasks = {}
    for name, recipe in VIEW_RECIPES.items():
        table = augment.draw_views(EPOCH, size, size, size, draws, recipe).to(device)
        tasks[name] = lambda table=table: augment.apply_views(images, table[rows])
    on_pil = pil_views(size)
    tasks["with draws"] = lambda: augment.random_views(images, size, draws)
    tasks["PIL, 1 process"] = lambda: on_pil(pictures)
    if kornia:
        by_kornia = kornia_views(size)
        tasks[f"kornia {kornia.__version__}"] = lambda: by_kornia(images)
    else:
        print("kornia is not importable: left out")

    seconds = timings(args.rounds, warm_up=2, **tasks)
    shape = f"{args.images} views of {size} x {size}"
    print(f"{shape}, {device}, {torch.get_num_threads()} CPU threads, {args.rounds} rounds")
    print(f"{'':16}{'median ms':>12}{'fastest ms':>12}{'views/s':>12}{'time / simclr':>14}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        figures = f"{1e3 * median:12.1f}{1e3 * min(seconds[name]):12.1f}{args.images / median:12.0f}"
        print(f"{name:16}{figures}{median / medians['simclr']:14.1f}")
    (epoch,) = timings(5, epoch=lambda: augment.draw_views(EPOCH, size, size, size, draws)).values()
    print(f"the table of {EPOCH:,} views: {1e3 * statistics.median(epoch):.1f} ms")


if __name__ == "__main__":
    main()
