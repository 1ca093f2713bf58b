"""A few trials of the reliability campaign, so that it works when it is needed; docs/reliability.md has its figures."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("lines", (0, 2)),  # they need no victim
        pytest.param("kills", range(8), marks=pytest.mark.slow),
        pytest.param("files", range(20), marks=pytest.mark.slow),
        pytest.param("lines", range(20), marks=pytest.mark.slow),
    ],
)
def test_trials_hold(kind, numbers):
    words = [sys.executable, "-m", "tests.campaign", kind, "--only", *map(str, numbers)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"| {kind} | {len(numbers)} | {len(numbers)} |" in ended.stdout
