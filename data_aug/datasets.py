"""Data sets as uint8 images and int64 labels in memory. A new data set is a row of DATASETS.

    python -m data_aug.datasets --export cifar10 -data ./datasets

writes ./datasets/cifar10.npz, for machines without internet.
"""

import contextlib
import io
import socket
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_aug.folders import load_folder, resize
from data_aug.shapes import make_shapes, make_textures
from files.writing import atomic_path
from settings import Parser, Settings, setting
from utils import UserError, generator

SIZE = 32  # images are SIZE x SIZE pixels unless another size is asked for
HELD_OUT = 1000  # test images that an attacker who queries the victim's data set leaves for the evaluation
DOWNLOAD_TIMEOUT = 30  # seconds of silence after which a data host counts as unreachable


@dataclass(frozen=True)
class _Published:
    """A torchvision data set: its class, its folder below the data root, and the class's arguments for each split."""

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
DATASET_NAMES = f"{', '.join(DATASETS)}, folder:PATH or npz:PATH"  # for help and messages
_ALIASES = {"fmnist": "fashionmnist"}  # of the 2022 command lines


@dataclass(frozen=True)
class Data(Settings):
    """Where data sets are stored."""

    data: Path = setting(Path("datasets"), "data root", flags=("-data", "--data"), named=False)
    title = "data"


def check_name(name: str, *more: str) -> str:
    """The name of a data set, or one of `more`, by its usual spelling. UserError that lists the names for another."""
    name = _ALIASES.get(name, name)
    form, _, path = name.partition(":")
    if name not in (*more, *DATASETS) and not (form in FORMS and path):
        raise UserError(f"unknown data set {name!r}: choose from {', '.join((*more, DATASET_NAMES))}")
    return name


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
        return FORMS[form](Path(path).expanduser(), split, size)
    source = DATASETS[name]
    if not isinstance(source, _Published):
        images, labels = source(split)
        return resize(images, size), labels
    offline = root / f"{name}.npz"
    if offline.exists():
        return _load_npz(offline, split, size)
    return source.load(name, root, split, size)


def load_labelled(name: str, root: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """As `load_dataset`. UserError when an image has no label."""
    images, labels = load_dataset(name, root, split)
    if (labels < 0).any():
        raise UserError(f"the {split} split of {name} has images without labels: choose another data set")
    return images, labels


def load_queries(name: str, victim_dataset: str, root: str | Path, force: bool = False) -> tuple[Tensor, Tensor, str]:
    """An attacker's images, uint8 (N, 3, H, W), their labels (N,) and their split.

    Of the victim's data set the attacker has the test split without its last HELD_OUT images, which are left for the
    evaluation; of another data set, or with `force`, the split that encoders are trained on.
    """
    if check_name(name) != _ALIASES.get(victim_dataset, victim_dataset) or force:
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


# ---- reading ---------------------------------------------------------------------------------------------------------


def _to_tensors(dataset, size: int | None) -> tuple[Tensor, Tensor]:
    """Images and labels of a torchvision data set, which has N x H x W [x 3] arrays or (STL-10, SVHN) N x 3 x H x W."""
    images = torch.as_tensor(np.asarray(dataset.data))
    labels = torch.as_tensor(np.asarray(dataset.labels if hasattr(dataset, "labels") else dataset.targets)).long()
    if images.ndim == 3:
        # 28 x 28 digits: a black frame keeps them sharp where resizing would blur them.
        frame = 0 if size is None else (SIZE - images.shape[-1]) // 2
        images = F.pad(images, [frame] * 4)[:, None].expand(-1, 3, -1, -1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return resize(images.contiguous(), size), labels


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
    return resize(images, size), torch.from_numpy(labels).long()


FORMS = {"folder": load_folder, "npz": _load_npz}  # the forms of users' own data, <form>:PATH


# ---- writing ---------------------------------------------------------------------------------------------------------


def export(name: str, root: Path) -> Path:
    """Write `<root>/<name>.npz` with arrays x_train, y_train, x_test, y_test (for STL-10 also those of `unlabeled`)."""
    name, arrays = check_name(name), {}
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


def main() -> None:
    parser = Parser("Write a data set as an npz file, for machines without internet.", [Data])
    parser.add_argument("--export", required=True, metavar="NAME", help=f"data set to write: {DATASET_NAMES}")
    arguments = parser.parse_args(sys.argv[1:])
    print(export(arguments.export, arguments.data))


if __name__ == "__main__":
    from jobs.ending import script  # only a script needs it: data_aug knows of no jobs

    script(main)()
