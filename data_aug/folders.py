"""Users' own images: files in a folder, or in a sub-folder for each class, and perhaps for each split."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils import UserError, generator


def load_folder(folder: Path, split: str, size: int | None) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, size, size) and labels int64 (N,) of a split of a folder; see `folder_files`.

    The centre square of each image is resized. ValueError without a size, since the files may have different ones.
    """
    if size is None:
        raise ValueError(f"the images in {folder} have no size in common: data_aug.images reads them one by one")
    place, names, labels = folder_files(folder, split)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        images = list(pool.map(lambda name: _read_square(place / name, size), names))
    return torch.stack(images), labels


def folder_files(folder: Path, split: str) -> tuple[Path, list[str], Tensor]:
    """The files of a split: their folder, the N names below it, and labels int64 (N,), -1 where there are no classes.

    Images are in `folder`/<class>/, or in `folder`/train/<class>/ and `folder`/{test,val}/<class>/. Without folders for
    the splits, a tenth of each class, drawn by a fixed seed, is the test split. Without folders for the classes, the
    images in the folder itself are used. UserError when there are none.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: folder:PATH wants a folder of images or of class sub-folders")
    if (folder / "train").is_dir():
        places = {name: folder / name for name in ("train", "test", "val") if (folder / name).is_dir()}
        wanted = ("train",) if split == "train" else ("test", "val")
        place = next((places[name] for name in wanted if name in places), None)
        if place is None:
            raise UserError(f"{folder} has a sub-folder train but none of {', '.join(wanted)}")
        return place, *image_files(place, *places.values())
    names, labels = image_files(folder)
    test = torch.zeros(len(names), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator(0, "folder split"))
        test[members[order[: len(members) // 10]]] = True
    chosen = (test == (split == "test")).nonzero()[:, 0]
    if len(chosen) == 0:
        raise UserError(
            f"no images for the {split} split below {folder}: a tenth of each class is held out for the test"
        )
    return folder, [names[i] for i in chosen.tolist()], labels[chosen]


def image_files(folder: Path, *splits: Path) -> tuple[list[str], Tensor]:
    """Names of the N images below a folder, class by class, and their labels int64 (N,), -1 without class sub-folders.

    Classes are numbered over the sub-folders of this folder and of the data set's other `splits`, so that all splits
    number them alike even if one lacks a class. No file is opened. UserError when there are no images.
    """
    endings = Image.registered_extensions()

    def images(below: str, deep: bool = True) -> Iterator[str]:
        # A listing says what is a folder. Asking about each of a million files would take minutes.
        with os.scandir(folder / below) as entries:
            for entry in entries:
                name = os.path.join(below, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    yield from images(name) if deep else ()
                elif os.path.splitext(name)[1].lower() in endings:
                    yield name

    def in_order(names: Iterator[str]) -> list[str]:
        return sorted(names, key=lambda name: name.split(os.sep))

    classes = {place: {entry.name for entry in os.scandir(place) if entry.is_dir()} for place in (folder, *splits)}
    number = {name: i for i, name in enumerate(sorted(set().union(*classes.values())))}
    labelled = [(name, number[label]) for label in sorted(classes[folder]) for name in in_order(images(label))]
    found = labelled or [(name, -1) for name in in_order(images("", deep=False))]
    if not found:
        raise UserError(f"no images below {folder}: images are wanted there, or a sub-folder of images for each class")
    names, labels = zip(*found, strict=True)
    return list(names), torch.tensor(labels)


def read_picture(path: Path) -> Image.Image:
    """The image in a file, converted to RGB. UserError naming the file when it can't be read."""
    try:
        with Image.open(path) as file:
            if file.mode.startswith("I;16"):  # 16-bit grey, which PIL would clip to white
                return file.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
            return file.convert("RGB")
    except Exception as error:  # broken files make PIL's decoders raise nearly anything
        raise UserError(f"{path} is not an image that can be read: {' '.join(str(error).split())[:120]}") from None


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
    parts = [F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True) for part in images.split(1024)]
    return torch.cat([part.round_().clamp_(0, 255).to(torch.uint8) for part in parts])
