"""The benchmarks run, at a size that says nothing about speed."""

import sys

import benchmarks
from benchmarks import linear_eval, train_step


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
