"""Users' images in npz files. Names, types, shapes and sizes are checked before memory is taken."""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_aug.folders import resize
from files.reading import reading
from utils import UserError

# Images and labels are called x_train and y_train, or as in MedMNIST's and others' files, in capitals or not.
_NAMES = (("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("{}_x", "{}_y"))
_SPLITS = {"test": ("test", "val", "valid", "validation")}
SMALL, MOST_SWELLING = 64 * 2**20, 200  # bytes of an array that any archive may have, and times its compressed size


def load_npz(path: Path, split: str, size: int | None) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, size, size) and labels int64 (N,) of a split, -1 for an image without a label.

    Images are uint8 (N, H, W[, C]) or (N, C, H, W) of 1 or 3 channels. Labels are integers (N,) or (N, 1), numbered by
    the order of the training split's; see `_number`. UserError names what is wrong with the file.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: npz:PATH wants arrays x_train, y_train, x_test, y_test")
    with reading(path, "an npz file of plain arrays"):
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise UserError(f"{path} is a single array (npy): store x_train, y_train, ... by np.savez")
        with zipfile.ZipFile(path) as archive:
            images_member, labels_member = _find(archive, split)
            images = _read_images(archive, path, images_member, split)
            labels = _read_labels(archive, path, labels_member, len(images))
            known = labels if split == "train" else _read_labels(archive, path, _find(archive, "train")[1])
    return to_images(images, size), _number(labels, known, f"{path}, {split} split")


def to_images(array: np.ndarray, size: int | None) -> Tensor:
    """Images uint8 (N, 3, size, size) from an array (N, H, W[, C]) or (N, C, H, W) of 1 or 3 channels.

    Grey images of 28 x 28 get a black frame before they are resized. Without a size, they are left as they are.
    """
    images = torch.from_numpy(array)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.shape[1] == 1:
        if size is not None and images.shape[2:] == (28, 28):
            images = F.pad(images, [2] * 4)  # keeps digits sharp where resizing would blur them
        images = images.expand(-1, 3, -1, -1)
    return resize(images.contiguous(), size)


def _find(archive: zipfile.ZipFile, split: str) -> tuple[str | None, str | None]:
    """The members of the archive that have a split's images and their labels, None for what is not there.

    Of several arrays for the test split, the first with labels are taken: some publish test images without labels.
    """
    names = {name.removesuffix(".npy"): name for name in archive.namelist()}
    members = {name.lower(): member for name, member in names.items()} | names
    words = _SPLITS.get(split, (split,))
    pairs = [tuple(members.get(name.format(word)) for name in pair) for word in words for pair in _NAMES]
    found = [pair for pair in pairs if pair[0]]
    return next((pair for pair in found if pair[1]), found[0] if found else (None, None))


def _read_images(archive: zipfile.ZipFile, path: Path, member: str | None, split: str) -> np.ndarray:
    def check(shape: tuple, dtype: np.dtype) -> str | None:
        grey = len(shape) == 3 and shape[-1] != 3
        coloured = len(shape) == 4 and (shape[-1] in (1, 3) or shape[1] in (1, 3))
        return None if dtype == np.uint8 and (grey or coloured) else "uint8 (N, H, W, 3) is needed, of 0 to 255"

    if member is None:
        there = ", ".join(f"{name!r}" for name in archive.namelist()[:12])[:300] or "none"
        raise UserError(
            f"{path} has no array x_{split}, its arrays are {there}: call the images x_{split} and labels y_{split}"
        )
    images = _read(archive, member, path, check)
    if not images.size:
        raise UserError(f"{path}: {member} has no images, or images without pixels: its shape is {images.shape}")
    return images


def _read_labels(archive: zipfile.ZipFile, path: Path, member: str | None, count: int | None = None) -> np.ndarray:
    """Integers (N,), -1 for all images where there is no member. `count`: how many there have to be."""

    def check(shape: tuple, dtype: np.dtype) -> str | None:
        fits = dtype.kind in "iu" and (len(shape) == 1 or shape[1:] == (1,)) and count in (None, shape[0])
        if fits:
            return None
        images = "the" if count is None else count
        return f"one integer for each of {images} images is needed: y.astype(int), or y.argmax(1) of a row for each"

    return np.full(count or 0, -1) if member is None else _read(archive, member, path, check).reshape(-1)


def _read(
    archive: zipfile.ZipFile, member: str, path: Path, check: Callable[[tuple, np.dtype], str | None]
) -> np.ndarray:
    """An array whose declared shape and type pass the check, and whose size is that of its bytes."""
    info = archive.getinfo(member)
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        wanted = check(shape, dtype)
        if wanted:
            raise UserError(f"{path}: {member} is {dtype} {shape}"[:200] + f", {wanted}")
        declared, there = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
    packed = min(info.compress_size, path.stat().st_size)
    if min(shape) < 0 or declared != there:
        raise UserError(f"{path}: {member} is broken, its shape {str(shape)[:60]} does not fit its {there} bytes")
    if declared > max(SMALL, MOST_SWELLING * packed):
        raise UserError(f"{path}: {member} would swell from {packed:,} to {declared:,} bytes: store it by np.savez")
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _number(labels: np.ndarray, known: np.ndarray, where: str) -> Tensor:
    """Labels int64 (N,) in 0..C-1, by the order of the C labels in `known`. UserError for a label that it lacks.

    -1 is for images without a label, unless there are lower labels: then it is a class as others.
    """
    unique, inverse = np.unique(labels, return_inverse=True)
    # Python's integers: numpy compares signed and unsigned integers of 64 bits as floats.
    values, classes = unique.tolist(), np.unique(known).tolist()
    if set(classes) <= {-1}:  # training images have no labels
        classes = values
    number = {}
    if classes[0] >= -1:
        classes, number = [value for value in classes if value != -1], {-1: -1}
    number |= {value: i for i, value in enumerate(classes)}
    lacking = [value for value in values if value not in number]
    if lacking:
        shown = ", ".join(map(str, lacking[:5])) + ", ..." * (len(lacking) > 5)
        raise UserError(f"{where}: no training image has the label {shown}: use the training split's labels")
    return torch.tensor([number[value] for value in values])[torch.from_numpy(inverse)]
