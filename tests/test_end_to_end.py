"""On the embedded data set, as a user would: every loss and every attack trains a step, saves, loads, is evaluated."""

import functools
import json

import pytest
import torch

import linear_eval
import run
import steal
import stealhead
import steallabels
from attacks import ATTACKS
from data_aug.datasets import DATASETS
from defenses import DEFENCES
from loss import HEAD_LOSSES, LABEL_LOSSES, STEAL_LOSSES, TRAIN_LOSSES
from models import load_encoder, read_checkpoint
from tests.conftest import made

ARCH, CPU = "resnet10w32", ("--device", "cpu")
TRAIN = ("--dataset", "shapes", "--arch", ARCH, "--num-train", "64", "--epochs", "1", "-b", "32", *CPU)
VICTIM = ("--dataset", "shapes", "--epochstrain", "1")
BY_INFONCE = ("--lossvictim", "infonce")
COPY = ("--datasetsteal", "shapes", "--num_queries", "24", "--epochs", "1")
STEAL = (*VICTIM, *COPY, "-b", "6", *CPU)
JUDGE = ("--dataset-test", "shapes", "-n", "40", "--num-test", "30", "--probe-epochs", "2", *CPU)


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """The embedded data set takes a second to draw: once is enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "shapes", functools.cache(DATASETS["shapes"]))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def done(call, home):
    """Runs a script that must succeed; returns its output."""

    def run_script(module, *arguments):
        code, out, err = call(module, *arguments, folder=home)
        assert code == 0, err
        return out

    return run_script


@pytest.fixture
def judged(done, home):
    """The row of an evaluation."""

    def row(*arguments):
        done(linear_eval, *JUDGE, *arguments)
        return json.loads((home / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])

    return row


@pytest.fixture
def victim(done, home):
    """The victim's flags; trained once."""
    done(run, *TRAIN, "--resume")
    return ("--arch", ARCH, *BY_INFONCE)


def stolen(out):
    """The checkpoint that a script says it wrote, and what it holds."""
    path = made(out)
    return path, read_checkpoint(path)


@pytest.mark.parametrize("losstype", TRAIN_LOSSES)
def test_every_training_loss_makes_a_victim_that_is_judged_and_stolen(losstype, done, judged):
    done(run, *TRAIN, "--losstype", losstype)
    row = judged("--modeltype", "victim", *VICTIM, "--arch", ARCH, "--losstype", losstype)
    assert (row["losstype"], row["test_images"], row["queries"]) == (losstype, 30, 0)
    out = done(steal, *STEAL, "--arch", ARCH, "--archstolen", ARCH, "--lossvictim", losstype, "--losstype", "mse")
    path, checkpoint = stolen(out)
    assert checkpoint["settings"]["lossvictim"] == losstype
    assert judged("--stolen", path, "--arch", ARCH, "--losstype", "mse")["queries"] == 24


@pytest.mark.parametrize("losstype", STEAL_LOSSES)
def test_every_loss_steals(losstype, victim, done, judged):
    views = STEAL_LOSSES[losstype].min_views
    path, checkpoint = stolen(done(steal, *STEAL, *victim, "--archstolen", ARCH, "--losstype", losstype))
    assert checkpoint["query_set"]["images"] == 24 // views
    row = judged(*VICTIM[:2], *COPY, "--arch", ARCH, "--losstype", losstype, "--stolen", path)
    assert (row["losstype"], row["attack"], row["queries"], row["distinct"]) == (losstype, "direct", 24, 24)
    assert row["attacker_labels"] == (losstype == "supcon")
    assert load_encoder(path)(torch.rand(2, 3, 32, 32)).shape == (2, 256)


# Queries for each image, and rows of it in a step, as the methods' descriptions have them.
SENT = {"direct": 1, "conventional": 1, "cont-steal": 1, "stolenencoder": 1, "rda": 10, "own-simclr": 0}


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_steals_with_the_queries_of_its_description(attack, victim, done, judged):
    images = 6
    budget = ("--num_queries", str(images * (SENT[attack] or 1)))
    path, checkpoint = stolen(done(steal, "--attack", attack, *STEAL, *budget, *victim, "--archstolen", ARCH))
    ledger = checkpoint.get("ledger", {"default": {"queries": 0}})["default"]
    assert ledger["queries"] == images * SENT[attack]
    assert checkpoint["query_set"]["images"] == images
    row = judged("--attack", attack, *VICTIM[:2], *COPY, *budget, "--arch", ARCH)
    assert (row["attack"], row["queries"], row["checkpoint"]) == (attack, images * SENT[attack], path)


@pytest.mark.parametrize("losstype", ["mse", pytest.param("infonce", marks=pytest.mark.slow)])
@pytest.mark.parametrize("defence", DEFENCES)
def test_every_defence_is_met_by_attack_and_evaluation(defence, losstype, victim, done, judged):
    out = done(steal, *STEAL, *victim, "--archstolen", ARCH, "--losstype", losstype, "--defence", defence)
    _, checkpoint = stolen(out)
    assert checkpoint["settings"]["defence"] == defence
    assert checkpoint["ledger"]["default"]["queries"] == 24
    names = ("--defence", defence, "--losstype", losstype)
    row = judged(*VICTIM[:2], *COPY, "--arch", ARCH, *names)
    assert (row["defence"], row["losstype"], row["queries"]) == (defence, losstype, 24)
    assert {name for name in row if name.startswith(f"{defence}_")} == checkpoint.get("defence_report", {}).keys()


@pytest.mark.parametrize(("losstype", "chosen"), [("mse", "noise"), ("infonce", "poisoning"), ("softnn", "poisoning")])
def test_defence_true_is_that_of_the_2022_code(losstype, chosen, victim, done, judged):
    out = done(
        steal, *STEAL, *victim, "--archstolen", ARCH, "--losstype", losstype, "--defence", "True", "--n-views", "2"
    )
    _, checkpoint = stolen(out)
    assert checkpoint["settings"]["defence"] == chosen
    assert ("poisoning f1 " in out) == ("poisoning auc " in out) == (chosen == "poisoning")


@pytest.mark.parametrize("losshead", HEAD_LOSSES)
def test_every_head_loss_steals_within_one_budget(losshead, victim, done, judged):
    true_head = ("--victimhead", "True") if losshead == "msewithhead" else ()
    arches = ("--archvic", ARCH, "--arch", ARCH, *BY_INFONCE)
    out = done(stealhead, *STEAL, *arches, "--losshead", losshead, *true_head, "--epochshead", "1")
    path, checkpoint = stolen(out)
    assert checkpoint["ledger"]["default"]["queries"] == 24
    assert "of these queries 12 train the head, all 24 train the copy" in out
    row = judged("--head", "True", *VICTIM[:2], *COPY, "--arch", ARCH, "--stolen", path)
    assert (row["attack"], row["queries"]) == ("stealhead", 24)


@pytest.mark.parametrize("kind", ["simclr", "supervised"])
@pytest.mark.parametrize("mode", LABEL_LOSSES)
def test_labels_are_stolen_from_either_kind_of_victim(mode, kind, victim, done, judged, home):
    if kind == "supervised":
        done(run, *TRAIN, "--losstype", "supervised", "--resume")
    else:
        done(linear_eval, *JUDGE, "--modeltype", "victim", *VICTIM, "--arch", ARCH, "--losstype", "infonce", "--resume")
    test = ("--dataset-test", "shapes", "--num-test", "30", "--mode", mode, "--victimtype", kind)
    by = ("--lossvictim", "infonce") if kind == "simclr" else ()
    out = done(steallabels, *STEAL, "--archvic", ARCH, "--arch", ARCH, *test, *by)
    path, checkpoint = stolen(out)
    row = json.loads((home / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    assert (row["attack"], row["losstype"], row["queries"], row["test_images"]) == ("steallabels", mode, 24, 30)
    assert {"top1", "top5", "victim_top1", "agreement"} <= row.keys()
    assert judged("--stolen", path, "--arch", ARCH)["queries"] == checkpoint["ledger"]["default"]["queries"]
