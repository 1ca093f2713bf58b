"""What keeps it fast, as structure: no step waits for the device, and nothing is computed twice."""

import contextlib
import math
import subprocess
import sys

import pytest
import torch

import attacks.answers
import simclr
import steal
from attacks import ATTACKS, Attack
from data_aug.images import Stored
from evaluation.probes import Probe, represent_both, scores_by
from loss import STEAL_LOSSES, TRAIN_LOSSES
from models import SimSiamHeads, build_encoder
from simclr import SimCLR
from tests.conftest import ROOT
from tests.networks import FP32, few, small_encoder
from training.loop import Loop
from training.monitor import Watch
from training.objective import Loss
from training.recipe import Recipe
from training.run import Run
from utils import Precision
from victim import Victim

META = Precision("fp32", torch.device("meta"))


@pytest.fixture
def on_meta(monkeypatch):
    """Training on torch's meta device, which has shapes but no values: reading a value back to the host is an error.

    Left out is what reads once in an epoch, not in a step: the losses' mean, the spread of the targets, the checkpoint.
    """
    monkeypatch.setattr(Watch, "_read", lambda self: None)
    monkeypatch.setattr(Watch, "close", lambda self: (0.0, 0.0))
    monkeypatch.setattr(SimCLR, "_look_at", lambda self, answers: None)
    monkeypatch.setattr(Loop, "_save", lambda self, *more: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    steps = []
    original = Loop._step
    monkeypatch.setattr(Loop, "_step", lambda self, *arguments: (steps.append(1), original(self, *arguments))[1])
    # The fused optimizers have no meta kernels.
    monkeypatch.setattr(Loop, "_optimizer", lambda self: torch.optim.Adam(self.model.parameters(), lr=1e-3))
    return steps


def test_the_meta_device_tells_who_waits(on_meta):
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(2, device="meta").sum().item()


@pytest.mark.parametrize("name", TRAIN_LOSSES)
def test_no_step_of_a_victims_training_waits_for_the_device(name, on_meta, images, tmp_path):
    loss, recipe, encoder = few(TRAIN_LOSSES[name]), Recipe(epochs=2, batch_size=4), build_encoder("resnet10w32", 4)
    companion = loss.make_companion(encoder, 12, 4)
    trainer = SimCLR(encoder, loss, recipe, Run(tmp_path, META), companion)
    trainer.train(Stored(images), torch.arange(12) % 4, loss.min_views)
    assert len(on_meta) == 6


@pytest.mark.parametrize("name", STEAL_LOSSES)
def test_no_step_of_an_attack_by_any_loss_waits_for_the_device(name, on_meta, images, tmp_path):
    loss = STEAL_LOSSES[name]
    heads = SimSiamHeads(32, 16) if loss.predictor else None
    trainer = SimCLR(small_encoder(), loss, Recipe(epochs=2, batch_size=4), Run(tmp_path, META), heads)
    attack = Attack(n_views=loss.min_views, plain_first=loss.plain_first, unit_answers=loss.unit_answers)
    trainer.steal(Stored(images), Victim(small_encoder(seed=0)), attack, torch.arange(12) % 4)
    assert len(on_meta) == 6


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "own-simclr"])
def test_no_step_of_a_published_attack_waits_for_the_device(name, on_meta, images, tmp_path):
    command = steal.parse(["--attack", name, "--epochs", "2", "-b", "4"])
    trainer = SimCLR(small_encoder(), command[Loss], command[Recipe], Run(tmp_path, META))
    trainer.steal(Stored(images), Victim(small_encoder(seed=0)), command[Attack])
    assert len(on_meta) == 6


# ---- nothing twice ----


class Counted(torch.nn.Module):
    """Counts an encoder's forward passes and the images that went through."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.calls, self.images = encoder, 0, 0
        self.dim = encoder.dim

    def forward(self, images):
        self.calls, self.images = self.calls + 1, self.images + len(images)
        return self.encoder(images)


@pytest.mark.parametrize("count", [1, 512, 513, 1100])
def test_the_victim_runs_as_often_as_there_are_batches_whatever_the_epochs(count, monkeypatch, tmp_path):
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    encoder = small_encoder(seed=0)
    forward, seen = type(encoder).forward, []
    monkeypatch.setattr(encoder, "forward", lambda x: (seen.append(len(x)), forward(encoder, x))[1])
    recipe = Recipe(epochs=3, batch_size=max(1, count // 2))
    SimCLR(small_encoder(), STEAL_LOSSES["mse"], recipe, Run(tmp_path, FP32)).steal(Stored(images), Victim(encoder))
    assert sum(seen) == count
    assert len(seen) == math.ceil(count / 512)


def test_an_evaluation_runs_the_backbone_once_over_the_data():
    draw = torch.Generator().manual_seed(0)
    train, test = (
        (torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=draw), torch.arange(n) % 4)
        for n in (60, 30)
    )
    encoder = Counted(small_encoder(seed=0))
    scores, _ = scores_by(Probe(probe_epochs=3), *represent_both(encoder, train, test, FP32))
    assert {"top1", "top1_converged", "knn"} <= scores.keys()
    assert (encoder.images, encoder.calls) == (90, 2)


@pytest.mark.parametrize("kind", ["victim", "copy"])
def test_the_draws_of_an_epoch_are_made_at_once(kind, images, monkeypatch, tmp_path):
    made = []
    for module in (simclr, attacks.answers):
        original = module.draw_views
        monkeypatch.setattr(module, "draw_views", lambda n, *more, of=original: (made.append(n), of(n, *more))[1])
    recipe = Recipe(epochs=3, batch_size=4)
    if kind == "victim":
        trainer = SimCLR(small_encoder(16), TRAIN_LOSSES["infonce"], recipe, Run(tmp_path, FP32))
        trainer.train(Stored(images))
    else:
        trainer = SimCLR(small_encoder(), STEAL_LOSSES["infonce"], recipe, Run(tmp_path, FP32))
        trainer.steal(Stored(images), Victim(small_encoder(seed=0)), Attack(useaug=True, copy_views=2))
    assert made == [24] * 3


def test_a_training_begins_without_what_only_judging_needs():
    """Seconds until the first step: these libraries are imported where they are used."""
    heavy = ["scipy.stats", "sklearn", "matplotlib", "pandas", "timm", "transformers", "torch.utils.tensorboard"]
    program = f"import sys, run, steal, stealhead; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
