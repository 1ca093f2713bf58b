"""The benchmarks run, at a size that says nothing about speed."""

import sys

import pytest
import torch

import benchmarks.defences
from benchmarks import linear_eval, scaling, train_step
from defenses import DEFENCES, Call
from models import build_encoder
from utils import Precision


def test_tasks_alternate_and_the_first_round_does_not_count():
    calls = []
    seconds = benchmarks.alternate(2, a=lambda: calls.append("a"), b=lambda: calls.append("b"))
    assert calls == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}
    assert all(value >= 0 for value in seconds.values())


def test_train_step_prints_both_speeds_and_their_ratio(monkeypatch, capsys):
    arguments = ["--archs", "resnet10w32", "--batch-size", "4", "--steps", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["train_step", *arguments])
    train_step.main()
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    classic, ours, ratio = (float(cell) for cell in row[2:5])
    assert row[1].strip() == "resnet10w32"
    assert abs(ratio - ours / classic) < 0.1 * ratio


def test_linear_eval_prints_the_ratio(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["linear_eval", "--arch", "resnet10w32", "--images", "20", "--rounds", "1"])
    linear_eval.main()
    assert "ratio" in capsys.readouterr().out


def test_defences_prints_the_share_of_each(monkeypatch, capsys):
    arguments = ["--arch", "resnet10w32", "--queries", "4", "--memory", "10", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["defences", *arguments])
    benchmarks.defences.main()
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[-len(DEFENCES) - 1 :]]
    assert [name.strip() for name, _, _ in rows] == ["encoder", *DEFENCES]
    encoder = float(rows[0][1])
    for _, seconds, ratio in rows:
        assert float(ratio) == pytest.approx(float(seconds) / encoder, rel=0.02, abs=0.03)


def test_poisoning_is_timed_with_a_full_memory():
    earlier = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    defence = benchmarks.defences.full_poisoning(earlier, torch.sign, size=4)
    assert defence.poison_memory == len(defence.scores()) == 10
    oldest = Call(digests=[], representations=earlier[:1], project=torch.sign)
    assert defence.nearest(oldest).item() == pytest.approx(1)


def test_what_many_gpus_exchange_and_keep():
    """Of the small network, whose numbers can be counted by hand."""
    network = build_encoder("resnet10w32-imagenet")
    parameters = sum(one.numel() for one in network.parameters())
    channels = 32 + 2 * 32 + 3 * (64 + 128 + 256)  # of the stem, the first stage, and the others with their shortcuts
    alone, four = (scaling.exchanged("resnet10w32-imagenet", 64, gpus) for gpus in (1, 4))
    assert alone["gradients"] == alone["features"] == alone["batch norms"] == 0
    assert four["gradients"] == 1.5 * 4 * parameters
    assert four["features"] == 0.75 * 4 * 64 * 256
    norms = (four["collectives"] - 2) / 2
    assert norms == 12
    assert four["batch norms"] == 3 * 4 * (2 * channels + norms) + 1.5 * 4 * 2 * channels
    # Twice the side is four times the memory, but for what doesn't depend on it.
    small, large = (scaling.kept_for_backward("resnet10w32-imagenet", size) for size in (32, 64))
    assert 3.5 < large / small < 4.1


def test_a_step_and_nothing_else_is_measured_for_one_process():
    args = scaling.Scaling(arch="resnet10w32-imagenet", size=32, batch_size=4, rounds=1)
    found = scaling.measure(args, Precision("fp32", torch.device("cpu")))
    assert found.keys() == {"step"}
    assert found["step"] > 0
