"""Any data set as uint8 images and int64 labels, whole in memory. A new data set is one row in DATASETS.

    python -m data_aug.datasets --export cifar10 -data ./datasets

writes ./datasets/cifar10.npz, the form for machines without internet.
"""

import argparse
import contextlib
import io
import os
import socket
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_aug.shapes import make_shapes, make_textures
from stopping import script
from utils import UserError, atomic_path, generator

SIZE = 32  # every data set comes as SIZE x SIZE images, unless another size is asked for
HELD_OUT = 1000  # test images that an attacker of the victim's own data set never queries
DOWNLOAD_TIMEOUT = 30  # seconds of silence after which a data host counts as unreachable


@dataclass(frozen=True)
class _Published:
    """A torchvision data set: its class, its folder below the data root, its arguments for each split."""

    class_name: str
    folder: str
    splits: Mapping[str, dict]

    def load(self, name: str, root: Path, split: str, size: int | None) -> tuple[Tensor, Tensor]:
        import torchvision  # here, because it takes seconds and most runs read an npz file or make their data

        arguments = self.splits[split]
        constructor = getattr(torchvision.datasets, self.class_name)
        for place in (root / self.folder, root):
            with contextlib.suppress(RuntimeError, OSError):
                return _to_tensors(constructor(str(place), **arguments, download=False), size)
        place = root / self.folder
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            place.mkdir(parents=True, exist_ok=True)
            return _to_tensors(constructor(str(place), **arguments, download=True), size)
        except (RuntimeError, OSError) as error:
            with contextlib.suppress(OSError):
                place.rmdir()  # only if the download left nothing there
            raise UserError(
                f"no {name}: neither {root / name}.npz nor torchvision's files in {place} are there, and downloading "
                f"them failed ({str(error).splitlines()[0][:120]}); either run where there is internet, or put "
                f"{name}.npz there (`python -m data_aug.datasets --export {name}` makes it elsewhere), or give "
                f"--dataset folder:PATH with the images in class sub-folders"
            ) from None
        finally:
            socket.setdefaulttimeout(patience)


def _train_test(argument: str = "train", values: tuple = (True, False)) -> dict[str, dict]:
    return {"train": {argument: values[0]}, "test": {argument: values[1]}}


_NAMED = ("train", "test")
DATASETS = {
    "cifar10": _Published("CIFAR10", "", _train_test()),
    "cifar100": _Published("CIFAR100", "", _train_test()),
    "svhn": _Published("SVHN", "SVHN", _train_test("split", _NAMED)),
    "stl10": _Published(
        "STL10",
        "",
        {**_train_test("split", _NAMED), "unlabeled": {"split": "unlabeled"}},
    ),
    "mnist": _Published("MNIST", "", _train_test()),
    "fashionmnist": _Published("FashionMNIST", "", _train_test()),
    "shapes": make_shapes,
    "textures": make_textures,
}


def check_name(name: str, *more: str) -> str:
    """The name itself if it is one of `more` or such a data set can be loaded; UserError naming those that can."""
    form, _, path = name.partition(":")
    known = (*more, *DATASETS)
    if name not in known and not (form in FORMS and path):
        raise UserError(f"unknown data set {name!r}: choose from {', '.join(known)}, folder:PATH or npz:PATH")
    return name


def unlabelled_split(name: str) -> str:
    """The split that encoders are trained on: STL-10 has 100,000 images for it, elsewhere it is `train`."""
    return "unlabeled" if name == "stl10" else "train"


def load_dataset(
    name: str, root: str | Path = "datasets", split: str = "train", size: int | None = SIZE
) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, size, size) and labels int64 (N,) of a data set's split, on the CPU.

    `<root>/<name>.npz` is taken if it is there, else torchvision's files, downloaded when absent; `npz:PATH` is such a
    file elsewhere; `folder:PATH` reads the images in PATH's class sub-folders; `shapes` and `textures` are made. Images
    without a class, such as an attacker's, have the label -1. Other sizes are resized with antialiasing; with `size`
    None they stay as stored, which a folder's cannot: ValueError. UserError when the data cannot be had; it says what
    was sought where and how to provide it.
    """
    check_name(name)
    root = Path(root)
    form, _, path = name.partition(":")
    if form in FORMS:
        return FORMS[form](Path(path).expanduser(), split, size)
    source = DATASETS[name]
    if not isinstance(source, _Published):
        images, labels = source(split)
        return _resize(images, size), labels
    offline = root / f"{name}.npz"
    if offline.exists():
        return _load_npz(offline, split, size)
    return source.load(name, root, split, size)


def load_labelled(name: str, root: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """`load_dataset` for who needs the labels: UserError when the images have none."""
    images, labels = load_dataset(name, root, split)
    if (labels < 0).any():
        raise UserError(f"the {split} split of {name} has images without labels: choose another data set")
    return images, labels


def load_queries(name: str, victim_dataset: str, root: str | Path, force: bool = False) -> tuple[Tensor, Tensor, str]:
    """An attacker's images, uint8 (N, 3, H, W), their labels (N,) and the split they are from.

    Of the victim's own data set the attacker gets the test split without its last HELD_OUT images, which are kept for
    the evaluation; of another one, or with `force`, the split that encoders are trained on.
    """
    if name != victim_dataset or force:
        split = unlabelled_split(name)
        return *load_dataset(name, root, split), split
    images, labels = load_dataset(name, root, "test")
    if len(images) <= HELD_OUT:
        raise UserError(
            f"the test split of {name} has {len(images)} images and its last {HELD_OUT} are kept for the evaluation: "
            f"query another data set, or its train split with --force"
        )
    return images[:-HELD_OUT], labels[:-HELD_OUT], "test"


def take_balanced(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Indices (count,) of a random subset with as equal class counts as `count` and the data allow, sorted.

    UserError when `count` exceeds the data.
    """
    if not 0 < count <= len(labels):
        raise UserError(f"a subset of {count} images was asked for, the data set has {len(labels)}")
    order = torch.randperm(len(labels), generator=generator(seed, "subset"))
    # Rank of each image within its class, then one rank after the other: as balanced as can be.
    rank = torch.empty_like(order)
    for label in labels.unique():
        members = order[labels[order] == label]
        rank[members] = torch.arange(len(members))
    by_rank = order[torch.argsort(rank[order], stable=True)]
    return by_rank[:count].sort().values


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in [0, 1], of uint8 images (N, 3, H, W)."""
    # Over counts of the 256 values: exact, and no float copy of the whole data set.
    counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double()
    values = torch.arange(256, dtype=torch.float64, device=images.device) / 255
    share = counts / counts.sum(dim=1, keepdim=True)
    mean = share @ values
    std = (share @ values.square() - mean.square()).sqrt()
    return [round(v, 6) for v in mean.tolist()], [round(v, 6) for v in std.tolist()]


def to_float(images: Tensor) -> Tensor:
    """Images as the encoders take them: float32 in [0, 1]. uint8 is scaled, float passes through."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


# ---- reading ---------------------------------------------------------------------------------------------------------


def _to_tensors(dataset, size: int | None) -> tuple[Tensor, Tensor]:
    """A torchvision data set's arrays: N x H x W [x 3] or, for STL-10 and SVHN, N x 3 x H x W."""
    images = torch.as_tensor(np.asarray(dataset.data))
    labels = torch.as_tensor(np.asarray(dataset.labels if hasattr(dataset, "labels") else dataset.targets)).long()
    if images.ndim == 3:
        # 28 x 28 digits: a black frame keeps them sharp where resizing would blur them.
        frame = 0 if size is None else (SIZE - images.shape[-1]) // 2
        images = F.pad(images, [frame] * 4)[:, None].expand(-1, 3, -1, -1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return _resize(images.contiguous(), size), labels


def _resize(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[-2:] == (size, size):
        return images
    parts = [F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True) for part in images.split(1024)]
    return torch.cat([part.round_().clamp_(0, 255).to(torch.uint8) for part in parts])


def _load_npz(path: Path, split: str, size: int | None) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise UserError(f"no file {path}: npz:PATH wants arrays x_train, y_train, x_test, y_test")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays[f"x_{split}"]
            labels = arrays[f"y_{split}"] if f"y_{split}" in arrays else np.full(images.shape[:1], -1)
    except KeyError:
        raise UserError(f"{path} has no array x_{split}: write it with --export, or add it") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is broken or not an npz of plain arrays: {str(error).splitlines()[0][:120]}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"{path}: x_{split} is {images.dtype} {images.shape}, uint8 (N, H, W, 3) is needed")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path}: y_{split} is {labels.dtype} {labels.shape}, one integer for each of {len(images)} images"
        )
    if len(images) == 0:
        raise UserError(f"{path}: x_{split} has no images")
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return _resize(images, size), torch.from_numpy(labels).long()


def _load_folder(folder: Path, split: str, size: int | None) -> tuple[Tensor, Tensor]:
    if size is None:
        raise ValueError(f"the images in {folder} have no size in common: data_aug.pictures reads them one by one")
    place, names, labels = folder_files(folder, split)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        images = list(pool.map(lambda name: _read_square(place / name, size), names))
    return torch.stack(images), labels


def folder_files(folder: Path, split: str) -> tuple[Path, list[str], Tensor]:
    """A folder, the names below it of a split's N images, and their labels int64 (N,), -1 where there are no classes.

    Images are sought below `folder`/<class>/, or below `folder`/train/<class>/ and `folder`/{test,val}/<class>/.
    Without such split folders every tenth image of each class, drawn by a fixed seed, is the test split. Where there
    are no class folders, the images in the folder itself are taken. UserError when there are none.
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
    kept = (test == (split == "test")).nonzero()[:, 0]
    if len(kept) == 0:
        raise UserError(
            f"no images for the {split} split below {folder}: a tenth of each class is held out for the test"
        )
    return folder, [names[i] for i in kept.tolist()], labels[kept]


def image_files(folder: Path, *splits: Path) -> tuple[list[str], Tensor]:
    """Names of the N images below a folder, class by class, and their labels int64 (N,), -1 without class sub-folders.

    A class is numbered among the sub-folders of the folder and of the data set's other `splits`, so that a split that
    lacks a class numbers the rest as the others do. No file is opened. UserError when there are no images.
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
        raise UserError(f"no images below {folder}: images are wanted there, or sub-folders of them for each class")
    names, labels = zip(*found, strict=True)
    return list(names), torch.tensor(labels)


def read_picture(path: Path) -> Image.Image:
    """The picture in a file, in RGB whatever its mode; UserError naming the file when it can't be read."""
    try:
        with Image.open(path) as file:
            if file.mode.startswith("I;16"):  # 16-bit grey, which PIL would clip to white
                return file.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
            return file.convert("RGB")
    except Exception as error:  # broken files make PIL's decoders raise nearly anything
        raise UserError(f"{path} is not an image that can be read: {' '.join(str(error).split())[:120]}") from None


def _read_square(path: Path, size: int) -> Tensor:
    """One image, its centre cut out and resized to size x size with antialiasing."""
    image = torch.from_numpy(np.array(read_picture(path))).permute(2, 0, 1)
    side = min(image.shape[-2:])
    top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
    return _resize(image[None, :, top : top + side, left : left + side], size)[0]


# Users' own data, <form>:PATH, and how they are read.
FORMS = {"folder": _load_folder, "npz": _load_npz}


# ---- writing ---------------------------------------------------------------------------------------------------------


def export(name: str, root: Path) -> Path:
    """Write `<root>/<name>.npz`: x_train, y_train, x_test, y_test (and x_unlabeled, y_unlabeled for STL-10)."""
    arrays = {}
    splits = DATASETS[name].splits if isinstance(DATASETS.get(name), _Published) else ("train", "test")
    for split in splits:
        images, labels = load_dataset(name, root, split)
        arrays[f"x_{split}"], arrays[f"y_{split}"] = images.permute(0, 2, 3, 1).numpy(), labels.numpy()
    path = root / f"{name.replace(':', '-').replace('/', '-')}.npz"
    root.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())
    return path


@script
def main() -> None:
    parser = argparse.ArgumentParser(description="Write a data set as one npz file for machines without internet.")
    parser.add_argument("--export", required=True, metavar="NAME", help="data set to write")
    parser.add_argument("-data", "--data", type=Path, default=Path("datasets"), help="data root (default: %(default)s)")
    args = parser.parse_args()
    print(export(check_name(args.export), args.data))


if __name__ == "__main__":
    main()
