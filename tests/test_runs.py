"""Names that no two settings share, and finding what earlier runs made."""

import re
import sys

import pytest
import torch
import yaml

import run
import runs
from runs import home_of, locate
from utils import UserError


def name_of(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    parser, args = module.parse()
    return runs.run_name("x", parser, args, ("dataset", "epochs"))


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


def test_what_the_folder_above_stands_for_is_not_repeated(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--dataset", "svhn", "--arch", "resnet18", "--n-views", "3"])
    parser, args = run.parse()
    assert runs.run_name("x", parser, args, ("epochs", "seed"), implied=("dataset", "arch")) == "x-200ep-seed0-nviews=3"


@pytest.fixture
def make_run(tmp_path):
    """Writes a run's config.yml and an empty checkpoint; returns the checkpoint's path."""

    def made(name, kind="victim", **settings):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yml").write_text(yaml.safe_dump({"kind": kind, "settings": settings}))
        (folder / "checkpoint.pth.tar").touch()
        return folder / "checkpoint.pth.tar"

    return made


def test_find_run_prefers_step_by_step_and_lists_what_it_cannot_decide(make_run, tmp_path):
    first, second = make_run("a", arch="x", seed=0, lr=1), make_run("b", arch="x", seed=1, lr=1)
    make_run("c", kind="stolen", arch="x", seed=0)
    assert runs.find_run(tmp_path, "victim", {"arch": "x"}, {"seed": 1}) == second
    assert runs.find_run(tmp_path, "victim", {"arch": "x"}, {}, besides=second) == first
    with pytest.raises(UserError, match=r"several victim encoders with arch x: .*/a/.*/b/.*; give --victim PATH"):
        runs.find_run(tmp_path, "victim", {"arch": "x"}, {"seed": 7})
    with pytest.raises(UserError, match=r"no victim encoder with arch y .*/a/.*; or give --independent PATH"):
        runs.find_run(tmp_path, "victim", {"arch": "y"}, {}, flag="--independent")


def test_home_of_a_file_from_elsewhere_is_named_by_its_content(make_run, tmp_path):
    own = make_run("a")
    assert runs.home_of(own, tmp_path) == own.parent
    homes = set()
    for text in ("1", "2"):
        path = tmp_path / f"other{text}" / "model.pth.tar"
        path.parent.mkdir()
        path.write_text(text)
        homes.add(runs.home_of(path, tmp_path / "runs").name)
    assert len(homes) == 2
    assert all(re.fullmatch(r"model-[0-9a-f]{8}", home) for home in homes)


def test_interrupted_runs_are_refused_and_files_of_2022_are_not(tmp_path):
    runs.check_finished({"epoch": 200, "arch": "resnet34"}, tmp_path)
    runs.check_finished({"epoch": 2, "settings": {"epochs": 2}}, tmp_path)
    with pytest.raises(UserError, match="stopped after epoch 1 of 2"):
        runs.check_finished({"epoch": 1, "settings": {"epochs": 2}}, tmp_path)


def test_ledger_figures_count_an_image_once_whichever_accounts_asked():
    digests = torch.arange(48, dtype=torch.uint8)  # three images
    ledger = {
        "a": {"queries": 5, "calls": 1, "images": digests[:32]},
        "b": {"queries": 2, "calls": 1, "images": digests[16:]},
    }
    assert runs.ledger_figures({"ledger": ledger}) == {"queries": 7, "distinct": 3}
    assert runs.ledger_figures({}) == {"queries": 0, "distinct": 0}


def test_locate_takes_paths_folders_and_names(tmp_path):
    for name in ("a/x", "b/x", "b/y", "other"):
        (tmp_path / name).mkdir(parents=True)
        if name != "other":
            (tmp_path / name / "checkpoint.pth.tar").touch()
    found = {name: locate(tmp_path.__class__(name), tmp_path) for name in ("y", "a/x", "nothing", "other")}
    assert found["y"] == tmp_path / "b" / "y" / "checkpoint.pth.tar"
    assert found["a/x"] == tmp_path / "a" / "x" / "checkpoint.pth.tar"
    assert str(found["nothing"]) == "nothing"
    assert locate(tmp_path / "other", tmp_path) == tmp_path / "other"
    assert locate(tmp_path / "b" / "y", tmp_path / "a") == found["y"]
    with pytest.raises(UserError, match=r"several runs are named x: .*/a/x/.*/b/x/"):
        locate(tmp_path.__class__("x"), tmp_path)


def test_the_home_of_a_folder_follows_its_content(tmp_path):
    folder = tmp_path / "bought"
    folder.mkdir()
    (folder / "config.json").write_text("1")
    first = home_of(folder, tmp_path)
    assert first.name.startswith("bought-")
    (folder / "config.json").write_text("2")
    assert home_of(folder, tmp_path) != first
