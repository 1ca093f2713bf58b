"""Compiled networks: when a run compiles, and that it trains what the uncompiled run trains."""

import pytest
import torch

from data_aug.images import Stored
from loss import STEAL_LOSSES, TRAIN_LOSSES
from models import build_encoder
from simclr import SimCLR
from tests.networks import FP32, small_encoder
from training import compiling
from training.compiling import WORTH, compiles
from training.recipe import Recipe
from training.run import Run
from utils import Precision, UserError, seeded
from victim import Victim

CPU = torch.device("cpu")
BF16 = Precision("bf16", CPU)


@pytest.mark.parametrize(
    ("how", "precision", "images", "expected"),
    [
        ("auto", BF16, WORTH, True),
        ("auto", BF16, WORTH - 1, False),
        ("auto", FP32, 100 * WORTH, False),  # not measured
        ("auto", Precision("bf16", torch.device("cuda")), 100 * WORTH, False),  # not measured
        ("off", BF16, 100 * WORTH, False),
        ("on", FP32, 1, True),
    ],
    ids=str,
)
def test_long_runs_compile_where_it_was_measured_to_pay(how, precision, images, expected, monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert compiles(Recipe(compile=how), precision, images) == expected


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not compiles(Recipe(), BF16, 100 * WORTH)
    with pytest.raises(UserError, match=r"--compile on needs a C\+\+ compiler, and there is no no-such-compiler"):
        compiles(Recipe(compile="on"), BF16, 1)


def test_several_processes_do_not_compile(monkeypatch):
    monkeypatch.setattr(compiling, "processes", lambda: 2)
    assert not compiles(Recipe(), BF16, 100 * WORTH)
    with pytest.raises(UserError, match="--compile on needs one process, this is one of 2"):
        compiles(Recipe(compile="on"), BF16, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["infonce", "simsiam", "copy"])
def test_a_compiled_run_is_the_uncompiled_one_up_to_rounding(kind, images, tmp_path, capsys):
    """Also where the last batch of an epoch is smaller, and after a stop: resumed, it is the whole compiled run."""

    def train(folder, how, epochs=2, resume=False):
        with seeded(0):
            model = build_encoder("resnet10w32", None if kind == "copy" else 16)
            loss = STEAL_LOSSES["mse"] if kind == "copy" else TRAIN_LOSSES[kind]
            companion = loss.make_companion(model, len(images), 5)
        # Adam would make rounding of small gradients as large as any other, and InfoNCE at 0.07 magnifies it.
        values = {"optimizer": "sgd", "lr": 1e-4, "schedule": "constant"}
        recipe = Recipe(epochs=epochs, batch_size=5, compile=how, **values)
        trainer = SimCLR(model, loss, recipe, Run(tmp_path / folder, FP32, resume=resume), companion)
        if kind == "copy":
            trainer.steal(Stored(images), Victim(small_encoder(seed=0, dim=256)))
        else:
            trainer.train(Stored(images))
        return [line["loss"] for line in Run(tmp_path / folder, FP32).lines()], model.state_dict()

    losses, weights = train("compiled", "on")
    assert "compiling" in capsys.readouterr().out
    expected, plain = train("plain", "off")
    assert losses == pytest.approx(expected, rel=1e-3)
    for key, value in plain.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)
    train("stopped", "on", epochs=1)
    _, resumed = train("stopped", "on", resume=True)
    assert all(torch.equal(value, weights[key]) for key, value in resumed.items())
