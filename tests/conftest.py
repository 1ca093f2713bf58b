"""What tests share: small encoders, small data, and scripts run as a user runs them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import linear_eval
import run
import steal
from data_aug.shapes import make_shapes
from defenses import Defence
from models import build_encoder
from utils import seeded

ROOT = Path(__file__).resolve().parent.parent


class Applied(Defence):
    """A defence that applies a function to answers (B, D), and counts the queries that it saw."""

    def __init__(self, function=lambda answers: answers):
        super().__init__()
        self.function, self.seen = function, 0

    def __call__(self, answers, call):
        self.seen += len(answers)
        return self.function(answers)


@pytest.fixture
def encoder():
    """An untrained small encoder with a head."""
    with seeded(0):
        return build_encoder("resnet10w32", out_dim=16)


@pytest.fixture
def images():
    return torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def write_npz(tmp_path):
    """Writes <folder>/<name>.npz of random images with as many as asked for in each split."""

    def write(name="tiny", train=64, test=32, classes=4, folder=None, size=32):
        draw = np.random.default_rng(0)
        arrays = {}
        for split, number in (("train", train), ("test", test)):
            arrays[f"x_{split}"] = draw.integers(0, 256, (number, size, size, 3), dtype=np.uint8)
            arrays[f"y_{split}"] = np.arange(number) % classes
        path = (folder or tmp_path) / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture
def run_script(tmp_path):
    """Runs a script in an empty folder; returns (exit code, standard output, standard error)."""

    def run(script, *arguments, cwd=tmp_path):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data root with a little cifar10 (1,040 test images), svhn and mnist as npz files."""
    root = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for name, train, test in (("cifar10", 64, 1040), ("svhn", 48, 32), ("mnist", 40, 24)):
        arrays = {}
        for split, number in (("train", train), ("test", test)):
            arrays[f"x_{split}"] = draw.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
            arrays[f"y_{split}"] = np.arange(number) % 10
        np.savez(root / f"{name}.npz", **arrays)
    write_imagenet(root / "imagenet")
    write_simsiam(root / "simsiam.pth.tar", root / "headed.pth.tar")
    return root


def write_imagenet(root, train=6, val=4, classes=4):
    """A folder in ImageNet's form: so many drawn shapes of each class, in JPEGs of several sizes."""
    images, labels = make_shapes("train")
    sizes = ((60, 48), (40, 64), (90, 70))
    for split, count, first in (("train", train, 0), ("val", val, train)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number, image in enumerate(images[labels == label][first : first + count]):
                picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(sizes[number % 3])
                picture.save(folder / f"{number}.JPEG", quality=95)


def write_simsiam(path, headed=None):
    """A checkpoint of random weights of a small network, with the keys of SimSiam's public ones, after 100 epochs.

    `headed` is where the same goes with the keys of sthalles/SimCLR, which have a projection head.
    """
    with seeded(7):
        network = build_encoder("resnet10w32-imagenet", 16).backbone
    state = {key.replace("shortcut", "downsample"): value for key, value in network.state_dict().items()}
    rest = {"epoch": 100, "arch": "resnet10", "optimizer": {}, "settings": {"dataset": "imagenet"}}
    if headed:
        torch.save({**rest, "state_dict": {f"backbone.{key}": value for key, value in state.items()}}, headed)
    state = {f"module.encoder.{key}": value for key, value in state.items()}
    state["module.predictor.0.weight"] = torch.zeros(4, 4)
    torch.save({**rest, "state_dict": state}, path)


def made(out):
    """The checkpoint that a script says it made, in the last line of that kind that it printed."""
    line = next(line for line in reversed(out.splitlines()) if line.startswith(("copy: ", "victim: ")))
    return str(Path(line.split(": ", 1)[1]).absolute())


def call_main(module, data, folder, *arguments):
    """Calls a script's main() in this process; returns the exit code. Runs go to <folder>/checkpoints."""
    line = [f"{module.__name__}.py", "-data", data, "--checkpoint-dir", folder / "checkpoints", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, line)))
        try:
            module.main()
        except SystemExit as stop:
            return stop.code
    return 0


# Flags of what `trained` holds; the scripts' own defaults otherwise.
SMALL = ("--arch", "resnet10w32", "--device", "cpu")
VICTIM = ("--dataset", "cifar10", "--epochstrain", "1", "--lossvictim", "infonce", "--seed", "0")
COPY = ("--datasetsteal", "svhn", "--epochs", "1", "--num_queries", "24")
STEAL = (*SMALL, *VICTIM, *COPY, "--archstolen", "resnet10w32", "-b", "8")
# A copy of a victim that is given by its file.
ATTACK = (
    *COPY,
    "--dataset",
    "cifar10",
    "--archstolen",
    "resnet10w32",
    "--losstype",
    "mse",
    "-b",
    "8",
    "--device",
    "cpu",
)
JUDGE = (*SMALL, "-n", "40", "--probe-epochs", "3")


@pytest.fixture(scope="session")
def _trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train = ("--dataset", "cifar10", "--epochs", "1", "-b", "32", *SMALL)
    classifier = (*JUDGE, *VICTIM, "--modeltype", "victim", "--dataset-test", "mnist")
    for module, arguments in (
        (run, train),
        (run, (*train, "--seed", "1")),
        (run, (*train, "--losstype", "supervised")),
        (steal, (*STEAL, "--losstype", "mse")),
        (linear_eval, classifier),
    ):
        assert call_main(module, data, folder, *arguments) == 0
    return folder


def _link(source, target):
    """Copies a file; of checkpoints, which are large and never written in place, another name does."""
    return os.link(source, target) if str(source).endswith(".pth.tar") else shutil.copy2(source, target)


@pytest.fixture
def trained(_trained, tmp_path):
    """A folder of the test's own with checkpoints of one epoch each: victims of seeds 0 and 1 and a supervised one; a
    linear layer for mnist on the first of them, and a copy of it by mse, whose path is returned."""
    shutil.copytree(_trained / "checkpoints", tmp_path / "checkpoints", copy_function=_link)
    return next(tmp_path.rglob("stolen-svhn-resnet10w32-mse-*/checkpoint.pth.tar"))


@pytest.fixture
def call(capsys, data, tmp_path):
    """Calls a script's main() in this process; returns (exit code, output, errors). Runs go to <tmp>/checkpoints."""

    def run_main(module, *arguments, folder=tmp_path):
        capsys.readouterr()
        code = call_main(module, data, folder, *arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_main


@pytest.fixture
def refused(call):
    """Calls a script that must refuse, and returns the one line with which it does."""

    def refusal(module, *arguments, **options):
        code, _, err = call(module, *arguments, **options)
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        return err

    return refusal
