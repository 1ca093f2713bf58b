"""What tests share: small encoders, small data, and scripts run as a user runs them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models import build_encoder
from utils import seeded

ROOT = Path(__file__).resolve().parent.parent


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
