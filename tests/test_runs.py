"""Names that no two settings share, finding what earlier runs made, and listing it."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import linear_eval
import run
import runs
import steal
from attacks.victims import VictimChoice
from settings import Parser
from tests.conftest import call_main
from tests.networks import FP32
from training import finding
from training.finding import check_finished, home_of, locate
from training.record import Record
from training.run import open_run, run_name
from utils import UserError


def name_of(*arguments):
    return run_name(run.parse(arguments))


def test_every_setting_that_matters_distinguishes_names():
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
    names = [name_of(*variant) for variant in variants]
    assert len(set(names)) == len(variants)
    same = [["--lr", "3e-4"], ["-b", "256"], ["--device", "cpu"], ["-data", "x"], ["--resume"], ["--workers", "1"]]
    assert {name_of(*variant) for variant in same} == {names[0]}
    assert all(re.fullmatch(r"[\w.=+-]+", name) for name in names)


@pytest.fixture
def make_run(tmp_path):
    """Writes a run's config.yml and an empty checkpoint; returns the checkpoint's path."""

    def made(name, kind="victim", **settings):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yml").write_text(yaml.safe_dump({"kind": kind, "settings": settings}))
        (folder / "checkpoint.pth.tar").touch()
        return folder / "checkpoint.pth.tar"

    return made


@pytest.fixture
def find(tmp_path):
    """`finding.find` of a victim below the test's folder, by a command line."""

    def found(line="", wanted=None, **options):
        command = Parser("test", [VictimChoice], kind="x").parse(line.split())
        return finding.find(command, "victim", "victim", wanted or {}, tmp_path, **options)

    return found


@pytest.mark.parametrize(
    "values",
    [
        ("folder:w/set-1", "folder:w/set_1", "folder:w/set 1", "folder:v/set-1", "folder:w/SET-1"),
        ("npz:a/b.npz", "npz:a_b.npz", "npz:a-b.npz", "npz:b.npz", "folder:a/b.npz"),
        ("folder:é", "folder:e", "folder:\u202ee", "folder:日本", "folder:日 本"),
        tuple(f"folder:{'deep/' * 60}{'x' * 240}{end}" for end in "ab"),
    ],
)
def test_data_sets_have_names_of_their_own(values):
    names = [name_of("--dataset", value) for value in values]
    assert len({name.casefold() for name in names}) == len(values)
    assert all(re.fullmatch(r"[\w.=+-]+", name) and len(name.encode()) <= 200 for name in names)


def test_a_name_that_is_changed_is_short_and_says_what_it_can():
    assert re.fullmatch(
        r"victim-folder_own-resnet34-infonce-200ep-seed0-optimizer=lars-[0-9a-f]{8}",
        name_of("--optimizer", "lars", "--dataset", "folder:some/where/own/"),
    )


@given(st.lists(st.text(st.characters(blacklist_characters="\0", codec="utf-8"), min_size=1), min_size=2, max_size=2))
def test_no_two_texts_have_one_name(texts):
    command = run.parse(["--epochs", "1"])
    names = set()
    for text in texts:
        command.set(dataset=f"npz:{text}")
        names.add(run_name(command))
    assert len(names) == len(set(texts))
    assert all(re.fullmatch(r"[\w.=+-]+", name) and len(name.encode()) <= 200 for name in names)


def test_known_names_differ_without_their_dashes_and_commas():
    """These are changed in run names, and have no digest."""
    for script in ("run", "steal", "stealhead", "steallabels", "legitimate", "linear_eval", "stealsimsiam", "verify"):
        for setting in importlib.import_module(script).make_parser().settings.values():
            words = [str(choice) for choice in setting.choices or ()]
            assert len({re.sub(r"\W", "_", word) for word in words}) == len(words)


# ---- going on --------------------------------------------------------------------------------------------------------

TINY = [
    "--dataset",
    "shapes",
    "--num-train",
    "64",
    "--arch",
    "resnet10w32",
    "-b",
    "32",
    "--epochs",
    "1",
    "--workers",
    "1",
]


def test_a_run_that_does_not_name_a_setting_had_what_earlier_versions_had(tmp_path):
    """Their schedule was the cosine, a copy normalised as its victim; settings without that word had their defaults."""

    def differences(module, line, *unnamed):
        command = module.parse([*line, "--checkpoint-dir", str(tmp_path)])
        opened = open_run(command, tmp_path, FP32, victim="v")
        stored = {name: value for name, value in opened.config["settings"].items() if name not in unnamed}
        return opened.differences({"settings": stored})

    new = ("schedule", "copy_normalize", "views", "query_views")
    assert differences(run, [], *new) == {}
    assert differences(run, ["--schedule", "constant"], *new) == {"schedule": "cosine"}
    assert differences(steal, [], *new) == {"copy_normalize": "as the victim"}
    found = differences(steal, ["--attack", "cont-steal"], *new)
    assert found == {"schedule": "cosine", "copy_normalize": "as the victim", "query_views": "simclr"}
    found = differences(steal, ["--attack", "stolenencoder"], *new)
    assert found == {"schedule": "cosine", "copy_normalize": "as the victim", "views": "simclr"}
    assert differences(steal, ["--attack", "rda"]) == {}


def test_a_run_is_resumed_with_its_settings_only(tmp_path, capsys):
    assert call_main(run, tmp_path, tmp_path, *TINY, "--resume") == 0
    assert "--resume: nothing is in checkpoints/victim-shapes-resnet10w32" in capsys.readouterr().out.replace(
        f"{tmp_path}/", ""
    )
    (config,) = tmp_path.glob("checkpoints/*/config.yml")
    text = config.read_text()
    assert call_main(run, tmp_path, tmp_path, *TINY, "--resume") == 0
    # As an earlier version with other defaults would have left it, or another run whose folder was renamed.
    for old, new in (("weight_decay: 0.0001", "weight_decay: 0.5"), ("dataset: shapes", "dataset: npz:other.npz")):
        assert old in text
        config.write_text(text.replace(old, new))
        assert call_main(run, tmp_path, tmp_path, *TINY, "--resume") == 2
        error = capsys.readouterr().err
        name, value = new.split(": ")
        assert error.count("\n") == 1
        assert f"was begun with {name} {value}, not " in error


def test_a_run_may_have_a_folder_of_its_own(tmp_path, capsys):
    folder = tmp_path / "mine"
    words = ["--checkpoint-dir", str(tmp_path), "--run-dir", str(folder)]
    assert name_of(*words) == name_of(), "the folder is no part of a run's name"
    made = open_run(run.parse(words), tmp_path, FP32)
    made.start()
    made.add_row({"top1": 1.0})
    made.finish()
    assert made.folder == folder
    assert {path.name for path in folder.iterdir()} > {"config.yml", "metrics.jsonl", "run.log"}
    (line,) = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert line["run"] == "mine"
    assert open_run(run.parse([*words, "--resume"]), tmp_path, FP32).done()
    with pytest.raises(UserError, match="mine was begun with epochs 200, not 3"):
        open_run(run.parse([*words, "--epochs", "3", "--resume"]), tmp_path, FP32)


def test_a_checkpoint_that_is_gone_on_from_says_what_differs(tmp_path, capsys):
    call_main(run, tmp_path, tmp_path, *TINY)
    (checkpoint,) = tmp_path.glob("checkpoints/*/checkpoint.pth.tar")
    assert call_main(run, tmp_path, tmp_path, *TINY, "--epochs", "2", "--lr", "0.1", "--resume", checkpoint) == 0
    assert "checkpoint.pth.tar is of epochs 1, lr 0.0003\n" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_threads_unless_told(tmp_path, capsys):
    """Their number changes the last digits of the weights."""
    line = TINY[: TINY.index("--workers")]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        call_main(run, tmp_path, tmp_path, *line, "--workers", "1")
        for more, expected in (([], 1), (["--workers", "2"], 2)):
            torch.set_num_threads(2)
            assert call_main(run, tmp_path, tmp_path, *line, *more, "--resume") == 0
            assert torch.get_num_threads() == expected
            assert ("--resume: 1 CPU threads, as before" in capsys.readouterr().out) is (expected == 1)
    finally:
        torch.set_num_threads(before)


def test_events_of_several_runs_lie_apart(tmp_path):
    for seed in ("0", "1", "1"):
        call_main(run, tmp_path, tmp_path, *TINY, "--seed", seed, "--logdir", tmp_path / "tb")
    folders = sorted(path.name for path in (tmp_path / "tb").iterdir())
    assert folders == sorted(path.name for path in (tmp_path / "checkpoints").glob("victim*"))
    assert all(len([*(tmp_path / "tb" / folder).iterdir()]) == 1 for folder in folders)


def test_a_row_is_there_once_however_often_it_is_made(tmp_path, capsys):
    """Made again, resumed, or resumed after a kill between the run's own record of it and results.jsonl."""
    judge = ["--modeltype", "random", "--arch", "resnet10w32", "--dataset-test", "shapes", "--probe", "knn"]
    judge += ["-n", "40", "--num-test", "50"]
    results = tmp_path / "checkpoints" / "results.jsonl"
    for more in ([], [], ["--resume"], ["--seed", "1"]):
        assert call_main(linear_eval, tmp_path, tmp_path, *judge, *more) == 0
    rows = results.read_text().splitlines()
    assert [json.loads(row)["seed"] for row in rows] == [0, 1]
    results.write_text(rows[1] + "\n")
    assert call_main(linear_eval, tmp_path, tmp_path, *judge, "--resume") == 0
    assert sorted(results.read_text().splitlines()) == sorted(rows)


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_the_run_that_fits_is_taken_and_named(make_run, find, capsys):
    first, second = make_run("a", arch="x", seed=0, defence=None), make_run("b", arch="y", seed=1, defence="noise")
    make_run("c", kind="stolen", arch="x")
    assert find(wanted={"arch": "x"}) == first
    assert f"victim: {first.parent}" in capsys.readouterr().out
    assert find(wanted={"defence": "noise"}) == second
    assert find(wanted={"defence": None, "repeat": False}) == first  # what was not in force is off
    assert find(besides=second) == first


def test_data_are_the_same_however_their_path_is_spelled(make_run, find, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    earlier = make_run("a", dataset="npz:own.npz")  # as it was written until 2026
    other = make_run("b", dataset=f"npz:{tmp_path / 'other.npz'}")
    for path in ("own.npz", "./own.npz", str(tmp_path / "own.npz"), "link/own.npz"):
        assert find(wanted={"dataset": run.parse(["--dataset", f"npz:{path}"]).dataset}) == earlier
    assert find(wanted={"dataset": "npz:link/other.npz"}) == other
    assert name_of("--dataset", "npz:own.npz") == name_of("--dataset", "npz:link/./own.npz")


def test_several_that_fit_are_listed_with_what_differs_and_chosen_by_number(make_run, find):
    first = make_run("victim-x-seed0-lr=1", arch="x", seed=0, lr=1, defence=None)
    second = make_run("victim-x-seed1-lr=1-defence=noise", arch="x", seed=1, lr=1, defence="noise")
    with pytest.raises(UserError) as listed:
        find(wanted={"arch": "x"})
    assert "2 victim encoders fit arch x, choose by --victim NUMBER: " in str(listed.value)
    assert str(listed.value).endswith(": 1) seed0; 2) seed1 defence=noise")
    assert [find(f"--victim {number}", {"arch": "x"}) for number in (1, 2)] == [first, second]
    with pytest.raises(UserError, match="--victim 3: 2 victim encoders fit arch x"):
        find("--victim 3", {"arch": "x"})
    assert find(wanted={"arch": "x"}, preferred={"seed": 1}) == second
    with pytest.raises(UserError, match="2 victim encoders fit"):
        find(wanted={"arch": "x"}, preferred={"seed": 7})


def test_none_that_fits_names_what_is_there(make_run, find):
    make_run("a", arch="x")
    with pytest.raises(UserError, match=r"no victim encoder with arch y in .*; there: .*a; or give --victim PATH"):
        find(wanted={"arch": "y"})


def test_a_path_a_folder_or_a_name_is_taken_as_it_is(make_run, find, tmp_path):
    path = make_run("home/a", arch="x")
    for word in (path, path.parent, "a", "home/a"):
        assert find(f"--victim {word}", {"arch": "other"}) == path


# ---- places ----------------------------------------------------------------------------------------------------------


def test_home_of_a_file_from_elsewhere_is_named_by_its_content(make_run, tmp_path):
    path = make_run("a")
    assert home_of(path, tmp_path) == path.parent
    homes = set()
    for text in ("1", "2"):
        path = tmp_path / f"other{text}" / "model.pth.tar"
        path.parent.mkdir()
        path.write_text(text)
        homes.add(home_of(path, tmp_path / "runs").name)
    assert len(homes) == 2
    assert all(re.fullmatch(r"model-[0-9a-f]{8}", home) for home in homes)


def test_a_folder_in_which_nobody_may_write_is_no_home(make_run, tmp_path, monkeypatch):
    path = make_run("a-victim")
    monkeypatch.setattr("os.access", lambda place, mode: place != path.parent)  # root may write everywhere
    home = home_of(path, tmp_path / "mine")
    assert home.parent == tmp_path / "mine"
    assert re.fullmatch(r"a-victim-[0-9a-f]{8}", home.name)


def test_the_home_of_a_folder_follows_its_content(tmp_path):
    folder = tmp_path / "bought"
    folder.mkdir()
    (folder / "config.json").write_text("1")
    first = home_of(folder, tmp_path)
    assert first.name.startswith("bought-")
    (folder / "config.json").write_text("2")
    assert home_of(folder, tmp_path) != first


def test_locate_takes_paths_folders_and_names(tmp_path):
    for name in ("a/x", "b/x", "b/y", "other"):
        (tmp_path / name).mkdir(parents=True)
        if name != "other":
            (tmp_path / name / "checkpoint.pth.tar").touch()
    found = {name: locate(Path(name), tmp_path) for name in ("y", "a/x", "nothing", "other")}
    assert found["y"] == tmp_path / "b" / "y" / "checkpoint.pth.tar"
    assert found["a/x"] == tmp_path / "a" / "x" / "checkpoint.pth.tar"
    assert str(found["nothing"]) == "nothing"
    assert locate(tmp_path / "other", tmp_path) == tmp_path / "other"
    assert locate(tmp_path / "b" / "y", tmp_path / "a") == found["y"]
    with pytest.raises(UserError, match=r"several runs are named x: .*/a/x/.*/b/x/"):
        locate(Path("x"), tmp_path)


# ---- what a checkpoint says ------------------------------------------------------------------------------------------


def test_interrupted_runs_are_refused_and_files_of_2022_are_not(tmp_path):
    check_finished({"epoch": 200, "arch": "resnet34"}, tmp_path)
    check_finished({"epoch": 2, "settings": {"epochs": 2}}, tmp_path)
    with pytest.raises(UserError, match="stopped after epoch 1 of 2"):
        check_finished({"epoch": 1, "settings": {"epochs": 2}}, tmp_path)


def test_a_records_figures_count_an_image_once_whichever_accounts_asked():
    digests = torch.arange(48, dtype=torch.uint8)  # three images
    ledger = {
        "a": {"queries": 5, "calls": 1, "images": digests[:32]},
        "b": {"queries": 2, "calls": 1, "images": digests[16:]},
    }
    # An earlier version kept no perceptual hashes.
    assert Record.of({"ledger": ledger}).figures() == {"queries": 7, "distinct": 3, "near_distinct": None}
    near = torch.arange(6, dtype=torch.uint8)
    ledger = {name: {**account, "near": near} for name, account in ledger.items()}
    assert Record.of({"ledger": ledger}).figures() == {"queries": 7, "distinct": 3, "near_distinct": 2}
    assert Record.of({}).figures() == {"queries": 0, "distinct": 0, "near_distinct": 0}


def test_a_record_survives_a_checkpoint_and_reads_older_ones():
    record = Record(
        query_set={"dataset": "svhn", "split": "train", "images": 2},
        query_indices=torch.tensor([3, 1]),
        query_digests=torch.zeros(2, 16, dtype=torch.uint8),
        ledger={"a": {"queries": 2, "calls": 1, "images": torch.zeros(16, dtype=torch.uint8)}},
        defence_report={"buckets_coverage": 1.5},
    )
    again = Record.of({**record.state_dict(), "epoch": 3})
    assert again.figures() == {"queries": 2, "distinct": 1, "near_distinct": None, "buckets_coverage": 1.5}
    assert torch.equal(again.query_indices, record.query_indices)
    assert Record.of({"met": {"poisoned": 4.0}}).defence_report == {"poisoned": 4.0}
    assert Record().state_dict() == {}


# ---- listing ---------------------------------------------------------------------------------------------------------


def listed(monkeypatch, capsys, folder):
    monkeypatch.setattr(sys, "argv", ["runs.py", "--checkpoint-dir", str(folder / "checkpoints")])
    runs.main()
    return capsys.readouterr().out


def test_the_list_has_victims_copies_below_them_and_their_results(trained, tmp_path, monkeypatch, capsys):
    lines = listed(monkeypatch, capsys, tmp_path).splitlines()
    victims = [line for line in lines if not line.startswith(" ")]
    assert len(victims) == 3
    copy = next(line for line in lines if "stolen-svhn" in line)
    assert copy.startswith("    stolen-svhn-resnet10w32-mse-24q")
    above = [line for line in lines[: lines.index(copy)] if not line.startswith(" ")][-1]
    assert "victim-cifar10-resnet10w32-infonce" in above
    assert any(line.startswith("        model victim") and "top1" in line for line in lines)


def test_a_folder_without_runs_says_so(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        listed(monkeypatch, capsys, tmp_path)
    assert stop.value.code == 2
    assert "no runs in" in capsys.readouterr().err
