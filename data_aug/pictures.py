"""Images of any size that needn't fit in memory: a set of pictures, views of them, and a stream of batches of views.

    pictures = open_pictures("imagenet", Path("datasets"), "train")
    views = Views(pictures, "crop", size=224, seed=0)
    with contextlib.closing(stream(views, torch.arange(len(views)).split(256), workers=8, device=device)) as batches:
        for batch in batches:  # uint8 (B, 3, 224, 224) on the device

A view follows from (seed, purpose, epoch, position) and not from the worker, the batch or the order it is made in: what
the victim answered about can be made again to be shown to the copy.
"""

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data_aug.augment import FLIP_RATE, draw_boxes
from data_aug.datasets import check_name, folder_files, image_files, load_dataset, read_picture
from stopping import SIGNALS
from utils import UserError, generator

VIEWS = ("crop", "center")
Item = int | tuple[int, int]  # position, or position and epoch
_IMAGENET = {"train": "train", "test": "val"}


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pictures(ABC):
    """Images to be read by position: `pictures[i]` is a PIL image in RGB, of its own size. See `open_pictures`.

    labels int64 (N,) on the CPU, -1 for an image without a class.
    """

    name: str
    split: str
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, position: int) -> Image.Image:
        """The picture at a position. UserError when it can't be read."""

    @property
    def classes(self) -> int:
        """How many classes the labels tell apart: the largest label + 1, so 0 where there are none."""
        return int(self.labels.max()) + 1


@dataclass(frozen=True, eq=False)
class _Files(Pictures):
    # The names are one array of bytes: in a list of a million strings, each has a reference count, and reading one
    # would make a forked worker copy the memory around it until every worker had a list of its own.
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
    """The images of a data set's split in their own sizes, read when asked for where they are files.

    `imagenet` is <root> or <root>/imagenet with train/<class>/ and, for the split `test`, val/<class>/; `folder:PATH`,
    `npz:PATH` and the other names are those of `data_aug.datasets.load_dataset`, whose arrays are held in memory.
    UserError when the data cannot be had.
    """
    form, _, path = check_name(name, "imagenet").partition(":")
    if name == "imagenet":
        folder, names, labels = _imagenet(Path(root), split)
    elif form == "folder":
        folder, names, labels = folder_files(Path(path).expanduser(), split)
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
    splits = [base / name for name in _IMAGENET.values() if (base / name).is_dir()]
    return place, *image_files(place, *splits)


# ---- views -----------------------------------------------------------------------------------------------------------


class Views(Dataset):
    """Views uint8 (3, size, size) of pictures, by position or by (position, epoch); a position alone is epoch 0.

    crop    RandomResizedCrop and, for half of them, a horizontal flip, drawn from (seed, purpose, epoch, position)
    center  the usual view of evaluation: the shorter side resized to size * 256 / 224, the centre cut out. Of a picture
            that is smaller than the view the whole centre square is resized: cutting its borders off would lose content

    Pixels are those of torchvision's transforms of PIL images, bilinear. UserError when a picture can't be read.
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


# ---- batches ---------------------------------------------------------------------------------------------------------


def stream(
    views: Views, batches: Iterable[Tensor | list[Item]], workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Batches of views, uint8 (B, 3, size, size) on the device, in the order of `batches`.

    A batch is an int64 tensor (B,) of positions or a list of items of `views`. They are made ahead in so many worker
    processes, each with one thread; with 0 in this one. The workers end when the iterator is closed or exhausted.
    UserError when a picture can't be read or a worker dies.
    """
    items = (batch.tolist() if isinstance(batch, Tensor) else batch for batch in batches)
    loader = DataLoader(
        _Batches(views),
        batch_size=None,  # an item of _Batches is a batch already
        sampler=items,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # its workers' seeds would otherwise be drawn from the global one
    )
    iterator = _start(loader)
    try:
        while (batch := _next(iterator)) is not None:
            if isinstance(batch, UserError):
                raise batch
            # A copy also on the CPU: the shared memory that the batch came in is scarce, and free for the next one.
            yield batch.to(device, non_blocking=True, copy=True)
    finally:
        del iterator  # the last reference: the workers end here


def _leave_signals_to_the_parent(worker: int) -> None:
    """A scheduler signals all processes of a job; the parent has a step to finish first, and needs its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Batches(Dataset):
    """Batches of views by their lists of items. What the user can mend is returned, not raised: from a worker, torch
    would raise it with the worker's traceback for a message."""

    def __init__(self, views: Views):
        self.views = views

    def __getitem__(self, items: list[Item]) -> Tensor | UserError:
        batch = torch.empty(len(items), 3, self.views.size, self.views.size, dtype=torch.uint8)
        try:
            if get_worker_info() is not None:
                batch = _shared(batch)
            for row, item in zip(batch, items, strict=True):
                row.copy_(self.views[item])
        except UserError as error:
            return error
        return batch


def _shared(batch: Tensor) -> Tensor:
    # Here and not when the batch is sent, where torch does it otherwise: a failure there is never heard of.
    try:
        return batch.share_memory_()
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"no shared memory for a batch of views, lower --workers or --batch-size: {_first_line(error)}"
        ) from None


def _start(loader: DataLoader) -> Iterator[Tensor | UserError]:
    """The loader's iterator, with its workers started.

    They start with the signals to stop blocked: until a worker ignores them, one to the whole group would end it.
    torch's handler for a worker's death is taken away: it would raise in whatever line the main thread is at, the
    caller's too. Without it the death is found, seconds later, where the next batch is waited for.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return iter(loader)  # on Windows, which has none of these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        if threading.current_thread() is not threading.main_thread():
            return iter(loader)
        handler = signal.getsignal(signal.SIGCHLD)
        iterator = iter(loader)
        signal.signal(signal.SIGCHLD, handler)
        return iterator
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _next(iterator: Iterator[Tensor | UserError]) -> Tensor | UserError | None:
    """The next batch, None after the last. An error is returned, so that it doesn't hold on to the iterator."""
    try:
        return next(iterator, None)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        return UserError(
            f"a process that reads images died, of too little memory? Lower --workers: {_first_line(error)}"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120]
