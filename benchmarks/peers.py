"""The same work by other software: the classic way with PIL, lightly, kornia, torchvision v2.

All of them get the settings of this project's SimCLR views, except lightly, which gets its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from benchmarks.timing import peer
from data_aug.recipes import VIEW_RECIPES
from loss import nt_xent
from models import build_encoder

SIMCLR = VIEW_RECIPES["simclr"]
JITTER = dict(zip(("brightness", "contrast", "saturation", "hue"), SIMCLR.jitter, strict=True))
OPERATIONS = ("crop", "flip", "jitter", "grey", "blur")

Views = Callable[[Tensor], Tensor]  # uint8 (N, 3, H, W) -> float (N, 3, size, size)


class Pictures(Dataset):
    """What `make` makes of each PIL picture of uint8 images (N, 3, H, W)."""

    def __init__(self, images: Tensor, make: Callable[[Image.Image], Any]):
        self.pictures, self.make = images.permute(0, 2, 3, 1).numpy(), make

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.make(Image.fromarray(self.pictures[index]))


class Twice:
    """Two random views of a picture."""

    def __init__(self, view: Callable[[Image.Image], Tensor]):
        self.view = view

    def __call__(self, picture: Image.Image) -> list[Tensor]:
        return [self.view(picture), self.view(picture)]


def loader(data: Dataset, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """Batches as a long training reads them: its workers stay, so that their start is no part of a step."""
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
    return DataLoader(data, batch_size, shuffle=True, drop_last=True, **options)


# ---- training --------------------------------------------------------------------------------------------------------


def classic_training(
    arch: str, images: Tensor, batch_size: int, device: torch.device, workers: int = 2
) -> Callable[[], None]:
    """A function that trains another epoch the classic way: PIL views in workers, float32, NCHW, Adam."""
    model = build_encoder(arch, out_dim=128).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, weight_decay=1e-4)
    batches = loader(Pictures(images, Twice(pil_view())), batch_size, workers, device)

    def epoch() -> None:
        for views in batches:
            loss = nt_xent(model.project(torch.cat(views).to(device, non_blocking=True)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def lightly_training(
    arch: str, images: Tensor, batch_size: int, device: torch.device, workers: int = 2
) -> Callable[[], None]:
    """A function that trains another epoch as lightly's SimCLR example does, with this project's network.

    Its views for images of 32 pixels (which are not blurred), its loss, SGD, float32, a forward pass for each view.
    """
    make_views = peer("lightly.transforms").SimCLRTransform(input_size=images.shape[-1], gaussian_blur=0.0)
    criterion = peer("lightly.loss").NTXentLoss()
    model = build_encoder(arch, out_dim=128).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    batches = loader(Pictures(images, make_views), batch_size, workers, device)

    def epoch() -> None:
        for first, second in batches:
            one, other = (model.project(views.to(device, non_blocking=True)) for views in (first, second))
            loss = criterion(one, other)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


# ---- views -----------------------------------------------------------------------------------------------------------


def kernel(size: int) -> int:
    """Taps of the blur that SimCLR gives to views of this size: a tenth of it, odd."""
    return 2 * (int(0.1 * size) // 2) + 1


def _by_torchvision(library, size: int, **crop: bool) -> dict[str, Callable]:
    return {
        "crop": library.RandomResizedCrop(size, SIMCLR.crop_area, SIMCLR.crop_ratio, **crop),
        "flip": library.RandomHorizontalFlip(SIMCLR.flip_rate),
        "jitter": library.RandomApply([library.ColorJitter(**JITTER)], SIMCLR.jitter_rate),
        "grey": library.RandomGrayscale(SIMCLR.grey_rate),
        "blur": library.GaussianBlur(kernel(size), SIMCLR.blur_sigma),
    }


def pil_view(size: int = 32, only: str | None = None) -> Callable:
    """A random view of a PIL image, or one operation of it."""
    parts = _by_torchvision(transforms, size)
    return transforms.Compose([*([parts[only]] if only else parts.values()), transforms.ToTensor()])


def batched_torchvision_views(size: int, only: str | None = None) -> Views:
    """Views by torchvision's second version of a whole batch, for which it draws a single set of choices."""
    parts = _by_torchvision(v2, size, antialias=True)
    view = v2.Compose([parts[only]] if only else [*parts.values()])
    return lambda images: view(images.float() / 255)


def kornia_views(size: int, only: str | None = None, compiled: bool = False) -> Views:
    """Views by kornia: choices for each image, but one order of the colour operations for the whole batch."""
    library, taps = peer("kornia.augmentation"), kernel(size)
    parts = {
        "crop": library.RandomResizedCrop((size, size), SIMCLR.crop_area, SIMCLR.crop_ratio, align_corners=False),
        "flip": library.RandomHorizontalFlip(p=SIMCLR.flip_rate),
        "jitter": library.ColorJitter(**JITTER, p=SIMCLR.jitter_rate),
        "grey": library.RandomGrayscale(p=SIMCLR.grey_rate),
        "blur": library.RandomGaussianBlur((taps, taps), SIMCLR.blur_sigma, p=1.0),
    }
    view = nn.Sequential(*([parts[only]] if only else parts.values()))
    made = torch.compile(view) if compiled else view
    return lambda images: made(images.float() / 255)
