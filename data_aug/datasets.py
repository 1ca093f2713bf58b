"""Data sets as uint8 images and int64 labels in memory. A new data set is a row of DATASETS.

    python -m data_aug.datasets --export cifar10 -data ./datasets

writes ./datasets/cifar10.npz, for machines without internet.
"""

import contextlib
import hashlib
import io
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_aug.arrays import load_npz, to_images
from data_aug.folders import load_folder, resize
from data_aug.shapes import make_shapes, make_textures
from data_aug.sizes import SIZE, Data, source_size
from files.writing import atomic_path
from settings import Parser
from utils import UserError, first_process, generator

HELD_OUT = 1000  # test images, or half where there are no more, that an attacker of the victim's data set doesn't get
DOWNLOAD_TIMEOUT = 30  # seconds of silence after which a data host counts as unreachable


@dataclass(frozen=True)
class _Published:
    """A torchvision data set: its class, its folder below the data root, and how the class is asked for a split."""

    class_name: str
    folder: str = ""
    splits: tuple[str, ...] = ("train", "test")
    by_name: bool = False  # by split="train", otherwise by train=True

    def load(self, name: str, root: Path, split: str, size: int | None) -> tuple[Tensor, Tensor]:
        for place in (root / self.folder, root):
            with contextlib.suppress(RuntimeError, OSError):
                return self._read(name, place, split, size)
        place = root / self.folder
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            place.mkdir(parents=True, exist_ok=True)
            return self._read(name, place, split, size, download=True)
        except (RuntimeError, OSError) as error:
            with contextlib.suppress(OSError):
                place.rmdir()  # only if the download left nothing there
            raise UserError(
                f"no {name}: neither {root / name}.npz nor torchvision's files in {place} are there, and downloading "
                f"them failed ({str(error).splitlines()[0][:120]}); either run where there is internet, or put "
                f"{name}.npz there (`python -m data_aug.datasets --export {name}` makes it elsewhere), or use "
                f"folder:PATH with the images in class sub-folders"
            ) from None
        finally:
            socket.setdefaulttimeout(patience)

    def _read(
        self, name: str, place: Path, split: str, size: int | None, download: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `load`. RuntimeError or OSError where torchvision does not find its files or cannot download them."""
        import torchvision  # here, because it takes seconds and most runs read an npz file or make their data

        which = {"split": split} if self.by_name else {"train": split == "train"}
        try:
            data = getattr(torchvision.datasets, self.class_name)(str(place), **which, download=download)
        except (RuntimeError, OSError):
            raise
        except Exception as error:  # whatever its readers make of broken files
            what = f"{type(error).__name__} {error}".splitlines()[0][:120]
            raise UserError(f"torchvision's files of {name} in {place} are broken, remove them: {what}") from None
        labels = torch.as_tensor(np.asarray(data.labels if hasattr(data, "labels") else data.targets)).long()
        return to_images(np.asarray(data.data), size), labels


@dataclass(frozen=True)
class _Redrawn:
    """A data set whose splits are not alike: merged, shuffled and divided again, a share of the images for training."""

    source: str
    share: float

    def load(self, root: Path, split: str, size: int | None) -> tuple[Tensor, Tensor]:
        parts = [load_dataset(self.source, root, part, size) for part in ("train", "test")]
        images, labels = (torch.cat(both) for both in zip(*parts, strict=True))
        order = torch.randperm(len(labels), generator=generator(0, f"redrawn {self.source}"))
        train = round(self.share * len(labels))
        index = order[train:] if split == "test" else order[:train]
        return images[index], labels[index]


DATASETS = {
    "cifar10": _Published("CIFAR10"),
    "cifar100": _Published("CIFAR100"),
    "svhn": _Published("SVHN", "SVHN", by_name=True),
    "svhn-merged": _Redrawn("svhn", 0.8),  # as dataset inference's authors draw it
    "stl10": _Published("STL10", splits=("train", "test", "unlabeled"), by_name=True),
    "mnist": _Published("MNIST"),
    "fashionmnist": _Published("FashionMNIST"),
    "shapes": make_shapes,
    "textures": make_textures,
}
DATASET_NAMES = f"{', '.join(DATASETS)}, folder:PATH or npz:PATH"  # for help and messages
_ALIASES = {"fmnist": "fashionmnist"}  # of the 2022 command lines


def check_name(name: str, *more: str) -> str:
    """The name of a data set, or one of `more`, as `canonical_name` spells it. UserError with the names for another."""
    name = canonical_name(name)
    form, _, path = name.partition(":")
    if name not in (*more, *DATASETS) and not (form in FORMS and path):
        raise UserError(f"unknown data set {name!r}: choose from {', '.join((*more, DATASET_NAMES))}")
    return name


def canonical_name(name: str, root: Path | None = None) -> str:
    """The same text for the same data, however spelled: `folder:` or `npz:` and an absolute path without links.

    Relative paths start at the working folder. With a data root, a data set whose npz file is there is that file.
    """
    name = _ALIASES.get(name, name)
    form, _, path = name.partition(":")
    if form in FORMS and path:
        return f"{form}:{os.path.realpath(os.path.expanduser(path))}"
    if root is not None and name in DATASETS and (root / f"{name}.npz").exists():
        return f"npz:{os.path.realpath(root / f'{name}.npz')}"
    return name


def same_source(name: str, other: str, root: Path | None = None) -> bool:
    """Whether two data sets have images in common: the same data, as `canonical_name` spells it, or drawn from it."""
    drawn = {name: data.source for name, data in DATASETS.items() if isinstance(data, _Redrawn)}
    return canonical_name(drawn.get(name, name), root) == canonical_name(drawn.get(other, other), root)


def check_apart(name: str, victim_dataset: str, root: Path | None = None) -> None:
    """UserError for a data set whose splits share images with the other splits of the victim's."""
    if same_source(name, victim_dataset, root) and canonical_name(name, root) != canonical_name(victim_dataset, root):
        raise UserError(
            f"{name} has images of both splits of {victim_dataset}, on which the victim was trained: "
            f"take {victim_dataset} instead"
        )


def unlabelled_split(name: str) -> str:
    """The split that encoders are trained on: `train`, but for STL-10 its 100,000 unlabelled images."""
    return "unlabeled" if name == "stl10" else "train"


def load_dataset(
    name: str, root: str | Path = "datasets", split: str = "train", size: int | None = SIZE
) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, size, size) and labels int64 (N,) of a data set's split, on the CPU.

    A published data set is read from `<root>/<name>.npz` if that exists, else from torchvision's files, which are
    downloaded when absent. `npz:PATH` is an npz file elsewhere, `folder:PATH` a folder with a sub-folder of images for
    each class; `shapes` and `textures` are generated. Images without a class have the label -1. Images of other sizes
    are resized with antialiasing, or not at all where `size` is None, which for a folder is a ValueError. UserError
    when the data cannot be had: it says what was sought where, and how to provide it.
    """
    name, root = check_name(name), Path(root)
    form, _, path = name.partition(":")
    if form in FORMS:
        return FORMS[form](Path(os.path.expanduser(path)), split, size)
    source = DATASETS[name]
    if isinstance(source, _Redrawn):
        return source.load(root, split, size)
    if not isinstance(source, _Published):
        images, labels = source(split)
        return resize(images, size), labels
    offline = root / f"{name}.npz"
    if offline.exists():
        return load_npz(offline, split, size)
    return source.load(name, root, split, size)


def load_training(
    name: str,
    root: str | Path,
    labelled: bool,
    number: int | None = None,
    seed: int = 0,
    size: int = SIZE,
    wide: bool = False,
) -> tuple[Tensor, Tensor, str]:
    """As `load_dataset`: what an encoder is trained on, by labels or without, and the split that it is of.

    number: a class-balanced subset of so many images, by the seed. wide: as in `source_size`.
    """
    split = "train" if labelled else unlabelled_split(name)
    images, labels = load_dataset(name, root, split, source_size(name, size, wide))
    if number:
        chosen = take_balanced(labels, number, seed)
        images, labels = images[chosen], labels[chosen]
    return images, labels, split


def load_labelled(name: str, root: str | Path, split: str, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """As `load_dataset`. UserError when an image has no label."""
    images, labels = load_dataset(name, root, split, size)
    check_labelled(labels, name, split)
    return images, labels


def check_labelled(labels: Tensor, name: str, split: str) -> None:
    """UserError, with a remedy, where an image of a data set's split has no label."""
    if (labels < 0).any():
        remedy = {
            "imagenet": "sort them into a sub-folder for each class, as valprep.sh does",
            "folder": "sort them into a sub-folder for each class",
            "npz": f"give each image a class in y_{split}, 0, 1, ... (-1 is for no label)",
        }.get(name.partition(":")[0], "choose another data set")
        raise UserError(f"the {split} split of {name} has images without labels: {remedy}")


def held_out(count: int) -> int:
    """How many of `count` test images, the last, are kept from an attacker who queries the victim's data set."""
    return HELD_OUT if count > HELD_OUT else (count + 1) // 2


def load_queries(
    name: str, victim_dataset: str, root: str | Path, force: bool = False, size: int | None = SIZE
) -> tuple[Tensor, Tensor, str]:
    """An attacker's images, uint8 (N, 3, H, W), their labels (N,) and their split.

    Of the victim's data set the attacker has the test split without its last `held_out` images, which are left for
    the evaluation; of another data set, or with `force`, the split that encoders are trained on. UserError as by
    `check_apart`.
    """
    if force or not same_source(check_name(name), victim_dataset, Path(root)):
        split = unlabelled_split(name)
        return *load_dataset(name, root, split, size), split
    check_apart(name, victim_dataset, Path(root))
    images, labels = load_dataset(name, root, "test", size)
    kept = held_out(len(images))
    if kept == len(images):
        raise UserError(
            f"the test split of {name} has one image, which is kept for the evaluation: query another data set, or "
            f"its train split with --force"
        )
    if kept < HELD_OUT and first_process():
        print(f"{name}: {kept} of its {len(images)} test images, the last, are kept for the evaluation")
    return images[:-kept], labels[:-kept], "test"


def take_balanced(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Sorted indices (count,) of a random subset, as balanced over the classes as `count` and the data allow.

    UserError when there are fewer than `count` images.
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
    """Images as encoders expect them, float32 in [0, 1]: uint8 is scaled, float is returned as it is."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


FORMS = {"folder": load_folder, "npz": load_npz}  # of users' data, <form>:PATH


# ---- writing ---------------------------------------------------------------------------------------------------------


def export(name: str, root: Path, size: int = SIZE) -> Path:
    """Write `<root>/<name>.npz` with arrays x_train, y_train, x_test, y_test (for STL-10 also those of `unlabeled`)."""
    name, arrays = check_name(name), {}
    splits = DATASETS[name].splits if isinstance(DATASETS.get(name), _Published) else ("train", "test")
    for split in splits:
        images, labels = load_dataset(name, root, split, size)
        arrays[f"x_{split}"], arrays[f"y_{split}"] = images.permute(0, 2, 3, 1).numpy(), labels.numpy()
    form, _, source = canonical_name(name).partition(":")
    if source:  # two paths never have one name
        name = f"{form}-{Path(source).stem[:40]}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}"
    path = root / f"{name}.npz"
    root.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())
    return path


def main() -> None:
    parser = Parser("Write a data set as an npz file, for machines without internet.", [Data])
    parser.add_argument("--export", required=True, metavar="NAME", help=f"data set to write: {DATASET_NAMES}")
    arguments = parser.parse_args(sys.argv[1:])
    print(export(arguments.export, arguments.data, arguments.size or SIZE))


if __name__ == "__main__":
    from jobs.ending import script  # only a script needs it: data_aug knows of no jobs

    script(main)()
