"""Strange arrays and pictures: other numbers, orders and names, archives that swell, and files that are no pictures."""

import io
import os
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.campaign.texts import ANYTHING, Canary, Make, holding

SIDE, CLASSES = 32, 4
COUNTS = {"train": 32, "test": 24}


def _grey(split: str) -> np.ndarray:
    """Grey images uint8 (N, 32, 32) of stripes, a width of them for each class, and noise."""
    noise = np.random.default_rng(len(split)).integers(0, 60, (COUNTS[split], SIDE, SIDE))
    stripes = np.stack([np.arange(SIDE) >> label & 1 for label in range(CLASSES)])
    return (noise + 20 + 150 * stripes[np.arange(COUNTS[split]) % CLASSES][:, None]).astype(np.uint8)


# ---- npz -------------------------------------------------------------------------------------------------------------


def _arrays() -> dict[str, np.ndarray]:
    found = {}
    for split, count in COUNTS.items():
        found[f"x_{split}"] = np.repeat(_grey(split)[..., None], 3, axis=3)
        found[f"y_{split}"] = np.arange(count) % CLASSES
    return found


def write_arrays(path: Path) -> None:
    np.savez(path, **_arrays())


def arrays(change: Callable[[dict], dict | None], save: Callable = np.savez) -> Make:
    """Makes an npz file of changed arrays."""

    def make(path: Path, draws: random.Random) -> None:
        content = _arrays()
        save(path, **(change(content) or content))

    return make


def _labels(change: Callable[[np.ndarray], np.ndarray]) -> Make:
    return arrays(lambda content: {key: change(a) if key[0] == "y" else a for key, a in content.items()})


def _images(change: Callable[[np.ndarray], np.ndarray]) -> Make:
    return arrays(lambda content: {key: change(a) if key[0] == "x" else a for key, a in content.items()})


def _named(images: str, labels: str) -> Make:
    return arrays(lambda content: {key.replace("x_", images).replace("y_", labels): a for key, a in content.items()})


def _medmnist(content: dict) -> dict:
    names = {"x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels"}
    return {names[key]: array[:, None] if key[0] == "y" else array for key, array in content.items()}


def _archive(change: Callable[[str, bytes], bytes]) -> Make:
    """Makes an npz file with other bytes for some arrays."""

    def make(path: Path, draws: random.Random) -> None:
        before = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
        with zipfile.ZipFile(path, "w") as after:
            for name in before.namelist():
                after.writestr(name, change(name, before.read(name)))

    return make


def _header(shape: str, kind: str = "|u1") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def _declared(shape: str, kind: str = "|u1") -> Make:
    return _archive(lambda name, data: _header(shape, kind) + bytes(100) if name == "x_train.npy" else data)


def _encrypted(path: Path, draws: random.Random) -> None:
    """Sets the flag of encryption in all headers of the archive."""
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(mark)
        while start >= 0:
            content[start + offset] |= 1
            start = content.find(mark, start + 4)
    path.write_bytes(content)


def _swelling(path: Path, draws: random.Random) -> None:
    """An array of 4 GiB of zeros in 4 MB: one block, repeated."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = pack.compress(_header("(1400000, 32, 32, 3)")) + pack.flush(zlib.Z_FULL_FLUSH)
    block = pack.compress(bytes(2**24)) + pack.flush(zlib.Z_FULL_FLUSH)
    data, size = head + block * 256 + pack.flush(), 128 + 2**24 * 256
    wide = struct.pack("<HHQQ", 1, 16, size, len(data))  # sizes beyond 32 bits
    name, most = b"x_train.npy", 2**32 - 1
    sizes = struct.pack("<HHHHHIIIHH", 45, 0, 8, 0, 0, 0, most, most, len(name), len(wide))
    local = b"PK\x03\x04" + sizes + name + wide + data
    central = b"PK\x01\x02" + struct.pack("<H", 45) + sizes + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name + wide
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    path.write_bytes(local + central + end)


def _npy(path: Path, draws: random.Random) -> None:
    with path.open("wb") as file:
        np.save(file, _arrays()["x_train"])


def _fortran(array: np.ndarray) -> np.ndarray:
    return np.asfortranarray(array)


def _objects(content: dict) -> dict:
    return content | {"y_train": np.array([Canary()] * COUNTS["train"], dtype=object)}


def _pickled(name: str, data: bytes) -> bytes:
    return pickle.dumps(Canary()) if name == "y_train.npy" else data


def _missing(content: dict) -> dict:
    return {key: array for key, array in content.items() if key != "x_train"}


ARRAYS: dict[str, tuple[str, Make]] = dict(ANYTHING)
ARRAYS |= {
    "compressed": ("works", arrays(dict, np.savez_compressed)),
    "Fortran's order": ("works", _images(_fortran)),
    "labels big endian": ("works", _labels(lambda labels: labels.astype(">i8"))),
    "labels of one byte": ("works", _labels(lambda labels: labels.astype(np.uint8))),
    "labels near 2e10": ("works", _labels(lambda labels: labels + 20_000_000_000)),
    "labels of any numbers": ("works", _labels(lambda labels: labels * 1_000_003 + 17)),
    "labels of 64 bits without sign": ("works", _labels(lambda labels: labels.astype(np.uint64) + np.uint64(2**63))),
    "labels in a column": ("either", _labels(lambda labels: labels[:, None])),
    "labels that are negative": ("works", _labels(lambda labels: labels - 10)),
    "labels with a fraction": ("refused", _labels(lambda labels: labels + 0.5)),
    "labels with NaN": ("refused", _labels(lambda labels: np.where(labels == 1, np.nan, labels))),
    "labels that are text": ("either", _labels(lambda labels: np.array([f"class {n}" for n in labels]))),
    "labels that are dates": ("refused", _labels(lambda labels: labels.astype("datetime64[D]"))),
    "too few labels": ("refused", _labels(lambda labels: labels[:-1])),
    "test labels that train lacks": ("refused", arrays(lambda a: a | {"y_test": a["y_test"] + 10})),
    "no labels": ("refused", arrays(lambda a: {key: array for key, array in a.items() if key[0] == "x"})),
    "no training images": ("refused", arrays(_missing)),
    "no images at all": ("refused", arrays(lambda a: {"a": np.zeros(3), "b": np.zeros(4)})),
    "no arrays": ("refused", arrays(lambda a: {"x": np.zeros(0)})),
    "empty training set": ("refused", arrays(lambda a: {key: array[:0] for key, array in a.items()})),
    "images without pixels": ("refused", _images(lambda images: images[:, :0, :0])),
    "images big endian": ("either", _images(lambda images: images.astype(">u2"))),
    "images of 16 bits": ("either", _images(lambda images: images.astype(np.uint16) * 257)),
    "images in [0, 1]": ("either", _images(lambda images: (images / 255).astype(np.float32))),
    "images with NaN": ("refused", _images(lambda images: np.where(images == 60, np.nan, images))),
    "images of whole numbers": ("either", _images(lambda images: images.astype(np.int64))),
    "images channels first": ("either", _images(lambda images: images.transpose(0, 3, 1, 2))),
    "images of four channels": ("refused", _images(lambda images: np.concatenate([images, images[..., :1]], 3))),
    "images in grey": ("either", _images(lambda images: images[..., 0])),
    "MedMNIST": ("either", arrays(_medmnist)),
    "names of Keras, in grey": ("either", arrays(lambda a: {k: v[..., 0] if k[0] == "x" else v for k, v in a.items()})),
    "names X_train": ("either", _named("X_", "Y_")),
    "npy, not npz": ("refused", _npy),
    "encrypted": ("refused", _encrypted),
    "objects that run code": ("refused", arrays(_objects)),
    "pickle for an array": ("refused", _archive(_pickled)),
    "declared: 10^12 images": ("refused", _declared("(1000000000000, 32, 32, 3)")),
    "declared: 10^40 images": ("refused", _declared(f"({10**40}, 32, 32, 3)")),
    "declared: -1 images": ("refused", _declared("(-1, 32, 32, 3)")),
    "declared: text": ("refused", _declared("'x'")),
    "declared: a call": ("refused", _declared("__import__('os').mkdir('canary')")),
    "declared: void": ("refused", _declared("(32, 32, 32, 3)", "|V9999999")),
    "swells to 4 GiB": ("refused", _swelling),
}


# ---- pictures --------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, ending: str = "png", convert: Callable | None = None, **options) -> None:
    """Folders train/<class>/ and test/<class>/ of the grey images."""
    shutil.rmtree(folder, ignore_errors=True)
    for split in COUNTS:
        for number, pixels in enumerate(_grey(split)):
            path = folder / split / f"class{number % CLASSES}" / f"{number}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            (convert(pixels) if convert else Image.fromarray(pixels)).save(path, **options)


def all_as(ending: str, convert: Callable | None = None, **options) -> Make:
    """Makes all pictures in another format."""

    def make(path: Path, draws: random.Random) -> None:
        write_pictures(path, ending, convert, **options)

    return make


def added(name: str, content: bytes | str | Callable[[Path], None]) -> Make:
    """Adds a file to a class of the training split."""

    def make(path: Path, draws: random.Random) -> None:
        target = path / "train" / "class1" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        content(target) if callable(content) else holding(content)(target, draws)

    return make


def moved(*moves: tuple[str, str]) -> Make:
    def make(path: Path, draws: random.Random) -> None:
        for source, target in moves:
            (path / target).parent.mkdir(parents=True, exist_ok=True)
            (path / source).rename(path / target)

    return make


def _of_mode(mode: str) -> Callable:
    return lambda pixels: Image.fromarray(pixels).convert("RGB").convert(mode)


def _scaled(dtype: type, factor: float) -> Callable:
    return lambda pixels: Image.fromarray((pixels.astype(float) * factor).astype(dtype))


def _png(width: int, height: int) -> bytes:
    """A picture that declares its size, and has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


_EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(canary) (w) file closefile\nshowpage\n%%EOF\n"
_CUT = (lambda buffer: (Image.fromarray(_grey("train")[0]).save(buffer, "png"), buffer.getvalue()[:200])[1])(
    io.BytesIO()
)
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"><rect width="32" height="32"/></svg>'
PICTURES: dict[str, tuple[str, Make]] = {
    "bmp": ("works", all_as("bmp")),
    "tiff": ("works", all_as("tif")),
    "tiff, LZW": ("works", all_as("tiff", compression="tiff_lzw")),
    "webp": ("works", all_as("webp", _of_mode("RGB"), lossless=True)),
    "ppm": ("works", all_as("ppm", _of_mode("RGB"))),
    "endings in capitals": ("works", all_as("PNG")),
    "RGB": ("works", all_as("png", _of_mode("RGB"))),
    "RGBA": ("works", all_as("png", _of_mode("RGBA"))),
    "grey and alpha": ("works", all_as("png", _of_mode("LA"))),
    "16 bits": ("works", all_as("png", _scaled(np.uint16, 257))),
    "16 bits, tiff": ("works", all_as("tif", _scaled(np.uint16, 257))),
    "16 bits, big endian": ("works", all_as("tif", _scaled(">u2", 257))),
    "32 bits": ("either", all_as("tif", _scaled(np.int32, 257))),
    "floats in [0, 1]": ("either", all_as("tif", _scaled(np.float32, 1 / 255))),
    "floats to 255": ("either", all_as("tif", _scaled(np.float32, 1))),
    "JPEG": ("any", all_as("jpg", quality=95)),
    "JPEG, CMYK": ("any", all_as("jpg", _of_mode("CMYK"), quality=95)),
    "palette": ("any", all_as("png", _of_mode("P"))),
    "cut": ("either", added("a.png", _CUT)),
    "empty": ("either", added("a.png", b"")),
    "no picture": ("either", added("a.jpg", "<html>404</html>")),
    "LFS pointer": ("either", added("a.jpg", "version https://git-lfs.github.com/spec/v1\n")),
    "text": ("works", added("notes.txt", "my notes")),
    "EPS": ("either", added("a.eps", _EPS)),
    "EPS by another name": ("either", added("a.png", _EPS)),
    "PDF": ("either", added("a.pdf", "%PDF-1.4\n%%EOF\n")),
    "SVG": ("either", added("a.svg", _SVG)),
    "50,000 x 50,000": ("either", added("a.png", _png(50_000, 50_000))),
    "2^31 x 1": ("either", added("a.png", _png(2**31 - 1, 1))),
    "no pixels": ("either", added("a.png", _png(0, 0))),
    "hidden picture": ("works", added(".a.png", _png(8, 8))),
    "hidden class": ("works", added("../.thumbnails/a.png", _png(8, 8))),
    "Thumbs.db": ("works", added("Thumbs.db", b"\xd0\xcf\x11\xe0")),
    "__MACOSX": ("either", added("../__MACOSX/._a.png", b"\0\5\x16\7")),
    "pipe": ("either", added("a.png", os.mkfifo)),
    "folder for a picture": ("either", added("a.png", Path.mkdir)),
    "link to nothing": ("either", added("a.png", lambda path: path.symlink_to("nowhere.png"))),
    "link to itself": ("either", added("a.png", lambda path: path.symlink_to("a.png"))),
    "loop of folders": ("either", added("again", lambda path: path.symlink_to("../.."))),
    "device": ("either", added("a.png", lambda path: path.symlink_to("/dev/zero"))),
    "name of bytes": ("either", added(os.fsdecode(b"a\xff\xfe.txt"), "x")),
    "empty class": ("either", added("../empty", Path.mkdir)),
    "splits in capitals": ("works", moved(("train", "Train"), ("test", "TEST"))),
    "validation": ("works", moved(("test", "validation"))),
    "val": ("works", moved(("test", "val"))),
    "class by another case": ("refused", moved(("test/class1", "test/Class1"))),
    "test class that train lacks": ("refused", moved(("test/class1", "test/other"))),
    "test pictures in one folder": (
        "refused",
        moved(*((f"test/class{n}", f"test/images/class{n}") for n in range(CLASSES))),
    ),
    "no test split": ("refused", moved(("test", "../elsewhere"))),
    "a folder of nothing": ("refused", moved(("train", "../a"), ("test", "../b"))),
}
