"""Folders of pictures as people have them: which files are read as which class, and what is refused."""

import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_aug.datasets import load_dataset, load_labelled
from data_aug.folders import read_picture
from data_aug.images import open_pictures
from utils import UserError


def picture(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path, "png")


def pictures(folder, *names):
    """A picture for each name below the folder, the colours of which are its numbers."""
    for number, name in enumerate(names):
        picture(folder / name, number)
    return f"folder:{folder}"


def read(name, split="train"):
    """The numbers of the pictures, and their labels. Both readers find the same."""
    images, labels = load_dataset(name, split=split)
    one_by_one = open_pictures(name, "nowhere", split)
    assert one_by_one.labels.tolist() == labels.tolist()
    numbers = images[:, 0, 0, 0].tolist()
    assert [one_by_one[i].getpixel((0, 0))[0] for i in range(len(one_by_one))] == numbers
    return numbers, labels.tolist()


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TWO = ("train/cat/0.png", "train/dog/0.png")


# ---- splits and classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
@pytest.mark.parametrize("test", ["test", "TEST", "val", "Val", "valid", "validation", "Validation", "testing"])
def test_names_of_splits(train, test, tmp_path):
    name = pictures(tmp_path, f"{train}/cat/0.png", f"{train}/dog/0.png", f"{test}/dog/0.png")
    assert read(name) == ([0, 1], [0, 1])
    assert read(name, "test") == ([2], [1])


@pytest.mark.parametrize(
    ("names", "split", "texts"),
    [
        (("train/cat/0.png",), "test", ("none of test, testing, val, valid, validation",)),
        (("val/cat/0.png",), "train", ("a sub-folder val but none of train",)),
        (("cat/0.png", "Test/0.png"), "train", ("a sub-folder Test but none of train: rename it",)),
        ((*TWO, "test/bird/0.png", "test/cat/0.png"), "test", ("test/bird is no class of", "/train:")),
        ((*TWO, "test/images/cat/0.png"), "test", ("test/images is no class of",)),
        ((*TWO, "train/bird/.keep", "test/bird/0.png"), "test", ("train/bird has no images, ", "test/bird has")),
        ((*TWO, "test/cat/0.png", "test/Dog/0.png"), "test", ("test/Dog and", "train/dog differ by case only")),
        ((*TWO, "train/Cat/0.png"), "train", ("train/Cat and", "train/cat differ by case only")),
        (("caf\u00e9/0.png", "cafe\u0301/0.png"), "train", ("differ by case only",)),
        (("train/notes/a.txt",), "train", ("no images below",)),
    ],
    ids=str,
)
def test_folders_that_are_refused(names, split, texts, tmp_path):
    pictures(tmp_path, *names)
    for text in texts:
        assert text in refusal(load_dataset, f"folder:{tmp_path}", "nowhere", split)


TINY = ("train/n1/images/0.JPEG", "train/n2/images/1.JPEG", *(f"val/images/{i}.JPEG" for i in (2, 3, 4)))


@pytest.fixture
def tiny(tmp_path):
    """Tiny-ImageNet as it is unpacked; its test images have no labels."""
    name = pictures(tmp_path, *TINY, "test/images/0.JPEG")
    (tmp_path / "train" / "n1" / "n1_boxes.txt").write_text("0.JPEG 0 0 1 1\n")
    rows = (f"{i}.JPEG\t{label}\t0\t32\t44\t62\n" for i, label in ((3, "n2"), (2, "n1"), (4, "n2")))
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    return name


def test_tiny_imagenet_as_it_is_unpacked(tiny, tmp_path):
    assert read(tiny) == ([0, 1], [0, 1])
    assert read(tiny, "test") == ([3, 2, 4], [1, 0, 1])
    (tmp_path / "val" / "images").rename(tmp_path / "val" / "n2")  # sorted by hand, beside the file
    assert read(tiny, "test") == ([2, 3, 4], [1, 1, 1])


@pytest.mark.parametrize("content", [b"", b"3.JPEG\n", b"3.JPEG\tn9\n", b"\xff\tn1\n"])
def test_broken_annotations_of_tiny_imagenet_are_one_line(content, tiny, tmp_path):
    (tmp_path / "val" / "val_annotations.txt").write_bytes(content)
    assert "val_annotations.txt cannot be read as" in refusal(load_dataset, tiny, "nowhere", "test")


def test_imagenets_val_as_it_is_unpacked(tmp_path):
    pictures(tmp_path, "train/n1/0.JPEG", "train/n2/0.JPEG", "val/0.JPEG", "val/1.JPEG")
    assert open_pictures("imagenet", tmp_path, "test").labels.tolist() == [-1, -1]  # an attacker needs no labels
    text = refusal(load_labelled, f"folder:{tmp_path}", "nowhere", "test")
    assert "images without labels: sort them into a sub-folder for each class" in text


# ---- files -----------------------------------------------------------------------------------------------------------


def listening(path):
    """A socket; its path may be too long for one."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(canary) (w) file closefile\nshowpage\n%%EOF\n"
NO_PICTURES = {
    "text": ("train/cat/notes.txt", b"notes", 1),
    "Thumbs.db": ("train/cat/Thumbs.db", b"\xd0\xcf\x11\xe0", 1),
    "no ending": ("train/cat/README", b"", 1),
    "EPS": ("train/cat/a.eps", EPS, 1),
    "PDF": ("train/cat/a.pdf", b"%PDF-1.4\n", 1),
    "SVG": ("train/cat/a.svg", b"<svg/>", 1),
    "HDF5": ("train/cat/a.h5", b"\x89HDF", 1),
    "pipe": ("train/cat/a.png", os.mkfifo, 1),
    "socket": ("train/cat/a.png", listening, 1),
    "link to nothing": ("train/cat/a.png", lambda path: path.symlink_to("nowhere.png"), 1),
    "link to itself": ("train/cat/a.png", lambda path: path.symlink_to("a.png"), 1),
    "device": ("train/cat/a.png", lambda path: path.symlink_to("/dev/zero"), 1),
    "beside classes": ("train/a.png", b"", 1),
    "folder like a picture": ("train/cat/a.png/notes.txt", b"", 1),
    "hidden": ("train/cat/.a.png", b"", 0),
    "hidden class": ("train/.ipynb_checkpoints/a.png", b"", 0),
    "hidden folder": ("train/cat/.thumbnails/a.png", b"", 0),
    "hidden split": (".train/cat/a.png", b"", 0),
    "macOS": ("train/__MACOSX/cat/a.png", b"", 0),
    "empty class": ("train/zebra/.keep", b"", 0),
    "link to the class": ("train/cat/again", lambda path: path.symlink_to("."), 0),
    "link to the split": ("train/cat/again", lambda path: path.symlink_to(".."), 0),
    "link to the top": ("train/cat/again", lambda path: path.symlink_to("../.."), 0),
    "link to above": ("train/cat/again", lambda path: path.symlink_to("/"), 0),
    "class that links to the top": ("train/zebra", lambda path: path.symlink_to(".."), 0),
}


@pytest.mark.parametrize("kind", NO_PICTURES)
def test_what_is_no_picture_is_skipped_and_counted(kind, tmp_path, capsys):
    name = pictures(tmp_path, *TWO, "test/dog/0.png")
    path, content, count = NO_PICTURES[kind]
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(tmp_path / path)
    else:
        (tmp_path / path).write_bytes(content)
    assert read(name) == ([0, 1], [0, 1])
    said = f"{tmp_path}/train: {count} files that are no pictures, or in no class, are skipped\n"
    assert capsys.readouterr().out == said * 2 * bool(count)  # by either reader
    assert read(name, "test") == ([2], [1])


@pytest.mark.parametrize("link", ["train", "train/cat", "train/cat/part", "train/cat/0.png"])
def test_links_are_followed(link, tmp_path):
    name = pictures(tmp_path / "set", "train/cat/part/0.png", "train/cat/0.png", "train/dog/0.png", "test/dog/0.png")
    (tmp_path / "set" / link).rename(tmp_path / "store")
    (tmp_path / "set" / link).symlink_to("../" * link.count("/") + "../store")
    assert read(name) == ([1, 0, 2], [0, 0, 1])


def test_a_linked_folder_is_read_once(tmp_path):
    """Folders that link to each other, and several links to one folder."""
    name = pictures(tmp_path / "set", *TWO)
    pictures(tmp_path / "a", "0.png")
    pictures(tmp_path / "b", "0.png")
    for link, target in (("a/b", "b"), ("b/a", "a"), ("set/train/cat/1", "a"), ("set/train/cat/2", "a")):
        (tmp_path / link).symlink_to(tmp_path / target)
    assert read(name)[1] == [0, 0, 0, 1]


# ---- pixels ----------------------------------------------------------------------------------------------------------


def png(width, height):
    """A picture that declares its size, and has hardly any data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b"")


def saved(array, form):
    content = io.BytesIO()
    Image.fromarray(array).save(content, form)
    return content.getvalue()


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def tiff_of_12_bits(values):
    """A TIFF of grey values below 4096, (H, W) with an even W; two take three bytes."""
    first, second = values.reshape(-1, 2).T.astype(np.uint16)
    data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = ((256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in (*tags, (279, len(data))))
    start = 8 + len(data)
    return struct.pack("<2sHI", b"II", 42, start) + data + struct.pack("<H", 9) + entries + bytes(4)


@pytest.mark.parametrize(
    "content",
    [
        saved((RAMP * 65535).astype("<u2"), "png"),
        saved((RAMP * 65535).astype("<u2"), "tiff"),
        saved((RAMP * 65535).astype(">u2"), "tiff"),
        saved((RAMP * 65535).astype("<u2"), "jpeg2000"),
        b"P5\n16 16\n65535\n" + (RAMP * 65535).astype(">u2").tobytes(),
        b"P5\n16 16\n1023\n" + (RAMP * 1023).astype(">u2").tobytes(),
        tiff_of_12_bits(RAMP * 4095),
        saved(RAMP.astype(np.float32), "tiff"),
        b"Pf\n16 16\n-1.0\n" + RAMP[::-1].astype("<f4").tobytes(),
    ],
    ids=["png", "tiff", "tiff, big endian", "jpeg2000", "pgm", "pgm of 10 bits", "tiff of 12 bits", "float", "pfm"],
)
def test_pixels_of_more_than_8_bits_are_scaled(content, tmp_path):
    (tmp_path / "deep").write_bytes(content)
    found = np.asarray(read_picture(tmp_path / "deep"))
    assert np.abs(found - RAMP[..., None] * 255).max() <= 1.5


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (saved((RAMP * 65535).astype(np.int32), "tiff"), "store 8 or 16 bits"),
        (saved((RAMP * 255).astype(np.int32), "tiff"), "store 8 or 16 bits"),
        (saved((RAMP - 0.5).astype(np.float32), "tiff"), "store 8 or 16 bits"),
        (saved(np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "tiff"), "store 8 or 16 bits"),
        (saved((RAMP * 255).astype(np.float32), "tiff"), "store 8 or 16 bits"),
        (b"Pf\n2 2\n-1.0\n" + 4 * b"\0\0\x80\x7f", "store 8 or 16 bits"),
        (png(10_000, 10_000), "10000 x 10000 pixels are more than 89,478,485"),
        (png(50_000, 50_000), "decompression bomb"),
        (png(2**31 - 1, 1), "decompression bomb"),
        (png(0, 0), ""),
        (png(8, 8)[:44], ""),
        (EPS, "cannot identify"),
        (b"", "cannot identify"),
        (b"<html>404</html>", "cannot identify"),
        (b"version https://git-lfs.github.com/spec/v1\n", "cannot identify"),
    ],
    ids=range(15),
)
def test_pictures_that_are_refused(content, text, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    found = refusal(read_picture, path)
    assert found.startswith(f"{path} is not an image that can be read: ")
    assert text in found
    assert capfd.readouterr().err == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_pictures_are_not_turned(tmp_path):
    image = Image.new("RGB", (8, 4))
    image.getexif()[0x0112] = 6  # a camera on its side
    image.save(tmp_path / "a.jpg", exif=image.getexif())
    assert read_picture(tmp_path / "a.jpg").size == (8, 4)


@pytest.mark.parametrize("moved", [True, False], ids=["into splits", "more images"])
def test_a_folder_too_small_for_a_test_split_says_what_to_do(moved, tmp_path):
    name = pictures(tmp_path, *(f"cat/{i}.png" for i in range(9)))
    text = refusal(load_dataset, name, "nowhere", "test")
    assert f"sort them into {tmp_path}/train and {tmp_path}/test, or have 10 images of a class" in text
    if moved:
        (tmp_path / "train").mkdir()
        (tmp_path / "cat").rename(tmp_path / "train" / "cat")
        picture(tmp_path / "test" / "cat" / "9.png")
    else:
        picture(tmp_path / "cat" / "9.png")
    assert len(read(name, "test")[0]) == 1
