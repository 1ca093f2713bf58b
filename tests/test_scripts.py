"""The scripts as a user runs them: the whole way on tiny data, resumption after SIGKILL, refusals."""

import importlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import linear_eval
import run
import steal
from models import build_encoder, load_encoder, read_checkpoint
from tests import conftest
from tests.conftest import ROOT, made
from utils import seeded

OTHERS = ("stealhead", "steallabels", "stealsimsiam", "linsimsiam", "legitimate", "verify", "detect")
SMALL = ["--arch", "resnet10w32", "--device", "cpu"]
TRAIN = ["--dataset", "cifar10", "--epochs", "2", "-b", "32", *SMALL]
STEAL = ["--datasetsteal", "svhn", "--epochstrain", "2", "--archstolen", "resnet10w32", "-b", "16", *SMALL]
TRAINED = ["--epochstrain", "2"]
COPY_OF = ["--datasetsteal", "svhn", *TRAINED]
JUDGE = [*COPY_OF, *SMALL]


@pytest.fixture(scope="module")
def pipeline(data, tmp_path_factory):
    """A victim, a copy, and the folder of both."""
    root = tmp_path_factory.mktemp("pipeline")
    common = ["-data", str(data), "--checkpoint-dir", str(root / "checkpoints")]
    with pytest.MonkeyPatch.context() as patch:
        for module, arguments in ((run, TRAIN), (steal, [*STEAL, "--epochs", "2", "--losstype", "mse", *QUERIES])):
            patch.setattr(sys, "argv", [module.__name__, *common, *arguments])
            module.main()
    return root


QUERIES = ["--num_queries", "40"]
VICTIM = "victim-cifar10-resnet10w32-infonce-2ep-seed0-batchsize=32"
COPY = "stolen-svhn-resnet10w32-mse-40q-2ep-seed0-batchsize=16"


def test_run_folder_is_complete(pipeline):
    for folder in (pipeline / "checkpoints" / VICTIM, pipeline / "checkpoints" / VICTIM / COPY):
        names = {path.name.split(".tfevents")[0] for path in folder.iterdir() if path.is_file()}
        assert names == {"checkpoint.pth.tar", "config.yml", "metrics.jsonl", "run.log", "events.out", ".lock"}
        config = yaml.safe_load((folder / "config.yml").read_text())
        assert config["settings"]["lr"] == (0.001 if "stolen" in folder.name else 0.0003)  # the presets, as in force
        assert config["settings"]["seed"] == 0
        assert {"command", "commit", "torch", "device", "precision"} <= config["provenance"].keys()
        assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_checkpoints_are_readable_and_honest(pipeline):
    victim = read_checkpoint(pipeline / "checkpoints" / VICTIM / "checkpoint.pth.tar")
    copy = read_checkpoint(pipeline / "checkpoints" / VICTIM / COPY / "checkpoint.pth.tar")
    assert (victim["epoch"], victim["arch"], victim["kind"], victim["images"]) == (2, "resnet10w32", "victim", 64)
    assert copy["ledger"]["default"]["queries"] == 40
    assert copy["query_set"] == {"dataset": "svhn", "split": "train", "images": 40, "available": 48}
    assert load_encoder(pipeline / "checkpoints" / VICTIM / "checkpoint.pth.tar").out_dim == 128


def test_linear_evaluation_of_each_model(pipeline, call):
    rows = {}
    for kind, extra in (
        ("victim", TRAINED),
        ("stolen", [*COPY_OF, "--losstype", "mse", "--epochs", "2", *QUERIES]),
        ("random", []),
    ):
        code, out, err = call(
            linear_eval, *SMALL, "--modeltype", kind, *extra, "--dataset-test", "mnist", folder=pipeline
        )
        assert code == 0, err
        assert f"model {kind}" in out
        rows[kind] = json.loads((pipeline / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    for kind, row in rows.items():
        assert (row["model"], row["downstream"], row["train_images"], row["test_images"]) == (kind, "mnist", 40, 24)
        assert {
            "top1",
            "top5",
            "top1_converged",
            "knn",
            "command",
            "commit",
            "torch",
            "device",
            "seconds",
        } <= row.keys()
        assert row["queries"] == (40 if kind == "stolen" else 0)
    for judged in ("stolen", "victim"):
        assert "lr: 0.001\n" in next(pipeline.rglob(f"{judged}-*/linear-mnist*/config.yml")).read_text()


def test_evaluation_of_the_same_name_is_not_repeated_with_resume(pipeline, call):
    arguments = [*SMALL, "--modeltype", "random", "--dataset-test", "svhn", "--seed", "5"]
    assert call(linear_eval, *arguments, folder=pipeline)[0] == 0
    before = (pipeline / "checkpoints" / "results.jsonl").read_text()
    _, out, _ = call(linear_eval, *arguments, "--resume", folder=pipeline)
    assert "has its results already" in out
    assert (pipeline / "checkpoints" / "results.jsonl").read_text() == before


def test_save_keeps_a_classifier(pipeline, call):
    judge = [*TRAINED, *SMALL, "--modeltype", "victim", "--dataset-test", "mnist"]
    call(linear_eval, *judge, "--save", "True", folder=pipeline)
    state = read_checkpoint(next(pipeline.rglob("victim-*/linear-mnist*/checkpoint.pth.tar")))["state_dict"]
    assert state["fc.weight"].shape == (10, 256)
    assert "layer4.0.conv1.weight" in state


def test_own_data_set_queries_the_test_split_and_evaluates_on_its_last_thousand(pipeline, call, refused):
    arguments = [*STEAL, "--epochs", "1", "--losstype", "mse", "--datasetsteal", "cifar10", "--num_queries", "40"]
    assert call(steal, *arguments, folder=pipeline)[0] == 0
    judge = [*JUDGE, "--losstype", "mse", "--epochs", "1", "--datasetsteal", "cifar10", "--num_queries", "40"]
    assert call(linear_eval, *judge, "--dataset-test", "cifar10", folder=pipeline)[0] == 0
    row = json.loads((pipeline / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    assert (row["test_images"], row["test_images_queried"]) == (1000, 0)
    # All 1,040 test images would include the 40 that were queried.
    text = refused(linear_eval, *judge, "--dataset-test", "cifar10", "--num-test", "1040", folder=pipeline)
    assert "40 of the 1040 test images were queried" in text
    text = refused(steal, *arguments[:-1], "41", folder=pipeline)
    assert "41 images" in text
    assert "has 40 to query" in text


def test_released_recipe_all_the_way(pipeline, call):
    code, out, _ = call(
        steal, *STEAL, "--epochs", "3", "--losstype", "mse", *QUERIES, "--recipe", "released", folder=pipeline
    )
    assert code == 0
    assert "queries: 120, of distinct images: 40" in out
    judge = [*JUDGE, "--losstype", "mse", "--epochs", "3", *QUERIES, "--recipe", "released", "-n", "20"]
    code, _, _ = call(linear_eval, *judge, "--dataset-test", "mnist", "--num-test", "24", folder=pipeline)
    assert code == 0
    row = json.loads((pipeline / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    assert row["recipe"] == "released"
    assert row["queries"] == 120
    assert "top1_converged" not in row


def test_random_encoder_on_shapes(call, tmp_path):
    judge = [*SMALL, "--modeltype", "random", "--dataset-test", "shapes", "-n", "300", "--num-test", "200"]
    assert call(linear_eval, *judge)[0] == 0
    row = json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text())
    assert row["train_images"] == 300


def test_a_copy_normalises_by_the_images_queried_whatever_its_victim_does(call, tmp_path):
    assert call(run, *TRAIN, "--epochs", "1", "--normalize", "True")[0] == 0
    victim = read_checkpoint(next(tmp_path.rglob("victim-*/checkpoint.pth.tar")))
    assert load_encoder(next(tmp_path.rglob("victim-*/checkpoint.pth.tar"))).normalize[0] == victim["normalize"][0]
    assert victim["normalize"][0] == pytest.approx([0.5, 0.5, 0.5], abs=0.02)
    draw, labels = np.random.default_rng(0), np.arange(60) % 2
    tinted = (draw.integers(0, 2, (60, 32, 32, 1)) * np.array([51, 102, 204])).astype(np.uint8)
    parts = {
        f"{kind}_{split}": values for split in ("train", "test") for kind, values in (("x", tinted), ("y", labels))
    }
    np.savez(tmp_path / "tinted.npz", **parts)
    flags = ("--datasetsteal", f"npz:{tmp_path}/tinted.npz", "--num_queries", "40", "-b", "20")
    made = {"": [0.1, 0.2, 0.4], "none": None, "released": None}
    for choice, expected in made.items():
        more = {"": (), "none": ("--copy-normalize", "none"), "released": ("--recipe", "released")}[choice]
        line = (*STEAL, "--epochstrain", "1", "--epochs", "1", "--losstype", "mse", *flags, *more)
        code, out, err = call(steal, *line)
        assert code == 0, err
        path = out.split("copy: ")[-1].splitlines()[0]
        normalize = read_checkpoint(Path(path))["normalize"]
        assert (normalize and normalize[0]) == (expected and pytest.approx(expected, abs=0.005))


def test_an_untrained_victim_is_saved_and_stolen(call, tmp_path):
    """The control of an attack: what a copy learns from random features."""
    assert call(run, *TRAIN, "--epochs", "0")[0] == 0
    path = next(tmp_path.rglob("victim-*-0ep-*/checkpoint.pth.tar"))
    with seeded(0):
        expected = build_encoder("resnet10w32", out_dim=128).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in read_checkpoint(path)["state_dict"].items())
    assert call(run, *TRAIN, "--epochs", "0", "--resume")[0] == 0
    line = (*STEAL, "--epochs", "1", "--losstype", "mse", *QUERIES)
    assert call(steal, *["0" if word == "2" else word for word in line])[0] == 0
    copy = next(path.parent.rglob("stolen-*/checkpoint.pth.tar"))
    assert read_checkpoint(copy)["ledger"]["default"]["queries"] == 40


def test_a_victim_by_a_preset_is_named_found_and_resumed(call, refused, tmp_path):
    """Beside one of 2022 of the same data, architecture, epochs and seed."""
    checkpoints = tmp_path / "checkpoints"
    modern = f"{VICTIM}-preset=modern"
    for name, more in ((VICTIM, ()), (modern, ("--preset", "modern"))):
        code, out, err = call(run, *TRAIN, *more)
        assert code == 0, err
        assert f"victim: {checkpoints / name}" in out
    assert "preset modern, views simclr-cifar" in out
    settings = read_checkpoint(checkpoints / modern / "checkpoint.pth.tar")["settings"]
    assert settings == yaml.safe_load((checkpoints / modern / "config.yml").read_text())["settings"]
    assert (settings["preset"], settings["views"], settings["batch_size"]) == ("modern", "simclr-cifar", 32)
    assert "has all 2 epochs already" in call(run, *TRAIN, "--preset", "modern", "--resume")[1]
    judge = [*TRAINED, *SMALL, "--modeltype", "victim", "--dataset-test", "mnist"]
    assert "2) preset=modern" in refused(linear_eval, *judge)
    for chosen in ("2", modern):
        assert call(linear_eval, *judge, "--victim", chosen)[0] == 0
        row = json.loads((checkpoints / "results.jsonl").read_text().splitlines()[-1])
        assert Path(row["checkpoint"]).parent == checkpoints / modern
        assert row["run"].startswith(modern)
    line = (*STEAL, "--epochs", "1", "--losstype", "mse", *QUERIES)
    assert "2) preset=modern" in refused(steal, *line)
    assert f"copy: {checkpoints / modern}" in call(steal, *line, "--victim", modern)[1]


@pytest.mark.parametrize("script", ["steal", "stealhead"])
def test_a_copy_does_not_begin_with_the_victims_initial_weights(script, call, tmp_path):
    """Of the same architecture and seed as its victim."""
    module = importlib.import_module(script)
    assert call(run, *TRAIN, "--epochs", "0")[0] == 0
    arches = ("--archvic", "resnet10w32") if script == "stealhead" else ("--arch", "resnet10w32")
    heads = ("--epochshead", "1") if script == "stealhead" else ()
    line = (*arches, "--archstolen", "resnet10w32", "--datasetsteal", "svhn", "--epochstrain", "0", *heads)
    code, out, err = call(module, *line, "--epochs", "0", "-b", "16", "--losstype", "mse", *QUERIES, "--device", "cpu")
    assert code == 0, err
    victim, copy = (
        read_checkpoint(path)["state_dict"]["backbone.conv1.weight"]
        for path in (next(tmp_path.rglob("victim-*/checkpoint.pth.tar")), made(out))
    )
    assert not torch.allclose(victim, copy, atol=0.01)


def test_a_checkpoint_of_2022_is_stolen_from(call, tmp_path):
    encoder = build_encoder("resnet10w32", out_dim=128)
    path = tmp_path / "cifar10_checkpoint_200_infonce.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet34", "state_dict": encoder.state_dict(), "optimizer": {}}, path)
    code, _, err = call(
        steal, *STEAL, "--victim", path, "--epochs", "1", "--losstype", "mse", *QUERIES, "--epochstrain", "200"
    )
    assert code == 0, err
    copy = next((tmp_path / "checkpoints").rglob("checkpoint.pth.tar"))
    assert copy.parent.parent.name.startswith("cifar10_checkpoint_200_infonce-")


def test_queries_from_any_file_or_folder(call, trained, tmp_path):
    """Without labels; linear evaluation finds the copies by the same names."""
    images = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x_train=images)
    (tmp_path / "own").mkdir()
    for number, image in enumerate([*images, *images[:4]]):
        Image.fromarray(image).save(tmp_path / "own" / f"{number:02}.png")
    for name in (f"npz:{tmp_path / 'own.npz'}", f"folder:{tmp_path / 'own'}"):
        line = (*conftest.STEAL, "--datasetsteal", name, "--losstype", "mse")
        code, out, err = call(steal, *line)
        assert code == 0, err
        copy = made(out)
        asked = {"dataset": name, "split": "train", "images": 24}
        assert asked.items() <= read_checkpoint(copy)["query_set"].items()
        judge = (*conftest.JUDGE, *conftest.VICTIM, *conftest.COPY, "--losstype", "mse", "--dataset-test", "mnist")
        code, out, err = call(linear_eval, *judge, "--datasetsteal", name)
        assert code == 0, err
        assert str(Path(copy).parent) in out


# ---- killed and resumed ----


@pytest.mark.slow
def test_sigkill_and_resume_give_the_uninterrupted_weights(data, tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), "-data", str(data), *TRAIN, "--epochs", "6", "--workers", "1"]

    def checkpoint(name):
        return next((tmp_path / name).rglob("checkpoint.pth.tar"), None)

    subprocess.run([*command, "--checkpoint-dir", "whole"], cwd=tmp_path, check=True, capture_output=True)
    killed = subprocess.Popen([*command, "--checkpoint-dir", "cut"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while checkpoint("cut") is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 0 < read_checkpoint(checkpoint("cut"))["epoch"] < 6
    resumed = [*command, "--checkpoint-dir", "cut", "--resume"]
    out = subprocess.run(resumed, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "resumed after epoch" in out
    whole, cut = (read_checkpoint(checkpoint(name)) for name in ("whole", "cut"))
    assert all(torch.equal(value, cut["state_dict"][key]) for key, value in whole["state_dict"].items())
    assert not list((tmp_path / "cut").rglob("*.tmp"))


def test_a_victim_that_was_interrupted_is_not_used(call, refused, tmp_path):
    assert call(run, *TRAIN)[0] == 0
    path = next(tmp_path.rglob("checkpoint.pth.tar"))
    checkpoint = read_checkpoint(path)
    torch.save({**checkpoint, "epoch": 1}, path)
    assert "stopped after epoch 1 of 2" in refused(steal, *STEAL, "--losstype", "mse", *QUERIES)


# ---- refusals ----


def test_unknown_names_and_values(refused):
    assert "unknown data set 'cifar11'" in refused(run, "--dataset", "cifar11")
    assert "resnet99" in refused(run, "--arch", "resnet99")
    assert "hinge" in refused(steal, "--losstype", "hinge")
    assert "'yes' is neither True nor False" in refused(steal, "--force", "yes")
    assert "not a whole number of at least 0" in refused(run, "--epochs", "-1")
    assert "not a number above 0" in refused(run, "--temperature", "-1")
    assert "not a number above 0" in refused(run, "--lr", "nan")
    assert "unrecognized arguments: --lrr" in refused(run, "--lrr", "1")
    assert "contradict" in refused(run, *TRAIN, "--fp16-precision", "--precision", "bf16")
    assert "--n-views 1 is too few, give 2 or more" in refused(run, *TRAIN, "--n-views", "1")
    assert "fp16 needs a CUDA device" in refused(run, *TRAIN, "--fp16-precision")


def test_missing_victim_lists_what_is_there(pipeline, refused):
    text = refused(steal, *STEAL, "--arch", "resnet18", folder=pipeline)
    assert "no victim encoder with arch resnet18 epochs 2" in text
    assert VICTIM in text
    text = refused(linear_eval, *JUDGE, "--losstype", "softnn", folder=pipeline)
    assert "no stolen encoder" in text
    assert COPY in text


def test_foreign_config_files_are_passed_over(call, tmp_path):
    assert call(run, *TRAIN)[0] == 0
    for name, text in (("a", "x: [1"), ("b", "- 1"), ("c", "")):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "config.yml").write_text(text)
    assert call(steal, *STEAL, "--losstype", "mse", "--epochs", "1", *QUERIES)[0] == 0


def test_several_copies_that_match_are_listed(pipeline, call, refused):
    for views in ("1", "2"):
        call(steal, *STEAL, "--epochs", "1", "--losstype", "softce", *QUERIES, "--n-views", views, folder=pipeline)
    text = refused(linear_eval, *JUDGE, "--losstype", "softce", "--epochs", "1", *QUERIES, folder=pipeline)
    assert "2 stolen encoders fit" in text
    assert "; 2) nviews=2" in text


def test_bad_victims(pipeline, refused, tmp_path):
    victim = pipeline / "checkpoints" / VICTIM / "checkpoint.pth.tar"
    assert "no checkpoint at" in refused(steal, *STEAL, "--victim", "nowhere.pth.tar", *QUERIES)
    assert "holds a resnet10w32" in refused(steal, *STEAL, "--arch", "resnet18", "--victim", victim, *QUERIES)
    (tmp_path / "cut").write_bytes(victim.read_bytes()[:5000])
    assert "cut" in refused(steal, *STEAL, "--victim", tmp_path / "cut", *QUERIES)
    assert "trained with dataset cifar10, not svhn" in refused(
        steal, *STEAL, "--dataset", "svhn", "--victim", victim, *QUERIES
    )
    assert not (tmp_path / "checkpoints").exists()


def test_more_queries_than_images(pipeline, refused):
    before = set(pipeline.rglob("*"))
    text = refused(steal, *STEAL, "--losstype", "infonce", "--num_queries", "9000", folder=pipeline)
    assert "9000 images" in text
    assert "svhn has 48" in text
    assert set(pipeline.rglob("*")) == before


def test_batch_larger_than_the_data(refused, tmp_path):
    assert "batch size 65 is larger than the 64 images" in refused(run, *TRAIN, "-b", "65")
    assert "asked for, the data set has 64" in refused(run, *TRAIN, "--num-train", "65")
    assert not (tmp_path / "checkpoints").exists()


def test_missing_and_broken_data(refused, tmp_path, monkeypatch):
    assert "no images below" in refused(run, *TRAIN, "--dataset", f"folder:{tmp_path}")
    (tmp_path / "cifar10.npz").write_bytes(b"PK broken")
    assert "broken" in refused(run, *TRAIN, "-data", tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_diverging_training_stops_with_the_step(refused):
    text = refused(run, *TRAIN, "--lr", "1e30")
    assert re.search(r"the loss is (nan|inf) at step \d+ of 2 in epoch \d+", text)


def test_no_permission_to_write(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "error: " in refused(run, *TRAIN, "--checkpoint-dir", tmp_path / "file" / "below")


def test_scripts_run_from_anywhere(run_script):
    code, out, err = run_script("steal.py", "--help")
    assert (code, err) == (0, "")
    assert "--archstolen" in out


@pytest.mark.parametrize("module", [run, steal, linear_eval, *map(importlib.import_module, OTHERS)])
def test_help_lists_every_flag_in_groups(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.parse(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(declared.flag in shown for declared in module.make_parser().settings.values())
    assert "\nrun:\n" in shown
