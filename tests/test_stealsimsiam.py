"""Stealing at ImageNet's scale, on folders of small images: what is sent, kept, paid for and shown."""

import functools
from typing import ClassVar

import numpy as np
import pytest
import torch

import simclr
import stealsimsiam
from attacks import defended
from attacks.client import Client
from attacks.records import Kept
from data_aug.images import Views, open_pictures
from jobs.ending import Stopped
from loss import STEAL_LOSSES
from models import load_encoder, read_checkpoint
from victim import Victim, image_digests

SMALL = ("--arch", "resnet10w32", "--size", "32", "-b", "8", "--workers", "0", "--device", "cpu", "--precision", "fp32")


@pytest.fixture
def steal(call, data, tmp_path):
    """Steals by the script; what the copy's checkpoint holds, and what was printed."""

    def run(*arguments, code=0):
        line = ("--pretrained", data / "simsiam.pth.tar", *SMALL, "--datasetsteal", "imagenet", "--num_queries", "16")
        found, out, err = call(stealsimsiam, *line, *arguments)
        assert found == code, err
        copies = [*tmp_path.rglob("stolen_simsiam-*/checkpoint.pth.tar")]
        return read_checkpoint(max(copies, key=lambda path: path.stat().st_mtime)) if copies else None, out + err

    return run


class Sent(Victim):
    """A victim that keeps the digests of all images ever sent to one of its kind."""

    seen: ClassVar[list] = []

    def query(self, images, account="default", gather=None):
        found = super().query(images, account, gather)
        self.seen.extend(image_digests(images))
        return found


@pytest.fixture
def sent(monkeypatch):
    monkeypatch.setattr(Sent, "seen", [])
    monkeypatch.setattr(defended, "Victim", Sent)
    monkeypatch.setattr(simclr, "Client", functools.partial(Client, batch_size=4))
    return Sent.seen


@pytest.mark.parametrize("view", ["crop", "center"])
def test_one_view_of_each_image_is_sent_once_and_drawn_from_the_seed(steal, sent, data, view):
    held, _ = steal("--epochs", "2", "--seed", "3", "--query-view", view)
    pictures = open_pictures("imagenet", data, "train")
    positions = held["query_indices"]
    assert len(positions.unique()) == 16 < len(pictures)
    assert len(pictures.labels[positions].unique()) == 4  # random ones, of all classes
    views = Views(pictures, view, 32, seed=3)
    expected = image_digests(torch.stack([views[int(position)] for position in positions]))
    assert sent == expected
    assert held["ledger"]["default"]["queries"] == 16
    assert sorted(bytes(row) for row in held["query_digests"].numpy()) == sorted(expected)


def test_the_copy_has_the_settings_of_the_2022_work(steal, data, tmp_path):
    held, out = steal("--epochs", "1", "--lars", "--losstype", "infonce", "--temperature", "0.1")
    assert held["settings"]["arch"] == "resnet10w32"
    assert held["arch"] == "resnet10w32-imagenet"
    assert held["normalize"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert held["input_size"] == 32
    assert held["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1 * 8 / 256)
    assert "lars" in out
    path = next(tmp_path.rglob("stolen_simsiam-*/checkpoint.pth.tar"))
    copy = load_encoder(path)
    # Its representations are of images in [0, 1], which it resizes and normalises itself.
    assert copy(torch.rand(2, 3, 40, 50)).shape == (2, 256)
    assert not [*path.parent.glob("queries-*")]


def test_without_augmentation_the_copy_is_shown_what_the_victim_saw(steal, sent, data, monkeypatch):
    shown = []
    original = stealsimsiam.SimCLR.features

    def features(self, network, inputs, views=1):
        shown.extend(image_digests(inputs))
        return original(self, network, inputs, views)

    monkeypatch.setattr(stealsimsiam.SimCLR, "features", features)
    steal("--epochs", "2", "--useaug", "False")
    assert sorted(shown) == sorted(2 * sent)
    shown.clear()
    sent.clear()
    steal("--epochs", "2", "--seed", "1")
    assert len(set(shown)) == 32  # fresh ones in each epoch
    assert not set(shown) & set(sent)


@pytest.mark.parametrize("losstype", STEAL_LOSSES)
def test_every_loss_trains_a_copy(steal, losstype):
    held, out = steal("--epochs", "1", "--losstype", losstype, "-b", "16", "--lr", "0.001")
    assert held["epoch"] == 1
    assert "epoch 1/1  loss" in out


@pytest.mark.parametrize("name", ["cifar10", "svhn", "npz:{data}/mnist.npz", "folder:{data}/imagenet", "textures"])
def test_queries_come_from_any_data_set(steal, data, name):
    name = name.format(data=data)
    held, out = steal("--epochs", "1", "--datasetsteal", name)
    assert held["query_set"] == {"dataset": name, "split": "train", "images": 16}
    assert "queries: 16" in out


def test_useval_queries_the_validation_split(steal):
    held, _ = steal("--epochs", "1", "--useval", "True")
    assert held["query_set"]["split"] == "test"


def test_a_killed_attack_pays_for_no_answer_twice(steal, sent, monkeypatch, tmp_path):
    steal("--epochs", "2", "--seed", "1")
    everything = list(sent)
    assert len(everything) == 16
    sent.clear()
    ask = Sent.query

    def killed(self, *arguments):
        if len(sent) == 8:
            raise Stopped("killed")
        return ask(self, *arguments)

    monkeypatch.setattr(Sent, "query", killed)
    steal("--epochs", "2", "--seed", "1", "--checkpoint-dir", tmp_path / "again", code=75)
    assert sent == everything[:8]
    monkeypatch.setattr(Sent, "query", ask)
    steal("--epochs", "2", "--seed", "1", "--checkpoint-dir", tmp_path / "again", "--resume")
    assert sent == everything


def test_answers_lie_in_a_file_as_float16(steal, sent, data, tmp_path, monkeypatch):
    kept = {}
    original = Client.ask

    def ask(self, *arguments):
        kept["answers"] = original(self, *arguments)
        kept["bytes"] = self.file.path.stat().st_size
        return kept["answers"]

    monkeypatch.setattr(Client, "ask", ask)
    steal("--epochs", "1")
    assert kept["bytes"] == 16 * (16 + 32 + 4 + 1 + 2 * 256)
    assert isinstance(kept["answers"], Kept)
    assert kept["answers"].answers.dtype == np.float16


def test_resume_from_a_file_and_start_epoch(steal, tmp_path, refused, data):
    steal("--epochs", "1")
    path = next(tmp_path.rglob("stolen_simsiam-*/checkpoint.pth.tar"))
    kept = tmp_path / "kept.pth.tar"
    path.rename(kept)
    held, out = steal("--epochs", "3", "--resume", kept)
    assert held["epoch"] == 3
    assert "resumed after epoch 1" in out
    assert "epoch 1/3" not in out
    _, out = steal("--epochs", "3", "--start-epoch", "2", "--seed", "5")
    assert "epoch 3/3" in out
    assert "epoch 2/3" not in out
    line = ("--pretrained", data / "simsiam.pth.tar", *SMALL, "--num_queries", "16")
    assert "is not the checkpoint of a run" in refused(stealsimsiam, *line, "--resume", data / "simsiam.pth.tar")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--num_queries", "25"), "25 images, the train split of imagenet has 24"),
        (("--data", "nowhere"), "no ImageNet: no folder nowhere/imagenet/train"),
        (("--evaluate",), "--evaluate has no effect here"),
        (("--epochstrain", "99"), "was trained for 100 epochs, not 99"),
        (("--dataset", "svhn"), "was trained with dataset imagenet, not svhn"),
        (("--losstype", "symmetrized", "--useaug", "False"), "symmetrized compares views"),
        (("--losstype", "mse", "--temperature", "0.1"), "--temperature has no effect with the loss mse"),
        (("--arch", "resnet50"), "resnet50"),
        (("--batch-size", "17"), "batch size 17 is larger than the 16 images"),
        (("--pretrained", "none"), "no checkpoint at none"),
        (("--defence", "poisoning"), "this victim has no head"),
    ],
)
def test_refusals(refused, data, arguments, said):
    line = ("--pretrained", data / "simsiam.pth.tar", *SMALL, "--datasetsteal", "imagenet", "--num_queries", "16")
    assert said in refused(stealsimsiam, *line, *arguments)


def test_a_victim_has_to_be_named(refused):
    assert "give --pretrained PATH" in refused(stealsimsiam, *SMALL)
