"""Defences that learn from the owner's images: which images these are, and what a script says of a defence."""

import pytest
import torch

import steal
from attacks.defended import owner_images
from data_aug.datasets import load_training
from files.writing import save_checkpoint
from models import read_checkpoint
from tests.conftest import ATTACK, STEAL, made
from utils import UserError
from victim import image_digests

KMEANS = ("--defence", "buckets", "--bucket-bits", "3", "--bucket-cells", "kmeans")


def test_the_owners_images_are_those_that_the_victim_was_trained_on(data, tmp_path):
    path = tmp_path / "victim.pth.tar"
    save_checkpoint({"settings": {"dataset": "cifar10", "num_train": 20, "seed": 3, "losstype": "infonce"}}, path)
    trained_on = image_digests(load_training("cifar10", data, False, 20, 3)[0])
    assert sorted(image_digests(owner_images(path, data, 100, seed=0))) == sorted(trained_on)
    some = owner_images(path, data, 8, seed=0)
    assert len(some) == 8
    assert set(image_digests(some)) < set(trained_on)
    assert torch.equal(owner_images(path, data, 8, seed=0), some)


def test_a_script_says_what_its_budget_can_reach_and_makes_the_cells(call, trained):
    code, out, err = call(steal, *STEAL, *KMEANS)
    assert code == 0, err
    assert "buckets: an account with 24 queries occupies 95.9 % of 8 buckets" in out
    report = read_checkpoint(made(out))["defence_report"]
    assert 12.5 <= report["buckets_coverage"] <= 100
    assert report["buckets_even_coverage"] == pytest.approx(100 * (1 - (7 / 8) ** 24))
    code, again, err = call(steal, *STEAL, *KMEANS, "--resume")
    assert code == 0, err
    assert read_checkpoint(made(again))["defence_report"] == pytest.approx(report)


def test_where_the_owners_images_are_not_at_hand_a_line_says_so(refused, trained, tmp_path):
    state = read_checkpoint(trained.parent.parent / "checkpoint.pth.tar")
    save_checkpoint({"state_dict": state["state_dict"], "arch": state["arch"]}, tmp_path / "foreign.pth.tar")
    said = refused(steal, "--victim", tmp_path / "foreign.pth.tar", *ATTACK, *KMEANS)
    assert "the owner's images, from which a defence learns, are not here" in said
    assert "foreign.pth.tar does not name its data set): give --bucket-cells hyperplanes" in said
    save_checkpoint({"settings": {"dataset": "imagenet"}}, tmp_path / "large.pth.tar")
    with pytest.raises(UserError, match=r"unknown data set 'imagenet'.*: give --bucket-cells hyperplanes"):
        owner_images(tmp_path / "large.pth.tar", tmp_path, 10, seed=0)
