"""Users' images: files in a folder, or in a sub-folder for each class, and perhaps for each split."""

import contextlib
import functools
import os
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from files.reading import reading
from utils import UserError, first_process, generator

# Raster formats that PIL decodes itself: for others it starts programs, or draws what a file describes.
_FORMATS = ("AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO")
_FORMATS += ("PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM")
_BITS_PER_SAMPLE = 258  # a tag of TIFF
MOST_PIXELS = 89_478_485  # of a picture; where PIL warns of a decompression bomb
CHUNK_VALUES = 2**24  # that are resized at a time
WORTH_ASKING = 2**28  # bytes of images, for which it is asked how much memory is free
_ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet
_TRAIN, _TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")  # in capitals or not


def load_folder(folder: Path, split: str, size: int | None) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, size, size) and labels int64 (N,) of a split of a folder; see `folder_files`.

    The centre square of each image is resized. ValueError without a size, since the files may have different ones.
    """
    if size is None:
        raise ValueError(f"the images in {folder} have no size in common: data_aug.images reads them one by one")
    place, names, labels = folder_files(folder, split)
    images = _empty(len(names), size)

    def read(position: int) -> None:
        images[position] = _read_square(place / names[position], size)

    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        list(pool.map(read, range(len(names))))
    return images, labels


# ---- which files -----------------------------------------------------------------------------------------------------


def folder_files(folder: Path, split: str) -> tuple[Path, list[str], Tensor]:
    """The files of a split: their folder, the N names below it, and labels int64 (N,), -1 where there are no classes.

    Images are in `folder`/<class>/, or in `folder`/train/<class>/ and `folder`/{test,val,...}/<class>/. Without folders
    for the splits, a tenth of each class, drawn by a fixed seed, is the test split. Without folders for the classes,
    the images in the folder itself are used. UserError when there are none.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: folder:PATH wants a folder of images or of class sub-folders")
    spelled = {name.lower(): name for name in _sub_folders(folder) if name.lower() in _TRAIN + _TEST}
    if spelled:
        train, test = ([folder / spelled[word] for word in words if word in spelled] for words in (_TRAIN, _TEST))
        if not train:
            raise UserError(f"{folder} has a sub-folder {test[0].name} but none of train: rename it if it is a class")
        if split != "train" and not test:
            raise UserError(f"{folder} has a sub-folder {train[0].name} but none of {', '.join(_TEST)}")
        return class_files(train if split == "train" else test, train[0])
    _, names, labels = class_files([folder], folder)
    in_test = torch.zeros(len(names), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator(0, "folder split"))
        in_test[members[order[: len(members) // 10]]] = True
    chosen = (in_test == (split == "test")).nonzero()[:, 0]
    if len(chosen) == 0:
        raise UserError(
            f"no images for the {split} split below {folder}, which is a tenth of each class: sort them into {folder}/"
            f"train and {folder}/test, or have 10 images of a class"
        )
    return folder, [names[i] for i in chosen.tolist()], labels[chosen]


def class_files(places: Sequence[Path], train: Path) -> tuple[Path, list[str], Tensor]:
    """As `folder_files`, from the first of the places that has a class of the folder `train`, else the first.

    Classes are numbered by the order of their names in `train`. No picture is opened. UserError for a class of which
    `train` has no picture.
    """
    classes = _sub_folders(train) if train.is_dir() else []
    place = next((place for place in places if set(_sub_folders(place)) & set(classes)), None)
    annotated = next((place for place in places if (place / _ANNOTATIONS).is_file()), None)
    if place is None and annotated:
        return annotated, *_annotated_files(annotated, classes)
    place = place or places[0]
    number = {name: i for i, name in enumerate(classes or _sub_folders(place))}
    names, labels = [], []
    flat, others = _pictures(place, "", deep=False)
    for label in _sub_folders(place):
        found, more = _pictures(place, label)
        if found and (label not in number or (classes and place != train and not _pictures(train, label)[0])):
            raise UserError(_lacking(place, label, train, classes))
        names += found
        labels += [number[label]] * len(found) if found else []
        others += more
    if names:
        others += len(flat)
    else:
        names, labels = flat, [-1] * len(flat)
    if not names:
        raise UserError(f"no images below {place}: images are wanted there, or a sub-folder of images for each class")
    if others and first_process():
        print(f"{place}: {others} files that are no pictures, or in no class, are skipped")
    return place, names, torch.tensor(labels)


def _annotated_files(place: Path, classes: list[str]) -> tuple[list[str], Tensor]:
    """The files of Tiny-ImageNet's val/, and their labels by its file of lines "name <tab> class <tab> box"."""
    with reading(place / _ANNOTATIONS, "Tiny-ImageNet's list of files and classes"):
        rows = [line.split("\t") for line in (place / _ANNOTATIONS).read_text().splitlines()]
        if not rows:
            raise ValueError("it is empty")
        return [os.path.join("images", row[0]) for row in rows], torch.tensor([classes.index(row[1]) for row in rows])


def _lacking(place: Path, label: str, train: Path, classes: list[str]) -> str:
    alike = [name for name in classes if name != label and _folded(name) == _folded(label)]
    if alike:
        return f"{place / label} and {train / alike[0]} differ by case only: rename one of them"
    if label in classes:
        return f"{train / label} has no images, {place / label} has: add images to train, or remove these"
    return f"{place / label} is no class of {train}: sort its images into sub-folders named as those, or remove it"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, by name. Names that begin with a dot, and what macOS adds to archives, are no data."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    return sorted(shown, key=lambda entry: entry.name)


def _sub_folders(folder: Path) -> list[str]:
    """The names of the sub-folders, in order. UserError for two that differ by case only."""
    names, spelled, real = [], {}, os.path.realpath(folder)
    for entry in _entries(folder):
        if _is(entry.is_dir) and not (entry.is_symlink() and _lies_in(real, os.path.realpath(entry.path))):
            names.append(entry.name)
    for name in names:
        if spelled.setdefault(_folded(name), name) != name:
            raise UserError(f"{folder / spelled[_folded(name)]} and {folder / name} differ by case only: rename one")
    return names


def _lies_in(folder: str, other: str) -> bool:
    """Whether a folder is below another, or the same; by their paths without links."""
    return os.path.join(folder, "").startswith(os.path.join(other, ""))


def _is(question: Callable[[], bool]) -> bool:
    """The answer to entry.is_dir or entry.is_file, which follow links. No, for a link to itself."""
    with contextlib.suppress(OSError):
        return question()
    return False


def _pictures(place: Path, below: str, deep: bool = True) -> tuple[list[str], int]:
    """The names of the pictures in a sub-folder, in the order of their paths, and the number of other files.

    Links to folders are followed, each folder once, but for those to a folder that they are in.
    """
    names, others, endings = [], 0, _formats()[1]
    left, links, seen = [], [below], {os.path.realpath(place)} if below else set()
    while left or links:
        linked = not left
        here = (left or links).pop()
        real = os.path.realpath(place / here)
        if real in seen or (linked and any(_lies_in(known, real) for known in seen)):
            continue
        seen.add(real)
        # A listing says what is a folder. Asking about each of a million files would take minutes.
        for entry in _entries(place / here):
            name = os.path.join(here, entry.name)
            if _is(entry.is_dir):
                if deep:
                    (links if entry.is_symlink() else left).append(name)
            elif os.path.splitext(name)[1].lower() in endings and _is(entry.is_file):
                names.append(name)
            else:
                others += 1
    return sorted(names, key=lambda name: name.split(os.sep)), others


# ---- pictures --------------------------------------------------------------------------------------------------------


@functools.cache
def _formats() -> tuple[list[str], set[str]]:
    """The formats of _FORMATS that this build of PIL has, and the endings of their files."""
    endings = {ending for ending, form in Image.registered_extensions().items() if form in _FORMATS}
    return [form for form in _FORMATS if form in Image.OPEN], endings


def read_picture(path: Path) -> Image.Image:
    """The image in a file, converted to RGB; it is not turned as its EXIF data say. UserError when it can't be read."""
    warnings.filterwarnings("ignore", module="PIL")
    try:
        with Image.open(path, formats=_formats()[0]) as file:
            if file.width * file.height > MOST_PIXELS:
                raise ValueError(f"{file.width} x {file.height} pixels are more than {MOST_PIXELS:,}, shrink it")
            return in_rgb(file)
    except Exception as error:  # broken files make PIL's decoders raise nearly anything
        raise UserError(f"{path} is not an image that can be read: {' '.join(str(error).split())[:120]}") from None


def in_rgb(file: Image.Image) -> Image.Image:
    """An image that PIL has opened, decoded to RGB. ValueError for pixels of unknown range; PIL raises many errors."""
    if file.mode.startswith("I;16") or (file.mode, file.format) == ("I", "PPM"):
        # 16 bits of grey, which PIL would clip to white. A TIFF may have 12 bits, which are not scaled to 16.
        bits = file.tag_v2[_BITS_PER_SAMPLE][0] if file.format == "TIFF" else 16
        return Image.fromarray((np.asarray(file) >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if file.mode == "F" and np.min(file) >= 0 and np.max(file) <= 1:
        return Image.fromarray((np.asarray(file) * 255).round().astype(np.uint8)).convert("RGB")
    if file.mode in ("I", "F"):
        raise ValueError("the range of its 32-bit pixels is not known, store 8 or 16 bits, or floats to 1")
    return file.convert("RGB")


def _read_square(path: Path, size: int) -> Tensor:
    """The centre square of an image, uint8 (3, size, size)."""
    image = torch.from_numpy(np.array(read_picture(path))).permute(2, 0, 1)
    side = min(image.shape[-2:])
    top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
    return resize(image[None, :, top : top + side, left : left + side], size)[0]


def resize(images: Tensor, size: int | None) -> Tensor:
    """Images uint8 (N, 3, H, W) resized to size x size with antialiasing; as they are where `size` is None."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    resized = _empty(len(images), size)
    step = max(1, CHUNK_VALUES // images[0].numel())
    for part, target in zip(images.split(step), resized.split(step), strict=True):
        views = F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        target.copy_(views.round_().clamp_(0, 255))
    return resized


def _empty(count: int, size: int) -> Tensor:
    """Room for uint8 images (count, 3, size, size). UserError where they would take over half of the free memory."""
    wanted = 3 * count * size**2
    free = free_memory() if wanted > WORTH_ASKING else None
    if free is not None and wanted > free / 2:
        raise UserError(
            f"{count:,} images of {size} x {size} pixels take {wanted / 2**30:.1f} GiB, more than half of the "
            f"{free / 2**30:.1f} GiB of free memory: give a smaller --size or fewer images, or use stealsimsiam.py and "
            f"linsimsiam.py, which read images when they need them"
        )
    return torch.empty(count, 3, size, size, dtype=torch.uint8)


def free_memory() -> int | None:
    """Bytes that programs can have without swapping, as Linux estimates it; None elsewhere."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return None
