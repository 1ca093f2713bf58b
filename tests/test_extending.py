"""The examples of docs/extending.md, as they stand there: each is one place in a copy of the project, and runs."""

import json
import re
import shutil
import subprocess
import sys

import pytest

import loss
from models import read_checkpoint
from tests import test_loss
from tests.conftest import JUDGE, ROOT, SMALL, STEAL, VICTIM

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
NEW_LOSS, ITS_TEST, NEW_ATTACK, NEW_DEFENCE, NEW_FLAG = BLOCKS

# Runs command lines one after the other in one process; prints the exit code and the last line of each.
DRIVER = """
import contextlib, io, json, runpy, sys
for line in json.loads(sys.argv[1]):
    sys.argv, out, code = line, io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_path(line[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    print(json.dumps([code, out.getvalue()]))
"""


@pytest.mark.parametrize("block", [NEW_LOSS, NEW_ATTACK, NEW_DEFENCE, NEW_FLAG])
def test_an_extension_takes_fewer_than_20_lines(block):
    assert len(block.strip().splitlines()) < 20


def test_the_loss_passes_the_tests_of_losses_with_its_slow_formula(monkeypatch):
    for module, table in ((loss, "STEAL_LOSSES"), (test_loss, "SLOW"), (test_loss, "ABOUT")):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    # The page's own text, from this repository: running it as printed is the point.
    exec(compile(NEW_LOSS, "docs/extending.md", "exec"), names := dict(vars(loss)))
    monkeypatch.setitem(test_loss.STEAL_LOSSES, "similarity", names["STEAL_LOSSES"]["similarity"])
    exec(compile(ITS_TEST, "docs/extending.md", "exec"), dict(vars(test_loss)))
    for size in test_loss.SIZES:
        test_loss.test_matches_the_formula("similarity", 1.0, size)
    test_loss.test_shuffled_answers_change_the_loss("similarity")
    test_loss.test_minimising_on_free_vectors_approaches_the_victim("similarity")


@pytest.fixture
def extended(tmp_path):
    """A copy of the project with all examples, each put where the page says."""
    folder = tmp_path / "project"
    ignored = shutil.ignore_patterns(
        ".*", "tests", "docs", "slurm", "checkpoints", "results", "demo-results", "__pycache__"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    for name, block in (("loss.py", NEW_LOSS), ("attacks/__init__.py", NEW_ATTACK)):
        with (folder / name).open("a") as file:
            file.write(f"\n\n{block}")
    (folder / "defenses" / "clip.py").write_text(NEW_DEFENCE)
    field, use = NEW_FLAG.strip("\n").splitlines()
    recipe = (folder / "training" / "recipe.py").read_text()
    recipe = recipe.replace("    seed: int = 0\n", f"{field}\n    seed: int = 0\n")
    recipe = recipe.replace("    period = ", f"{use}\n    period = ")
    (folder / "training" / "recipe.py").write_text(recipe)
    return folder


def test_everything_follows_from_one_place(extended, trained, data, tmp_path):
    where = ("-data", data, "--checkpoint-dir", tmp_path / "checkpoints")
    user = (*SMALL, *VICTIM, "--num_queries", "40", "--num-test", "20", "--epochs", "1")
    added = ("--losstype", "similarity", "--sharpness", "4", "--defence", "clip,rounding", "--ceiling", "0.5")
    lines = [
        ("steal.py", *where, *STEAL, *added, "--warmup-epochs", "2"),
        ("linear_eval.py", *where, *JUDGE, "--dataset-test", "mnist", "--sharpness", "4", "--ceiling", "0.5"),
        ("steal.py", *where, *STEAL, "--attack", "mean-of-four", "-b", "6"),
        ("legitimate.py", *where, *user, "--defence", "clip"),
        ("steal.py", *where, *STEAL, "--losstype", "mse", "--sharpness", "4"),
        ("steal.py", *where, *STEAL, "--losstype", "mse", "--defence", "clip", "--ceiling", "0"),
        ("steal.py", *where, *STEAL, "--losstype", "mse", "--ceiling", "3"),
        ("steal.py", "--help"),
    ]
    words = json.dumps([list(map(str, line)) for line in lines])
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, words], cwd=extended, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    ended = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [code for code, _ in ended] == [0, 0, 0, 0, 2, 2, 2, 0], ended
    stolen, judged, mean, served, idle, low, absent, shown = (out for _, out in ended)
    for name, value in (("sharpness", 4.0), ("ceiling", 0.5), ("warmup_epochs", 2)):
        assert f"{name} {value}" in stolen  # in force
        assert f"-{name.replace('_', '')}={value}" in stolen  # in the run's name
        assert f"--{name.replace('_', '-')}" in shown
    assert "stolen: " in judged
    assert "losstype similarity" in judged
    assert "queries: 24, of distinct images: 24" in mean
    held = read_checkpoint(next(tmp_path.rglob("stolen-*attack=mean_of_four*/checkpoint.pth.tar")))
    assert (held["settings"]["losstype"], held["query_set"]["images"]) == ("cosine", 6)
    assert "with clip: top1" in served
    assert "--sharpness has no effect with the loss mse: leave it out" in idle
    assert "not a number above 0" in low
    assert "--ceiling has no effect without --defence" in absent
