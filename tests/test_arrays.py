"""Images and labels in npz files of anybody: what is read, what is refused, and that nothing large is made."""

import io
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from data_aug.datasets import load_dataset, load_labelled
from utils import UserError

DRAWS = np.random.default_rng(0)
IMAGES = {split: DRAWS.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8) for split in ("train", "test")}
GREY = {split: images[..., 0] for split, images in IMAGES.items()}
LABELS = np.arange(8) % 4


def packed(train=IMAGES["train"], test=IMAGES["test"], labels=LABELS, names=("x_{}", "y_{}"), **more):
    """An npz file's bytes."""
    arrays = {names[0].format("train"): train, names[0].format("test"): test}
    if labels is not None:
        arrays |= {names[1].format(split): labels for split in ("train", "test")}
    content = io.BytesIO()
    np.savez(content, **arrays, **more)
    return content.getvalue()


def member(shape="(8, 32, 32, 3)", dtype="|u1", data=bytes(8 * 32 * 32 * 3), name="x_train.npy"):
    """An npz file's bytes with an array whose header may not be that of its data."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    content = io.BytesIO(packed(names=("x{}", "y_{}")))
    with zipfile.ZipFile(content, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
    return content.getvalue()


def load(content, tmp_path, split="train", read=load_dataset):
    (tmp_path / "some.npz").write_bytes(content)
    return read(f"npz:{tmp_path / 'some.npz'}", tmp_path, split)


def refusal(content, tmp_path, split="train", read=load_dataset):
    with pytest.raises(UserError) as caught:
        load(content, tmp_path, split, read)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "some.npz") in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("x_{}", "y_{}"),
        ("X_{}", "Y_{}"),
        ("{}_images", "{}_labels"),
        ("{}_X", "{}_y"),
    ],
)
def test_names_of_arrays(names, tmp_path):
    content = packed(names=names, val_images=IMAGES["test"][:1], val_labels=LABELS[:1])
    for split, images in IMAGES.items():
        found, labels = load(content, tmp_path, split)
        assert np.array_equal(found.permute(0, 2, 3, 1), images)
        assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("unlabelled", [{}, {"x_test": IMAGES["train"]}, {"test_images": IMAGES["train"][:3]}])
def test_validation_is_the_test_split_where_there_is_none_with_labels(unlabelled, tmp_path):
    """Contests publish their test images without labels: those of other images are not given to them."""
    arrays = io.BytesIO()
    np.savez(arrays, x_train=IMAGES["train"], x_val=IMAGES["test"], y_val=LABELS, y_train=LABELS, **unlabelled)
    found, labels = load(arrays.getvalue(), tmp_path, "test")
    assert np.array_equal(found.permute(0, 2, 3, 1), IMAGES["test"])
    assert labels.tolist() == LABELS.tolist()


def test_the_exact_name_goes_first(tmp_path):
    for more in ({"X_train": IMAGES["test"]}, {"train_images": IMAGES["test"], "train_labels": LABELS[::-1]}):
        found, labels = load(packed(**more), tmp_path)
        assert np.array_equal(found.permute(0, 2, 3, 1), IMAGES["train"])
        assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("change", "colour"),
    [
        (np.asfortranarray, True),
        (lambda images: images.transpose(0, 3, 1, 2), True),
        (lambda images: images[..., 0], False),
        (lambda images: images[..., :1], False),
        (lambda images: images[:, None, ..., 0], False),
    ],
)
def test_layouts_of_images(change, colour, tmp_path):
    found, _ = load(packed(change(IMAGES["train"])), tmp_path)
    expected = IMAGES["train"] if colour else IMAGES["train"][..., :1].repeat(3, axis=3)
    assert (found.shape, found.dtype) == ((8, 3, 32, 32), torch.uint8)
    assert np.array_equal(found.permute(0, 2, 3, 1), expected)


def test_grey_images_of_28_pixels_get_the_frame_of_digits(tmp_path):
    found, _ = load(packed(GREY["train"][:, :28, :28]), tmp_path)
    assert np.array_equal(found[:, 1, 2:30, 2:30], GREY["train"][:, :28, :28])
    assert found[:, :, :2].eq(0).all()


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.astype(">i8"),
        LABELS.astype(">u2"),
        LABELS.astype(np.int8),
        LABELS[:, None],
        LABELS + 20_000_000_000,
        LABELS * 1_000_003 + 17,
        LABELS.astype(np.uint64) + np.uint64(2**64 - 4),
        LABELS - 10,
        LABELS - 2,
    ],
    ids=str,
)
def test_labels_are_numbered_in_their_order(labels, tmp_path):
    for split in IMAGES:
        assert load(packed(labels=labels), tmp_path, split)[1].tolist() == LABELS.tolist()


def test_labels_are_numbered_as_in_train(tmp_path):
    def two(train, test):
        arrays = {f"x_{split}": images for split, images in IMAGES.items()}
        content = io.BytesIO()
        np.savez(content, **arrays, y_train=train, y_test=test)
        return content.getvalue()

    high = np.array([9, 9, 9, 5, 5, 5, 200, 200])
    assert load(two(high, np.full(8, 9, np.uint64)), tmp_path, "test")[1].tolist() == [1] * 8
    assert load(two(high, np.array([9, -1] * 4, np.int8)), tmp_path, "test")[1].tolist() == [1, -1] * 4
    assert "no training image has the label 7, 8" in refusal(two(high, np.array([7, 8] * 4)), tmp_path, "test")
    assert load(two(np.full(8, -1), high), tmp_path, "test")[1].tolist() == [1, 1, 1, 0, 0, 0, 2, 2]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (LABELS[:-1], "one integer for each of 8 images is needed"),
        (LABELS[:, None] == np.arange(4), "one integer for each"),
        (LABELS + 0.5, "one integer for each"),
        (LABELS.astype("datetime64[D]"), "one integer for each"),
        (np.array(["cat"] * 8), "one integer for each"),
        (np.array(LABELS, object), "one integer for each"),
        (LABELS % 2 * 2 - 1, "-1 is for no label"),
        (LABELS - 1, "-1 is for no label"),
        (None, "images without labels: give each image a class in y_train"),
    ],
    ids=str,
)
def test_labels_that_are_refused(labels, text, tmp_path):
    assert text in refusal(packed(labels=labels), tmp_path, read=load_labelled)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (IMAGES["train"] / 255, "float64"),
        (IMAGES["train"].astype(">u2"), ">u2"),
        (IMAGES["train"].astype(np.int64), "int64"),
        (IMAGES["train"].repeat(2, axis=3)[..., :4], "(8, 32, 32, 4)"),
        (GREY["train"][..., :3], "(8, 32, 3)"),
        (IMAGES["train"][:, :0], "images without pixels"),
        (IMAGES["train"][:0], "no images"),
        (np.array(None), "object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_that_are_refused(images, text, tmp_path):
    assert text in refusal(packed(images), tmp_path)


def encrypted():
    """The flag of encryption is set in all headers of the archive."""
    changed = bytearray(packed())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = changed.find(mark)
        while start >= 0:
            changed[start + offset] |= 1
            start = changed.find(mark, start + 4)
    return bytes(changed)


def single():
    content = io.BytesIO()
    np.save(content, IMAGES["train"])
    return content.getvalue()


def with_member(name, data):
    content = io.BytesIO(packed(names=("x{}", "y_{}")))
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr(name, data)
    return content.getvalue()


STRANGE = {
    "encrypted": (lambda: encrypted(), "encrypted"),
    "one array": (lambda: single(), "a single array (npy): store x_train"),
    "other names": (lambda: packed(names=("a{}", "b{}")), "its arrays are 'atrain.npy', 'atest.npy'"),
    "line break in a name": (lambda: with_member("a\nb.npy", b""), r"'a\nb.npy'"),
    "pickle": (lambda: with_member("x_train.npy", pickle.dumps([1])), "cannot be read as an npz file of plain arrays"),
    "text": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "cannot be read as an npz file of plain arrays"),
    "empty": (lambda: b"", "cannot be read as an npz file of plain arrays"),
    "more images": (lambda: member("(9, 32, 32, 3)"), "does not fit its 24576 bytes"),
    "fewer images": (lambda: member("(7, 32, 32, 3)"), "does not fit"),
    "10^12 images": (lambda: member(f"({10**12}, 32, 32, 3)"), "does not fit"),
    "10^40 images": (lambda: member(f"({10**40}, 32, 32, 3)"), "does not fit"),
    "-1 images": (lambda: member("(-1, 32, 32, 3)"), "does not fit"),
    "void": (lambda: member(dtype="|V9999999"), "uint8"),
    "no shape": (lambda: member("'x'"), "cannot be read"),
    "a call": (lambda: member("print('canary')"), "cannot be read"),
    "swells": (lambda: member("(23000, 32, 32, 3)", data=bytes(23000 * 3072)), "would swell"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_files_are_one_line_and_little_memory(kind, tmp_path, capsys):
    make, text = STRANGE[kind]
    content = make()
    tracemalloc.start()
    assert text in refusal(content, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert capsys.readouterr().out == ""


@settings(max_examples=150, deadline=None)
@given(
    where=some.integers(0, len(packed(IMAGES["train"][:2, :4, :4], IMAGES["test"][:2, :4, :4], LABELS[:2])) - 1),
    change=some.binary(max_size=12),
    cut=some.booleans(),
)
def test_a_changed_file_is_read_or_refused_in_a_line(where, change, cut, tmp_path_factory):
    content = packed(IMAGES["train"][:2, :4, :4], IMAGES["test"][:2, :4, :4], LABELS[:2])
    content = content[:where] + change + (b"" if cut else content[where + len(change) :])
    folder = tmp_path_factory.getbasetemp()
    line = None
    try:
        images, labels = load(content, folder)
    except UserError as error:
        line = str(error)
    if line:
        assert "\n" not in line
        assert str(folder / "some.npz") in line
    else:
        assert (images.shape[1:], images.dtype, labels.dtype) == ((3, 32, 32), torch.uint8, torch.int64)
        assert len(images) == len(labels)
