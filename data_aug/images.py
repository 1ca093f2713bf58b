"""Images as training, victims and attackers read them: in memory (`Stored`) or read when needed (`Streamed`).

    images = Stored(load_dataset("cifar10")[0]).to(device)
    images = Streamed(Views(open_pictures("imagenet", root, "train"), "crop", 224, seed=0), positions, workers=8)
    for batch in images.batches(order.split(256), device):
        ...  # batch.images: uint8 (B, 3, H, W) on the device

A streamed view follows from (seed, purpose, epoch, position), whatever the worker, the batch and the order: the views
that a victim answered can be made again, to be shown to the copy. Nothing here knows of other processes: a caller that
is one of several passes `share`, which says which rows of a batch it reads.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data_aug.augment import FLIP_RATE, check_images, draw_boxes
from data_aug.datasets import check_name, load_dataset
from data_aug.folders import class_files, folder_files, read_picture
from data_aug.workers import Item, stream
from settings import Settings, setting
from utils import UserError, generator

VIEWS = ("crop", "center")
_IMAGENET = {"train": "train", "test": "val"}


@dataclass(frozen=True)
class Loading(Settings):
    """How images that are not in memory are read."""

    workers: int = setting(8, "data-loading workers per process", at_least=0, flags=("-j", "--workers"), named=False)
    title = "data"


# ---- batches ---------------------------------------------------------------------------------------------------------


def picture_name(text: str) -> str:
    """The name of a data set whose images may be of any size: as `check_name`, and imagenet."""
    return check_name(text, "imagenet")


class Batch(NamedTuple):
    """A batch of a job.

    index: int64 (B,), which images the whole job's batch has. local: int64 (b,), this process's share of these. images:
    uint8 (b, 3, H, W), the images at `local`. All are on the device.
    """

    index: Tensor
    local: Tensor
    images: Tensor


def whole(count: int) -> slice:
    """The share of a process that is alone: all rows of a batch."""
    return slice(count)


class Images(ABC):
    """N images of one size, in memory or streamed."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""

    @property
    def view_side(self) -> int:
        """The side of random views of the images, in pixels."""
        return self.size[1]

    @abstractmethod
    def __getitem__(self, index: slice | Tensor) -> Self:
        """Some of the images, in the order of the index."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same images, on the device as far as they are in memory."""

    @abstractmethod
    def _read(self, parts: Sequence[Tensor], device: torch.device, epoch: int) -> Iterator[Tensor]:
        """The images at the indices of each part, int64 (b,): uint8 (b, 3, H, W) on the device."""

    def batches(
        self,
        index: Sequence[Tensor],
        device: torch.device,
        epoch: int = 0,
        share: Callable[[int], slice] = whole,
    ) -> Iterator[Batch]:
        """The batches of images at these indices, int64 (B,) each on any device.

        epoch: streamed views may differ between epochs. share: from a batch's size to this process's rows of it.
        Workers end when the iterator is closed or exhausted.
        """
        if not index:
            return
        local = [part[share(len(part))] for part in index]
        with contextlib.closing(self._read(local, device, epoch)) as read:
            for batch, images in zip(_moved(index, device), read, strict=True):
                yield Batch(batch, batch[share(len(batch))], images)


@dataclass(frozen=True, eq=False)
class Stored(Images):
    """Images in memory, uint8 (N, 3, H, W), on the device that the tensor is on. ValueError for other tensors.

    side: of their random views, by default the images' width.
    """

    tensor: Tensor
    side: int | None = None

    def __post_init__(self) -> None:
        check_images(self.tensor)

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.tensor.shape[2:])

    def __getitem__(self, index: slice | Tensor) -> "Stored":
        """As `Images`; a slice shares memory."""
        return Stored(self.tensor[index], self.side)

    @property
    def view_side(self) -> int:
        return self.side or self.size[1]

    def to(self, device: torch.device | str) -> "Stored":
        return Stored(self.tensor.to(device), self.side)

    def _read(self, parts: Sequence[Tensor], device: torch.device, epoch: int) -> Iterator[Tensor]:
        return (self.tensor[rows].to(device) for rows in _moved(parts, self.tensor.device))


@dataclass(frozen=True, eq=False)
class Streamed(Images):
    """Images that are read when they are needed: the views at `positions` (N,), made by `workers` processes."""

    views: "Views"
    positions: Tensor
    workers: int

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def size(self) -> tuple[int, int]:
        return self.views.size, self.views.size

    def __getitem__(self, index: slice | Tensor) -> "Streamed":
        return Streamed(self.views, self.positions[index], self.workers)

    def to(self, device: torch.device | str) -> "Streamed":
        return self

    def _read(self, parts: Sequence[Tensor], device: torch.device, epoch: int) -> Iterator[Tensor]:
        # Copied before the first batch: later, reading an index would wait for the device's steps.
        positions = [self.positions[rows].tolist() for rows in _moved(parts, self.positions.device)]
        items = ([(position, epoch) for position in part] for part in positions)
        return stream(self.views, items, self.workers, device)


def as_images(x: Tensor | Images) -> Images:
    """Images as they are; a tensor, uint8 (N, 3, H, W), as `Stored`."""
    return Stored(x) if isinstance(x, Tensor) else x


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for it to arrive."""
    # Only from pinned memory does a copy to CUDA return before it is done.
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _moved(index: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """The index tensors on a device, copied there together."""
    return torch.cat([*index]).to(device).split([len(part) for part in index])


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pictures(ABC):
    """Images of any size, read by position: `pictures[i]` is a PIL image in RGB. See `open_pictures`.

    labels: int64 (N,) on the CPU, -1 for an image without a class.
    """

    name: str
    split: str
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, position: int) -> Image.Image:
        """The image at a position. UserError when it can't be read."""

    @property
    def classes(self) -> int:
        """The number of classes: the largest label + 1, so 0 without labels."""
        return int(self.labels.max()) + 1


@dataclass(frozen=True, eq=False)
class _Files(Pictures):
    # The names are an array of bytes: reading a string of a list changes its reference count, so that forked workers
    # would copy the memory around it until each of them had the whole list of a million names.
    folder: Path
    names: np.ndarray

    def __getitem__(self, position: int) -> Image.Image:
        return read_picture(self.folder / os.fsdecode(self.names[position]))


@dataclass(frozen=True, eq=False)
class _InMemory(Pictures):
    images: Tensor  # uint8 (N, 3, H, W); workers share a tensor's memory, whether they are forked or started anew

    def __getitem__(self, position: int) -> Image.Image:
        return Image.fromarray(self.images[position].permute(1, 2, 0).numpy())


def open_pictures(name: str, root: str | Path, split: str) -> Pictures:
    """The images of a data set's split in their original sizes. Files are read when an image is asked for.

    `imagenet` is <root> or <root>/imagenet with train/<class>/ and, for the split `test`, val/<class>/. The other names
    are those of `data_aug.datasets.load_dataset`; apart from `folder:PATH` their images are all in memory. UserError
    when the data cannot be had.
    """
    name = check_name(name, "imagenet")
    form, _, path = name.partition(":")
    if name == "imagenet":
        folder, names, labels = _imagenet(Path(root), split)
    elif form == "folder":
        folder, names, labels = folder_files(Path(os.path.expanduser(path)), split)
    else:
        images, labels = load_dataset(name, root, split, size=None)
        return _InMemory(name, split, labels, images)
    return _Files(name, split, labels, folder, np.array([os.fsencode(name) for name in names]))


def _imagenet(root: Path, split: str) -> tuple[Path, list[str], Tensor]:
    base = root if any((root / name).is_dir() for name in _IMAGENET.values()) else root / "imagenet"
    place = base / _IMAGENET[split]
    if not place.is_dir():
        raise UserError(
            f"no ImageNet: no folder {place}; name with --data a folder that has, itself or in a sub-folder imagenet, "
            f"train/ and val/ with a sub-folder of images for each class"
        )
    return class_files([place], base / "train")


# ---- views -----------------------------------------------------------------------------------------------------------


class Views(Dataset):
    """Views uint8 (3, size, size) of pictures, by position or by (position, epoch); a position alone is epoch 0.

    crop    a random resized crop, mirrored half of the time, drawn from (seed, purpose, epoch, position)
    center  the usual view of evaluation: the shorter side resized to size * 256 / 224, the centre cut out. Of an image
            that is smaller than the view the whole centre square is resized, since cutting its borders loses content

    Pixels are those of torchvision's transforms of PIL images, bilinear. UserError when an image can't be read.
    """

    def __init__(self, pictures: Pictures, view: str, size: int = 224, seed: int = 0, purpose: str = "query view"):
        if view not in VIEWS or size < 1:
            raise ValueError(f"no view {view!r} of size {size}: {', '.join(VIEWS)} of at least one pixel")
        self.pictures, self.view, self.size = pictures, view, size
        self.seed, self.purpose = seed, purpose

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, item: Item) -> Tensor:
        position, epoch = item if isinstance(item, tuple) else (item, 0)
        picture = self.pictures[int(position)]
        if self.view == "center":
            view = _centre(picture, self.size)
        else:
            view = _crop(picture, self.size, generator(self.seed, self.purpose, int(epoch), int(position)))
        return torch.from_numpy(np.array(view)).permute(2, 0, 1)


def _crop(picture: Image.Image, size: int, draws: torch.Generator) -> Image.Image:
    top, left, height, width = draw_boxes(1, picture.height, picture.width, draws)[0].tolist()
    # Cut first: resize(box=...) would let pixels from outside the box into its border.
    view = picture.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    flip = torch.rand((), generator=draws) < FLIP_RATE
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view


def _centre(picture: Image.Image, size: int) -> Image.Image:
    short = min(picture.size)
    if short < size:
        return _centre_square(picture, short).resize((size, size), Image.Resampling.BILINEAR)
    sides = [size * 256 // 224 * side // short for side in picture.size]
    return _centre_square(picture.resize(sides, Image.Resampling.BILINEAR), size)


def _centre_square(picture: Image.Image, side: int) -> Image.Image:
    left, top = (round((extent - side) / 2) for extent in picture.size)
    return picture.crop((left, top, left + side, top + side))
