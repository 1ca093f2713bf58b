"""The examples of docs/extending.md, as they stand there."""

import importlib.util
import re
import sys

import pytest
import torch

import attacks
import defenses
import legitimate
import linear_eval
import loss
import steal
from tests import test_loss
from tests.conftest import JUDGE, ROOT, SMALL, STEAL, VICTIM

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
NEW_LOSS, ITS_TEST, NEW_ATTACK, NEW_DEFENCE = BLOCKS


def apply(monkeypatch, block, module, *tables):
    """Runs a block as if it were at the end of the module; what it puts into the tables is taken out after the test."""
    for table in tables:
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    names = dict(vars(module))
    # The page's own text, from this repository: running it as printed is the point.
    exec(compile(block, "docs/extending.md", "exec"), names)
    return names


@pytest.fixture
def new_loss(monkeypatch):
    """The example's loss, in the table that everyone reads."""
    entry = apply(monkeypatch, NEW_LOSS, loss, "STEAL_LOSSES")["STEAL_LOSSES"]["similarity"]
    for module in (steal, test_loss):
        monkeypatch.setitem(module.STEAL_LOSSES, "similarity", entry)
    return entry


@pytest.mark.parametrize("block", [NEW_LOSS, NEW_ATTACK, NEW_DEFENCE])
def test_an_extension_takes_fewer_than_20_lines(block):
    assert len(block.strip().splitlines()) < 20


def test_the_loss_passes_the_tests_of_losses_with_its_slow_formula(new_loss, monkeypatch):
    names = apply(monkeypatch, ITS_TEST, test_loss, "SLOW", "ABOUT")
    assert names["SLOW"]["similarity"] is names["slow_similarity"]
    monkeypatch.setattr(test_loss, "SLOW", names["SLOW"])
    monkeypatch.setattr(test_loss, "ABOUT", names["ABOUT"])
    for size in test_loss.SIZES:
        test_loss.test_matches_the_formula("similarity", 1.0, size)
    test_loss.test_shuffled_answers_change_the_loss("similarity")
    test_loss.test_minimising_on_free_vectors_approaches_the_victim("similarity")


def test_the_loss_steals_and_its_copy_is_judged(new_loss, call, trained):
    code, out, err = call(steal, *STEAL, "--losstype", "similarity")
    assert code == 0, err
    assert call(linear_eval, *JUDGE, "--stolen", out.splitlines()[-1].removeprefix("copy: "))[0] == 0


def test_the_attack_asks_as_it_says(call, trained, monkeypatch):
    preset = apply(monkeypatch, NEW_ATTACK, attacks, "ATTACKS")["ATTACKS"]["mean-of-four"]
    monkeypatch.setitem(steal.ATTACKS, "mean-of-four", preset)
    code, out, err = call(steal, *STEAL, "--attack", "mean-of-four", "-b", "6")
    assert code == 0, err
    assert "6 images of svhn" in out
    assert "queries: 24, of distinct images: 24" in out
    held = torch.load(out.splitlines()[-1].removeprefix("copy: "), weights_only=True)
    assert held["settings"]["losstype"] == "cosine"


def test_the_defence_is_a_flag_and_acts(call, trained, monkeypatch, tmp_path):
    file = tmp_path / "clip.py"
    file.write_text(NEW_DEFENCE)
    spec = importlib.util.spec_from_file_location("clip", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "clip", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setitem(defenses.DEFENCES, "clip", module.Clip)
    weights = []
    for ceiling in ("0.5", "0.001"):
        line = ("--defence", "clip,rounding", "--ceiling", ceiling, "--losstype", "mse")
        code, out, err = call(steal, *STEAL, *line)
        assert code == 0, err
        weights.append(torch.load(out.splitlines()[-1].removeprefix("copy: "), weights_only=True)["state_dict"])
    assert not torch.equal(*(state["backbone.conv1.weight"] for state in weights))
    user = (*SMALL, *VICTIM, "--num_queries", "40", "--num-test", "20", "--epochs", "1")
    assert call(legitimate, *user, "--defence", "clip")[0] == 0
