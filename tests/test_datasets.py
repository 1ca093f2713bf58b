"""Loading data from every form, the subsets taken of it, and the errors about it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from data_aug import datasets
from data_aug.datasets import (
    DATASET_NAMES,
    Data,
    canonical_name,
    channel_statistics,
    check_name,
    export,
    held_out,
    load_dataset,
    load_labelled,
    load_queries,
    same_source,
    take_balanced,
    to_float,
    unlabelled_split,
)
from data_aug.digests import image_digests
from data_aug.folders import class_files
from evaluation.user import load_user
from tests.conftest import ROOT
from utils import UserError


@pytest.fixture(autouse=True)
def no_internet(monkeypatch):
    """A test never downloads, wherever it runs."""

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", refuse)


@pytest.fixture
def image_folder(tmp_path):
    """Writes images of 48 x 40 below <tmp>/<path>, so many for each class."""

    def write(path, classes=("ant", "bee"), number=20):
        for label, name in enumerate(classes):
            (tmp_path / path / name).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                colour = (10 * i, 100 * label, 7)
                Image.new("RGB", (48, 40), colour).save(tmp_path / path / name / f"{i:03}.png")
        return tmp_path / path

    return write


def error(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        load_dataset(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["shapes", "textures"])
def test_embedded_sets_come_in_the_common_form(name):
    for split, number in (("train", 6000), ("test", 4000)):
        images, labels = load_dataset(name, split=split)
        assert images.shape == (number, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64


def test_npz_is_read_before_anything_else(write_npz, tmp_path):
    path = write_npz("cifar10")
    images, labels = load_dataset("cifar10", tmp_path, "test")
    with np.load(path) as arrays:
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), arrays["x_test"])
        assert np.array_equal(labels.numpy(), arrays["y_test"])


def test_npz_of_another_size_is_resized_with_antialiasing(tmp_path):
    stripes = np.zeros((1, 96, 96, 3), np.uint8)
    stripes[:, :, ::2] = 255  # finer than 32 pixels can show: antialiasing makes them grey
    arrays = {f"{a}_{s}": v for s in ("train", "test") for a, v in (("x", stripes), ("y", np.zeros(1, int)))}
    np.savez(tmp_path / "stl10.npz", **arrays)
    images, _ = load_dataset("stl10", tmp_path)
    assert images.shape == (1, 3, 32, 32)
    assert (images.float() - 127.5).abs().max() < 25
    expected = torchvision.transforms.functional.resize(Image.fromarray(stripes[0]), 32)
    difference = images[0].permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"y_train": np.zeros(2, int)}, "no array x_train"),
        ({"x_train": np.zeros((2, 32, 3), np.uint8), "y_train": np.zeros(2, int)}, r"uint8 \(2, 32, 3\)"),
        ({"x_train": np.zeros((2, 32, 32, 3), np.float32), "y_train": np.zeros(2, int)}, "float32"),
        ({"x_train": np.zeros((2, 32, 32, 3), np.uint8), "y_train": np.zeros(3, int)}, "one integer for each of 2"),
        ({"x_train": np.zeros((0, 32, 32, 3), np.uint8), "y_train": np.zeros(0, int)}, "no images"),
        ({"x_train": np.array([{}]), "y_train": np.zeros(1, int)}, "x_train.npy is object"),
    ],
)
def test_broken_npz_is_refused(arrays, text, tmp_path):
    np.savez(tmp_path / "cifar10.npz", **arrays)
    with pytest.raises(UserError, match=text):
        load_dataset("cifar10", tmp_path)


def test_truncated_npz_is_refused(write_npz, tmp_path):
    path = write_npz("cifar10")
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        assert "cannot be read as an npz file of plain arrays" in error("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10", "mnist", "fashionmnist"])
def test_failed_download_says_what_was_sought_and_the_three_ways(name, tmp_path):
    text = error(name, tmp_path / "data")
    assert str(tmp_path / "data" / name) in text
    for way in ("where there is internet", "--export", "folder:PATH"):
        assert way in text


def test_torchvision_layout_is_read(tmp_path):
    """Real files of torchvision's layout, made small: MNIST's idx format."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for stem in ("train", "t10k"):
        header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in digits.shape)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + digits.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x05" + bytes(range(5)))
    images, labels = load_dataset("mnist", tmp_path)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert images.shape == (5, 3, 32, 32)
    assert torch.equal(images[:, 1, 2:30, 2:30], torch.from_numpy(digits))
    assert images[:, :, :2].eq(0).all()


@pytest.mark.parametrize("content", [b"nothing", b"\0\0\x08\x03" + b"\xff" * 12, b"<html>404</html>"])
def test_broken_files_of_torchvision_are_one_line(content, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in ("train", "t10k"):
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(content)
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(content)
    assert f"{tmp_path}" in error("mnist", tmp_path)


def test_folder_with_splits(image_folder, tmp_path):
    image_folder("set/train", number=3)
    image_folder("set/val", number=2)
    images, labels = load_dataset(f"folder:{tmp_path / 'set'}", split="train")
    assert images.shape == (6, 3, 32, 32)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images[4, :, 0, 0].tolist() == [10, 100, 7]
    assert len(load_dataset(f"folder:{tmp_path / 'set'}", split="test")[0]) == 4


def test_folder_without_splits_holds_out_a_tenth_of_each_class(image_folder):
    name = f"folder:{image_folder('set')}"
    train, train_labels = load_dataset(name, split="train")
    test, test_labels = load_dataset(name, split="test")
    assert (len(train), len(test)) == (36, 4)
    assert train_labels.bincount().tolist() == [18, 18]
    assert test_labels.bincount().tolist() == [2, 2]
    seen = {bytes(image.numpy().tobytes()) for image in train}
    assert not any(bytes(image.numpy().tobytes()) in seen for image in test)
    assert torch.equal(load_dataset(name, split="test")[0], test)


def test_own_files_and_folders_need_no_labels(write_npz, image_folder, tmp_path):
    own = write_npz("elsewhere/mine", train=5)
    images, labels = load_dataset(f"npz:{own}")
    assert labels.tolist() == [0, 1, 2, 3, 0]
    np.savez(tmp_path / "bare.npz", x_train=images.permute(0, 2, 3, 1).numpy())
    bare, labels = load_dataset(f"npz:{tmp_path / 'bare.npz'}")
    assert torch.equal(bare, images)
    assert labels.tolist() == [-1] * 5
    flat = image_folder("flat", classes=("",), number=10)
    images, labels = load_dataset(f"folder:{flat}")
    assert (len(images), labels.unique().tolist()) == (9, [-1])
    for name in (f"npz:{tmp_path / 'bare.npz'}", f"folder:{flat}"):
        with pytest.raises(UserError, match="images without labels"):
            load_labelled(name, tmp_path, "train")
    assert "no file" in error("npz:nowhere.npz")
    assert "no array x_test" in error(f"npz:{tmp_path / 'bare.npz'}", split="test")


def test_bad_folders(image_folder, tmp_path):
    assert "no folder" in error(f"folder:{tmp_path / 'none'}")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    assert "no images below" in error(f"folder:{tmp_path / 'empty'}")
    (image_folder("set/train") / "ant" / "000.png").write_bytes(b"no image")
    assert "000.png is not an image" in error(f"folder:{tmp_path / 'set'}")
    image_folder("half/train")
    assert "none of test, " in error(f"folder:{tmp_path / 'half'}", split="test")


def test_a_folder_numbers_classes_as_in_train(image_folder, tmp_path):
    image_folder("set/train", classes=("ant", "bee", "cow"), number=2)
    image_folder("set/test", classes=("bee", "cow"), number=1)
    _, train = load_dataset(f"folder:{tmp_path / 'set'}", split="train")
    _, test = load_dataset(f"folder:{tmp_path / 'set'}", split="test")
    assert (train.tolist(), test.tolist()) == ([0, 0, 1, 1, 2, 2], [1, 2])


def test_a_folder_is_read_to_any_depth_in_the_order_of_its_paths(tmp_path, capsys):
    for i, name in enumerate(("ant/b/2.png", "ant/b.png", "ant/a.txt", "ant/c.PNG", "ant/d.png/1.png")):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "set" / name, "png")
    names = class_files([tmp_path / "set"], tmp_path / "set")[1]
    assert names == ["ant/b/2.png", "ant/b.png", "ant/c.PNG", "ant/d.png/1.png"]
    assert "set: 1 files that are no pictures" in capsys.readouterr().out
    assert load_dataset(f"folder:{tmp_path / 'set'}")[0][:, 0, 0, 0].tolist() == [0, 1, 3, 4]


def test_other_sizes(write_npz, tmp_path):
    write_npz("stl10", train=4, size=96)
    stored, _ = load_dataset("stl10", tmp_path, size=None)
    assert stored.shape == (4, 3, 96, 96)
    for size in (32, 48, 96):
        expected = torch.nn.functional.interpolate(stored.float(), (size, size), mode="bilinear", antialias=True)
        assert torch.equal(load_dataset("stl10", tmp_path, size=size)[0], expected.round().to(torch.uint8))
    assert load_dataset("shapes", size=None)[0].shape[-2:] == (32, 32)


def test_unknown_name_lists_the_known():
    text = error("cifar11")
    assert "'cifar11'" in text
    assert "cifar10, cifar100, svhn" in text
    assert "folder:PATH or npz:PATH" in text
    for name in ("npz:", "folder:", "zip:x"):
        assert "unknown data set" in error(name)


def test_the_alias_of_2022_is_taken_everywhere(write_npz, tmp_path):
    write_npz("fashionmnist", train=40, test=1010)
    assert check_name("fmnist") == check_name("fashionmnist") == check_name("fmnist", "imagenet") == "fashionmnist"
    assert torch.equal(load_dataset("fmnist", tmp_path)[0], load_dataset("fashionmnist", tmp_path)[0])
    for name, victim in (("fmnist", "fashionmnist"), ("fashionmnist", "fmnist")):
        images, _, split = load_queries(name, victim, tmp_path)
        assert (len(images), split) == (10, "test")
    assert export("fmnist", tmp_path) == tmp_path / "fashionmnist.npz"


def test_imagenet_is_a_name_only_where_images_are_streamed(tmp_path):
    assert check_name("imagenet", "imagenet") == "imagenet"
    assert "unknown data set 'imagenet'" in error("imagenet", tmp_path)


def test_the_data_root_and_the_names_for_help():
    assert str(Data().data) == "datasets"
    assert DATASET_NAMES.startswith("cifar10, ")
    assert DATASET_NAMES.endswith(", folder:PATH or npz:PATH")
    for name in datasets.DATASETS:
        assert name in DATASET_NAMES.split(", ")[:-1]


def test_the_export_command(write_npz, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "data_aug.datasets", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout, done.stderr.count("\n")

    write_npz("mnist", train=7, test=3)
    before = load_dataset("mnist", tmp_path)
    assert run("--export", "mnist", "-data", tmp_path) == (0, f"{tmp_path / 'mnist.npz'}\n", 0)
    assert torch.equal(load_dataset("mnist", tmp_path)[0], before[0])
    assert run("--export", "mnits") == run() == (2, "", 1)


def test_export_and_back(write_npz, tmp_path):
    write_npz("svhn", train=7, test=3)
    before = load_dataset("svhn", tmp_path)
    path = export("svhn", tmp_path)
    assert path == tmp_path / "svhn.npz"
    after = load_dataset("svhn", tmp_path)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_queries_of_the_victims_data_set_leave_the_last_thousand(write_npz, tmp_path):
    write_npz("cifar10", train=40, test=1010)
    test, test_labels = load_dataset("cifar10", tmp_path, "test")
    images, labels, split = load_queries("cifar10", "cifar10", tmp_path)
    assert split == "test"
    assert torch.equal(images, test[:10])
    assert torch.equal(labels, test_labels[:10])
    for options in ({"victim_dataset": "svhn"}, {"victim_dataset": "cifar10", "force": True}):
        images, labels, split = load_queries("cifar10", root=tmp_path, **options)
        assert (len(images), len(labels), split) == (40, 40, "train")


def test_queries_of_a_small_test_split_leave_half(write_npz, tmp_path, capsys):
    assert [held_out(count) for count in (1, 2, 285, 1000, 1001, 10_000)] == [1, 1, 143, 500, 1000, 1000]
    write_npz("svhn", test=285)
    images, _, split = load_queries("svhn", "svhn", tmp_path)
    assert (len(images), split) == (142, "test")
    assert capsys.readouterr().out == "svhn: 143 of its 285 test images, the last, are kept for the evaluation\n"
    write_npz("svhn", test=1)
    with pytest.raises(UserError, match=r"has one image.*--force"):
        load_queries("svhn", "svhn", tmp_path)


@pytest.fixture
def spellings(write_npz, image_folder, tmp_path, monkeypatch):
    """The folder d with the data sets own.npz and own/, and links to them, is the working folder."""
    write_npz("d/own", train=8, test=10)
    image_folder("d/own", number=20)
    (tmp_path / "link").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "link.npz").symlink_to("own.npz")
    (tmp_path / "d" / "cifar10.npz").symlink_to("own.npz")
    (tmp_path / "d" / "link").symlink_to("own")
    monkeypatch.chdir(tmp_path / "d")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("victim", "name"),
    [
        (victim, victim.partition(":")[0] + ":" + name)
        for victim, names in (
            ("npz:own.npz", ("own.npz", "./own.npz", "../d/own.npz", "{tmp}/d/own.npz", "~/link/own.npz", "link.npz")),
            ("folder:own", ("own", "own/", "./own", "{tmp}/d/own", "~/d/own", "link", "../link/link")),
        )
        for name in names
    ],
)
def test_another_spelling_of_the_victims_data_is_the_same_data(victim, name, spellings):
    name = name.format(tmp=spellings)
    assert canonical_name(name) == canonical_name(victim) == victim.replace(":", f":{spellings}/d/")
    assert load_queries(name, victim, "data")[2] == load_queries(victim, name, "data")[2] == "test"
    assert load_queries(name, victim, "data", force=True)[2] == load_queries(name, "cifar10", "data")[2] == "train"


def test_names_of_the_same_data(spellings):
    assert canonical_name("fmnist") == canonical_name("fashionmnist") == "fashionmnist"
    assert canonical_name("other") == "other"  # a stranger's victim
    assert canonical_name("npz:a/b") != canonical_name("npz:a_b")
    assert load_queries("npz:own.npz", "cifar10", ".")[2] == "test"  # what the data root has of that name


SIZES = {"train": 60, "test": 40}


@pytest.fixture
def digits(tmp_path):
    """A data root with an SVHN of 60 and 40 images."""
    draws = np.random.default_rng(0)
    arrays = {f"x_{split}": draws.integers(0, 256, (n, 32, 32, 3), np.uint8) for split, n in SIZES.items()}
    np.savez(tmp_path / "svhn.npz", **arrays, **{f"y_{split}": np.arange(n) % 10 for split, n in SIZES.items()})
    return tmp_path


def test_data_sets_drawn_from_each_other_have_one_source(digits):
    for root in (None, digits):
        assert same_source("svhn", "svhn-merged", root)
        assert same_source("svhn-merged", "svhn", root)
        assert same_source("svhn-merged", "svhn-merged", root)
        assert same_source("fmnist", "fashionmnist", root)
        assert not same_source("svhn-merged", "cifar10", root)
    assert same_source(f"npz:{digits}/svhn.npz", "svhn-merged", digits)


def test_an_attacker_of_a_redrawn_data_set_has_its_test_split(digits):
    trained = set(image_digests(load_dataset("svhn-merged", digits)[0]))
    images, _, split = load_queries("svhn-merged", "svhn-merged", digits)
    assert (split, len(images)) == ("test", 10)
    assert not trained & set(image_digests(images))
    for name, victim in (("svhn", "svhn-merged"), (f"npz:{digits}/svhn.npz", "svhn-merged"), ("svhn-merged", "svhn")):
        with pytest.raises(UserError, match=f"on which the victim was trained: take {victim} instead"):
            load_queries(name, victim, digits)
        assert load_queries(name, victim, digits, force=True)[2] == "train"


def test_a_user_of_a_redrawn_data_set_has_no_training_images(digits):
    trained = set(image_digests(load_dataset("svhn-merged", digits)[0]))
    train, test, _ = load_user("svhn-merged", "svhn-merged", digits, 5)
    assert not trained & set(image_digests(torch.cat([train[0], test[0]])))
    with pytest.raises(UserError, match="take svhn-merged instead"):
        load_user("svhn", "svhn-merged", digits, 5)


def test_unlabelled_split():
    assert unlabelled_split("stl10") == "unlabeled"
    assert unlabelled_split("cifar10") == "train"


@pytest.mark.parametrize("count", [1, 10, 33, 60])
def test_balanced_subset(count):
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    index = take_balanced(labels, count)
    assert len(index.unique()) == count
    numbers = labels[index].bincount(minlength=3)
    if count <= 30:
        assert numbers.max() - numbers.min() <= 1
    assert torch.equal(index, take_balanced(labels, count))
    if 1 < count < 60:
        assert not torch.equal(index, take_balanced(labels, count, seed=1))


def test_balanced_subset_of_more_than_there_is():
    with pytest.raises(UserError, match=r"5 images.*has 4"):
        take_balanced(torch.zeros(4, dtype=torch.int64), 5)


def test_channel_statistics_are_mean_and_deviation(images):
    mean, std = channel_statistics(images)
    pixels = images.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(dim=1).tolist(), abs=1e-5)
    assert std == pytest.approx(pixels.std(dim=1, correction=0).tolist(), abs=1e-5)


def test_to_float(images):
    assert torch.equal(to_float(images), images.float() / 255)
    assert to_float(torch.ones(1)).eq(1).all()


@pytest.mark.skipif(not (ROOT / "datasets" / "cifar10.npz").exists(), reason="no datasets/cifar10.npz here")
def test_real_cifar10():
    images, labels = load_dataset("cifar10", ROOT / "datasets")
    assert len(images) in (50000, 8068)  # all of it, or the bit-exact part that is to be had
    assert labels.bincount().tolist() == pytest.approx([len(labels) / 10] * 10, rel=0.05)
    mean, std = channel_statistics(images)
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.005)
    assert std == pytest.approx([0.2470, 0.2435, 0.2616], abs=0.005)
