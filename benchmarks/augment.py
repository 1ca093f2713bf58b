"""Time of random SimCLR views: this project, kornia (where it is installed) and torchvision on PIL images.

    python -m benchmarks.augment [--images 512] [--size 32] [--rounds 15] [--device cuda]

The implementations take turns in one process, and their medians are compared. This project is measured as a step of
training uses it (rows of an epoch's table that is on the device already) and with the draws; the table of an epoch of
100,000 views is measured separately. Then each operation of this project and of kornia is compared with torchvision's
function for a single float image, at the same factors. The project does not need kornia: `pip install --no-deps
--target DIR kornia kornia_rs` and PYTHONPATH=DIR add it for a run. Set OMP_NUM_THREADS=1 on a shared machine: threads
that wait for a busy core make every implementation many times slower.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF

from data_aug import augment, operations

try:
    import kornia
    from kornia import augmentation as kornia_augment
except ImportError:
    kornia = None

EPOCH = 100_000  # views: two of each image of CIFAR-10
JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}


def pil_views(size: int) -> Callable:
    kernel = 2 * operations.blur_radius(size) + 1
    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, augment.CROP_AREA, augment.CROP_RATIO),
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(**JITTER)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.GaussianBlur(kernel, augment.BLUR_SIGMA),
            transforms.ToTensor(),
        ]
    )
    return lambda images: torch.stack([view(image) for image in images])


def kornia_views(size: int) -> Callable:
    """A draw per image, except that kornia draws the order of the colour operations once for the batch."""
    kernel = 2 * operations.blur_radius(size) + 1
    view = torch.nn.Sequential(
        kornia_augment.RandomResizedCrop((size, size), augment.CROP_AREA, augment.CROP_RATIO, align_corners=False),
        kornia_augment.RandomHorizontalFlip(p=0.5),
        kornia_augment.ColorJitter(**JITTER, p=0.8),
        kornia_augment.RandomGrayscale(p=0.2),
        kornia_augment.RandomGaussianBlur((kernel, kernel), augment.BLUR_SIGMA, p=1.0),
    )
    return lambda images: view(images.float() / 255)


@torch.no_grad()
def measure(candidates: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each run; each round runs every candidate once, and the first two rounds are warm-up."""
    times = {name: [] for name in candidates}
    for _ in range(rounds + 2):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append((time.perf_counter() - start) * 1000)
    return {name: series[2:] for name, series in times.items()}


def largest_difference(found: Tensor, images: Tensor, function: Callable, *columns: list) -> float:
    """The largest difference of `found` from function(image, a value of each column), over all images."""
    expected = [function(image, *values) for image, *values in zip(images, *columns, strict=True)]
    return (found - torch.stack(expected)).abs().max().item()


def blurred(image: Tensor, sigma: float) -> Tensor:
    return TF.gaussian_blur(image, [5, 5], [sigma, sigma])


def resized(image: Tensor, box: list[int]) -> Tensor:
    return TF.resized_crop(image, *box, [32, 32], antialias=True)


def agreement_of_this_project(images: Tensor) -> dict[str, float]:
    x, n = images.float() / 255, len(images)
    draws = augment.draw_views(n, *images.shape[-2:], 32, torch.Generator().manual_seed(0))
    crops = operations.crop_resize(images, draws.boxes, torch.zeros(n, dtype=torch.bool), 32)
    found = {"crop": largest_difference(crops, x, resized, draws.boxes.tolist())}
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        ours, theirs = getattr(operations, f"adjust_{name}"), getattr(TF, f"adjust_{name}")
        factors = draws.factors[:, i]
        found[name] = largest_difference(ours(x, factors), x, theirs, factors.tolist())
    found["grey"] = largest_difference(operations.to_grey(x), x, TF.rgb_to_grayscale, [3] * n)
    blurs = operations.gaussian_blur(x, draws.sigma, 2)
    return found | {"blur": largest_difference(blurs, x, blurred, draws.sigma.tolist())}


def agreement_of_kornia(images: Tensor) -> dict[str, float]:
    x, n = images.float() / 255, len(images)
    crop = kornia_augment.RandomResizedCrop((32, 32), augment.CROP_AREA, augment.CROP_RATIO, align_corners=False)
    crops = crop(x)
    first, last = crop._params["src"][:, 0].long(), crop._params["src"][:, 2].long()  # x, y of corner pixels
    boxes = torch.cat([first.flip(1), (last - first + 1).flip(1)], 1)
    found = {"crop": largest_difference(crops, x, resized, boxes.tolist())}
    for name, strength in JITTER.items():
        jitter = kornia_augment.ColorJitter(**{name: strength}, p=1.0)
        adjusted, theirs = jitter(x), getattr(TF, f"adjust_{name}")
        found[name] = largest_difference(adjusted, x, theirs, jitter._params[f"{name}_factor"].tolist())
    found["grey"] = largest_difference(kornia_augment.RandomGrayscale(p=1.0)(x), x, TF.rgb_to_grayscale, [3] * n)
    blur = kornia_augment.RandomGaussianBlur((5, 5), augment.BLUR_SIGMA, p=1.0)
    return found | {"blur": largest_difference(blur(x), x, blurred, blur._params["sigma"].tolist())}


def print_agreement(title: str, images: Tensor) -> None:
    """The largest difference of each operation from torchvision on float images, in 1/255."""
    rows = {"this project": agreement_of_this_project(images)}
    if kornia:
        rows["kornia"] = agreement_of_kornia(images)
    print(f"\nlargest difference from torchvision, in 1/255, {title}")
    print(" " * 14 + "".join(f"{name:>12}" for name in rows["this project"]))
    for name, found in rows.items():
        print(f"{name:14}" + "".join(f"{255 * value:12.4f}" for value in found.values()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    small = torch.rand(given.images, 3, 8, 8)
    smooth = torch.nn.functional.interpolate(small, (given.size, given.size), mode="bicubic")
    images = (smooth.clamp(0, 1) * 255).to(torch.uint8)
    as_pil = [TF.to_pil_image(image) for image in images]
    on_device, draws = images.to(given.device), torch.Generator().manual_seed(0)
    table = augment.draw_views(EPOCH, given.size, given.size, given.size, draws).to(given.device)
    rows = torch.randint(0, EPOCH, (given.images,)).to(given.device)
    on_pil = pil_views(given.size)
    candidates = {
        "this project": lambda: augment.apply_views(on_device, table[rows]),
        "with draws": lambda: augment.random_views(on_device, given.size, draws),
        "PIL, 1 process": lambda: on_pil(as_pil),
    }
    if kornia:
        by_kornia = kornia_views(given.size)
        candidates[f"kornia {kornia.__version__}"] = lambda: by_kornia(on_device)
    else:
        print("kornia is not importable: left out")

    times = measure(candidates, given.rounds, given.device)
    medians = {name: statistics.median(series) for name, series in times.items()}
    shape = f"{given.images} views of {given.size} x {given.size}"
    print(f"{shape}, {given.device}, {torch.get_num_threads()} CPU threads, {given.rounds} rounds")
    print(f"{'':16}{'median ms':>12}{'fastest ms':>12}{'views/s':>12}{'time / first':>13}")
    for name, median in medians.items():
        rate, ratio = given.images / median * 1000, median / medians["this project"]
        print(f"{name:16}{median:12.1f}{min(times[name]):12.1f}{rate:12.0f}{ratio:13.1f}")

    epoch = {"draws": lambda: augment.draw_views(EPOCH, given.size, given.size, given.size, draws)}
    print(f"the table of {EPOCH:,} views: {statistics.median(measure(epoch, 5, given.device)['draws']):.1f} ms")

    noise = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    print_agreement("noise of 32 x 32, crops mostly enlarged", noise)
    print_agreement("noise of 96 x 96, crops mostly reduced", torch.randint(0, 256, (64, 3, 96, 96), dtype=torch.uint8))


if __name__ == "__main__":
    main()
