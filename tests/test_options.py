"""Flags, presets, and names of runs that no two settings share."""

import re
import sys

import linear_eval
import options
import run
import steal


def name_of(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    parser, args = module.parse()
    return options.run_name("x", parser, args, {"dataset": "{value}", "epochs": "{value}ep"})


def test_every_setting_that_matters_distinguishes_names(monkeypatch):
    variants = [
        [],
        ["--dataset", "svhn"],
        ["--arch", "resnet18"],
        ["--epochs", "3"],
        ["--seed", "1"],
        ["--lr", "0.1"],
        ["-b", "7"],
        ["--wd", "0"],
        ["--temperature", "0.5"],
        ["--out_dim", "64"],
        ["--num-train", "100"],
        ["--normalize"],
        ["--recipe", "released"],
        ["--flat-epochs", "3"],
        ["--precision", "bf16"],
        ["--n-views", "3"],
    ]
    names = [name_of(run, monkeypatch, *variant) for variant in variants]
    assert len(set(names)) == len(variants)
    same = [["--lr", "3e-4"], ["-b", "256"], ["--device", "cpu"], ["-data", "x"], ["--resume"], ["--workers", "1"]]
    assert {name_of(run, monkeypatch, *variant) for variant in same} == {names[0]}
    assert all(re.fullmatch(r"[\w.=+-]+", name) for name in names)


def test_presets_apply_only_where_nothing_was_given(monkeypatch):
    expected = {"infonce": (256, 3e-4), "softnn": (256, 1e-3), "mse": (64, 1e-3), "softce": (64, 1e-3)}
    for loss, (batch_size, lr) in {**expected, "wasserstein": (64, 1e-3)}.items():
        monkeypatch.setattr(sys, "argv", ["steal", "--losstype", loss])
        _, args = steal.parse()
        assert (args.batch_size, args.lr, args.weight_decay) == (batch_size, lr, 1e-4)
        monkeypatch.setattr(sys, "argv", ["steal", "--losstype", loss, "-b", "16", "--lr", "0.5", "--wd", "0"])
        _, args = steal.parse()
        assert (args.batch_size, args.lr, args.weight_decay) == (16, 0.5, 0.0)


def test_the_2022_command_lines_parse(monkeypatch):
    lines = {
        run: "-data ./datasets --dataset cifar10 --epochs 200 --arch resnet34",
        steal: "-data ./datasets --dataset cifar10 --datasetsteal svhn --epochs 100 --arch resnet34 --losstype mse "
        "--num_queries 9000",
        linear_eval: "--dataset cifar10 --datasetsteal svhn --dataset-test stl10 --losstype mse --num_queries 9000",
    }
    for module, line in lines.items():
        monkeypatch.setattr(sys, "argv", [module.__name__, *line.split()])
        _, args = module.parse()
        assert args.arch == "resnet34"
        assert str(args.data) == "datasets"
    assert (args.modeltype, args.epochs, args.epochstrain, args.lr, args.num_labeled) == (
        "stolen",
        100,
        200,
        1e-4,
        50000,
    )


def test_data_flag_has_both_spellings_and_switches_take_nothing(monkeypatch):
    for flag in ("-data", "--data"):
        monkeypatch.setattr(sys, "argv", ["steal", flag, "here", "--force", "--useaug", "False", "--resume", "True"])
        _, args = steal.parse()
        assert (str(args.data), args.force, args.useaug, args.resume) == ("here", True, False, True)
