"""Seeds, precision, atomic files, run folders, errors."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from files.writing import atomic_path, save_checkpoint
from jobs.ending import script
from training.run import Run
from utils import Precision, UserError, choose_device, derive_seed, generator, seeded

FP32 = Precision("fp32", torch.device("cpu"))


def test_seeds_differ_by_every_argument():
    reference = (0, "views", 0, 0)
    others = [(1, "views", 0, 0), (0, "order", 0, 0), (0, "views", 1, 0), (0, "views", 0, 1)]
    seeds = {derive_seed(*arguments) for arguments in [reference, *others]}
    assert len(seeds) == 5
    assert derive_seed(*reference) == derive_seed(*reference)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generator_repeats_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first = torch.rand(3, generator=generator(7, "x"))
    assert torch.equal(first, torch.rand(3, generator=generator(7, "x")))
    with seeded(3):
        a = torch.rand(3)
    with seeded(3):
        b = torch.rand(3)
    with seeded(4):
        c = torch.rand(3)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_unusable_device_is_a_user_error():
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match=name):
            choose_device(name)


def test_precision_auto_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("utils.cpu_units", lambda: {"avx512_bf16"})
    assert Precision.choose("auto", cpu).name == "bf16"
    monkeypatch.setattr("utils.cpu_units", frozenset)
    assert Precision.choose("auto", cpu).name == "fp32"
    assert Precision.choose("bf16", cpu).name == "bf16"
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        Precision.choose("fp16", cpu)


def test_bf16_computes_in_bf16_and_fp32_does_not():
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with Precision.choose(name, torch.device("cpu")).autocast():
            assert layer(x).dtype == dtype


def test_atomic_file_is_whole_or_absent(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def write_half():
        with atomic_path(target) as path:
            path.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert target.read_text() == "old"
    with atomic_path(target) as path:
        path.write_text("new")
    assert target.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_full_disk_is_a_user_error_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint({"epoch": 1}, path)

    def no_room(content, file):
        file.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", no_room)
    with pytest.raises(UserError, match="is the disk full"):
        save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pth.tar"]


def test_run_folder_has_everything(tmp_path):
    run = Run(tmp_path / "run", FP32, {"kind": "victim", "settings": {"lr": 0.1}})
    assert not run.folder.exists()  # opening writes nothing
    run.start()
    run.say("hello")
    run.log(10, {"epoch": 0, "loss": 1.5})
    run.finish()
    assert yaml.safe_load((run.folder / "config.yml").read_text())["settings"] == {"lr": 0.1}
    assert "hello" in (run.folder / "run.log").read_text()
    assert json.loads(run.metrics.read_text())["loss"] == 1.5
    assert len(list(run.folder.glob("events.out.tfevents.*"))) == 1


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_resumed_run_drops_what_comes_again(tmp_path):
    run = Run(tmp_path / "run", FP32, events=tmp_path / "events")
    run.start()
    for epoch in range(3):
        run.log(epoch, {"epoch": epoch, "loss": float(epoch)})
    run.finish()
    with run.metrics.open("a") as file:
        file.write('{"epoch": 3, "lo')  # a kill in the middle of a line
    run = Run(tmp_path / "run", FP32, events=tmp_path / "events")
    run.start(from_epoch=2)
    run.log(2, {"epoch": 2, "loss": 20.0})
    run.finish()
    assert [record["loss"] for record in run.lines()] == [0.0, 1.0, 20.0]
    assert scalars(tmp_path / "events" / "run")["loss"] == [(0, 0.0), (1, 1.0), (2, 20.0)]


@pytest.mark.parametrize("clear", [True, False])
def test_clear_deletes_the_earlier_log(clear, tmp_path):
    for text in ("first", "second"):
        run = Run(tmp_path / "run", FP32, clear=clear)
        run.start()
        run.say(text)
        run.log(0, {"epoch": 0, "loss": 1.0})
        run.finish()
    assert ("first" in (run.folder / "run.log").read_text()) is not clear
    assert len(run.lines()) == (1 if clear else 2)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("two\n  lines"), "error: two lines\n"),
        (PermissionError(13, "Permission denied", "/x"), "error: no permission to write or read /x"),
        (OSError(28, "No space left on device", "/y"), "error: No space left on device: /y"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(error, text, capsys):
    @script
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(text)
    assert printed.count("\n") == 1


def test_importing_everything_does_nothing():
    """No output, no file, and torch's global generator and default precision as they were."""
    code = (
        "import torch, sys; before = torch.get_rng_state()\n"
        "import run, steal, linear_eval, simclr, victim, evaluation, loss, settings, runs, models, attacks.buy\n"
        "assert torch.equal(torch.get_rng_state(), before)"
    )
    from tests.conftest import ROOT

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
