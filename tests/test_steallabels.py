"""Stealing a downstream classifier through its labels or probabilities."""

import json

import numpy as np
import pytest
import torch

import steallabels
from data_aug.datasets import load_dataset
from models import load_encoder, read_checkpoint
from tests.conftest import COPY, VICTIM
from victim import Api, Victim

ARCHES = ("--archvic", "resnet10w32", "--archstolen", "resnet10w32", "--device", "cpu", "--precision", "fp32")
STEAL = (*ARCHES, *VICTIM, *COPY, "-b", "8", "--dataset-test", "mnist")
SUPERVISED = ("--victimtype", "supervised", "--dataset-test", "cifar10")


@pytest.fixture
def row(call, trained, tmp_path):
    def stolen(*arguments):
        code, _, err = call(steallabels, *STEAL, *arguments)
        assert code == 0, err
        return json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])

    return stolen


def test_accuracies_and_agreement_are_those_of_the_two_classifiers(row, data, tmp_path):
    figures = row()
    images, labels = load_dataset("mnist", data, "test")
    copy = load_encoder(figures["checkpoint"])
    victim = load_encoder(next(tmp_path.rglob("victim-*-infonce-*seed0*/checkpoint.pth.tar")))
    layer = read_checkpoint(next(tmp_path.rglob("linear-mnist*/checkpoint.pth.tar")))["state_dict"]
    with torch.no_grad():
        copied = copy.project(images / 255).argmax(dim=1)
        original = (victim(images / 255) @ layer["fc.weight"].T + layer["fc.bias"]).argmax(dim=1)
    assert figures["top1"] == pytest.approx(100 * (copied == labels).double().mean().item(), abs=1e-4)
    assert figures["victim_top1"] == pytest.approx(100 * (original == labels).double().mean().item(), abs=1e-4)
    assert figures["agreement"] == pytest.approx(100 * (copied == original).double().mean().item(), abs=1e-4)


def test_an_api_answers_labels_or_probabilities(encoder, images):
    layer = torch.nn.Linear(256, 5)
    labels, probabilities = (
        Victim(Api(encoder, output, layer)).query(images) for output in ("labels", "probabilities")
    )
    with torch.no_grad():
        expected = layer(encoder.eval()(images / 255)).softmax(dim=1)
    torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-5)
    assert labels.shape == (12, 5)
    assert labels.sum(dim=1).eq(1).all()
    assert torch.equal(labels.argmax(dim=1), expected.argmax(dim=1))


def test_modes_are_their_published_recipes(row, tmp_path):
    settings = []
    for mode in ("direct", "knockoff"):
        figures = row("--mode", mode)
        settings.append(read_checkpoint(figures["checkpoint"])["settings"])
        assert figures["modeloutput"] == settings[-1]["modeloutput"]
    chosen = [(s["optimizer"], s["lr"], s["weight_decay"], s["modeloutput"]) for s in settings]
    assert chosen == [("adam", 3e-4, 8e-4, "labels"), ("sgd", 0.01, 5e-4, "logits")]


def test_a_supervised_victim_answers_by_its_own_layer(row):
    figures = row(*SUPERVISED)
    assert figures["downstream"] == "cifar10"
    assert figures["queries"] == 24


def test_refusals(refused, trained, tmp_path):
    before = set(tmp_path.rglob("*"))
    victim = next(tmp_path.rglob("victim-*-infonce-*seed0*/checkpoint.pth.tar"))
    text = refused(steallabels, *STEAL, "--dataset-test", "svhn")
    assert f"`python linear_eval.py --modeltype victim --victim {victim} --dataset-test svhn` trains one" in text
    assert "has no linear layer" in refused(steallabels, *STEAL, "--classifier", victim)
    assert "contradict" in refused(steallabels, *STEAL, "--mode", "knockoff", "--losstype", "direct")
    assert "classifies its own data set" in refused(steallabels, *STEAL, "--victimtype", "supervised")
    assert "24 of the 1040 test images were queried" in refused(
        steallabels, *STEAL, *SUPERVISED, "--datasetsteal", "cifar10", "--num-test", "1040"
    )
    assert set(tmp_path.rglob("*")) == before


def test_a_test_set_of_more_classes_than_the_victim_has_is_refused(refused, trained, tmp_path, data):
    images = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "many.npz", x_train=images[:12], y_train=range(12), x_test=images[12:], y_test=range(12))
    classifier = next(tmp_path.rglob("linear-mnist*/checkpoint.pth.tar"))
    test = ("--dataset-test", f"npz:{tmp_path / 'many.npz'}", "--classifier", classifier)
    assert "has more classes than the victim's 10" in refused(steallabels, *STEAL, *test)
