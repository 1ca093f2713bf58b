"""Linear evaluation at ImageNet's scale: on representations computed once, or of fresh crops."""

import json

import numpy as np
import pytest
import torch

import linsimsiam
import stealsimsiam
from data_aug.images import Views, open_pictures
from data_aug.shapes import make_shapes
from models import load_encoder, read_checkpoint
from simclr import SimCLR

SMALL = ("--arch", "resnet10w32", "--size", "32", "-b", "8", "--workers", "0", "--device", "cpu", "--precision", "fp32")


@pytest.fixture
def judge(call, data, tmp_path):
    """Judges by the script; the row, and what was printed."""

    def run(*arguments, code=0):
        found, out, err = call(linsimsiam, *SMALL, *arguments)
        assert found == code, err
        rows = (tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()
        return json.loads(rows[-1]), out + err

    return run


@pytest.fixture
def victim(data):
    return ("--pretrained", data / "simsiam.pth.tar")


@pytest.fixture
def copy(call, data, tmp_path, victim):
    """A copy stolen with 12 queries of the validation split."""
    line = (*SMALL, *victim, "--datasetsteal", "imagenet", "--useval", "True", "--num_queries", "12", "--epochs", "1")
    assert call(stealsimsiam, *line, "--losstype", "infonce")[0] == 0
    return next(tmp_path.rglob("stolen_simsiam-*/checkpoint.pth.tar"))


def test_the_layer_is_that_of_gradient_descent_on_the_centres(judge, victim, data, tmp_path):
    """One epoch of one batch: the step can be done by hand."""
    row, _ = judge(*victim, "--dataset", "imagenet", "--epochs", "1", "-b", "24", "--lr", "0.5")
    encoder = load_encoder(data / "simsiam.pth.tar")
    spaces = {}
    for split in ("train", "test"):
        pictures = open_pictures("imagenet", data, split)
        views = Views(pictures, "center", 32)
        with torch.no_grad():
            spaces[split] = encoder(torch.stack([views[i] for i in range(len(views))]) / 255), pictures.labels
    (_, labels), (test_h, test_labels) = spaces["train"], spaces["test"]
    state = read_checkpoint(next(tmp_path.rglob("linear_simsiam-*/checkpoint.pth.tar")))["state_dict"]
    # Weights begin at N(0, 0.01^2), biases at 0; from the first bias step on the gradient is that of these.
    error = (torch.zeros(24, 4).softmax(dim=1) - torch.eye(4)[labels]) / 24
    torch.testing.assert_close(state["fc.bias"], -0.5 * 24 / 256 * error.sum(dim=0), rtol=0.05, atol=1e-3)
    predicted = (test_h @ state["fc.weight"].T + state["fc.bias"]).argmax(dim=1)
    assert row["top1"] == pytest.approx(100 * (predicted == test_labels).float().mean().item(), abs=6.3)
    assert (row["train_images"], row["test_images"]) == (24, 16)


@pytest.mark.parametrize(
    "name", [pytest.param("cifar10", marks=pytest.mark.slow), "svhn", "npz:{data}/mnist.npz", "folder:{data}/imagenet"]
)
def test_any_data_set_can_be_judged_on(judge, victim, data, name):
    row, _ = judge(*victim, "--dataset", name.format(data=data), "--epochs", "1")
    assert 0 <= row["top1"] <= row["top5"] <= 100
    assert row["downstream"] == name.format(data=data)


def test_training_fits_what_it_is_trained_on(judge, victim, tmp_path):
    """Judged on its training images: even random representations tell so few apart."""
    images, labels = make_shapes("train")
    few = labels < 4
    arrays = {"x": images[few][:24].permute(0, 2, 3, 1).numpy(), "y": labels[few][:24].numpy()}
    np.savez(tmp_path / "same.npz", **{f"{name}_{split}": arrays[name] for name in "xy" for split in ("train", "test")})
    line = (*victim, "--dataset", f"npz:{tmp_path}/same.npz", "--lr", "50")
    assert judge(*line, "--epochs", "100")[0]["top1"] > 90
    assert judge(*line, "--epochs", "1")[0]["top1"] < 90


def test_images_that_the_copy_queried_are_no_test_images(judge, copy):
    line = ("--modeltype", "stolen", "--datasetsteal", "imagenet", "--num_queries", "12", "--epochs", "1")
    row, _ = judge(*line, "--dataset", "imagenet")
    assert (row["test_images"], row["test_images_queried"]) == (4, 12)
    assert (row["queries"], row["distinct"]) == (12, 12)
    row, _ = judge(*line, "--dataset", "cifar10")
    assert row["test_images_queried"] == 0


def test_a_copy_is_found_by_flags_or_those_there_are_named(judge, copy, refused):
    line = ("--modeltype", "stolen", "--dataset", "imagenet", "--datasetsteal", "imagenet")
    error = refused(linsimsiam, *SMALL, *line, "--num_queries", "250000", "--losstype", "infonce")
    assert "no stolen-simsiam encoder with" in error
    for words in ("datasetsteal imagenet", "losstype infonce", "num_queries 250000", "archstolen resnet10w32"):
        assert words in error
    assert f"there: {copy.parent}" in error
    row, _ = judge("--modeltype", "stolen", "--stolen", copy, "--dataset", "imagenet", "--epochs", "1")
    assert row["checkpoint"] == str(copy)


def test_augmented_crops_differ_in_each_epoch_and_need_the_encoder(judge, victim, monkeypatch):
    seen = []
    original = SimCLR.train_probe

    def train_probe(self, images, labels, encoder=None):
        for epoch in (0, 1):
            seen.extend(batch.images for batch in images.batches([torch.arange(4)], torch.device("cpu"), epoch))
        return original(self, images, labels, encoder)

    monkeypatch.setattr(SimCLR, "train_probe", train_probe)
    row, _ = judge(*victim, "--dataset", "imagenet", "--epochs", "2", "--augment")
    assert row["probe"] == "augmented crops"
    assert not torch.equal(*seen)


def test_evaluate_judges_again_without_training(judge, victim, refused):
    line = (*victim, "--dataset", "imagenet", "--epochs", "2")
    assert "to --evaluate: train it first" in refused(linsimsiam, *SMALL, *line, "--evaluate")
    row, _ = judge(*line)
    again, out = judge(*line, "--evaluate")
    assert (again["top1"], again["top5"]) == (row["top1"], row["top5"])
    assert "epoch 1/2" not in out
    _, out = judge(*line, "--resume")
    assert "has its results already" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--modeltype", "victim"), "give --pretrained PATH"),
        (("--pretrained", "none"), "no checkpoint at none"),
        (("--losstype", "mse"), "--losstype has no effect with --modeltype victim"),
        (("--epochstrain", "3"), "--epochstrain has no effect without --pretrained"),
        (("--modeltype", "stolen", "--dataset", "imagenet"), "no stolen-simsiam encoder"),
        (("--dataset", "caltech"), "unknown data set 'caltech'"),
    ],
)
def test_refusals(refused, arguments, said):
    assert said in refused(linsimsiam, *SMALL, *arguments)
