"""How scripts and jobs end: one line, the same code everywhere, nothing hanging; saved on a signal, and resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from jobs.early import STOP_NAMES

import numpy as np
import pytest
import torch

from jobs.ending import SAVED, UNREAD, Stopped, deferred, received, script
from tests import jobs
from utils import STOP_SIGNALS, UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _heard():
    """No signal is ignored, as SIGINT is in a shell's background jobs and SIGHUP under nohup."""
    default = dict.fromkeys(STOP_SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in default.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ends_of(processes, work, *arguments, capfd):
    """Exit codes, what was printed as errors, and how long it took after the processes were up."""
    capfd.readouterr()
    started = time.monotonic()
    codes = jobs.run_job(processes, work, *arguments, timeout=60)
    return codes, capfd.readouterr().err, time.monotonic() - started


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_what_one_process_cannot_go_on_from_ends_all_with_its_one_line(rank, capfd):
    codes, err, _ = ends_of(3, jobs.fail_in_one, rank, "user error", capfd=capfd)
    assert codes == [2, 2, 2]
    assert err == "error: the folder is full of bees\n"


def test_what_all_processes_find_is_said_once(capfd):
    codes, err, _ = ends_of(3, jobs.fail_in_all, capfd=capfd)
    assert codes == [2, 2, 2]
    assert err == "error: everybody sees bees\n"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        pytest.param(("--epochs 3 --rank 0", "--epochs 3 --rank 1"), "", marks=pytest.mark.slow),
        pytest.param(
            ("-b 3", "-b 4"), "--batch-size is 3 in process 0 of the job, 4 in process 1", marks=pytest.mark.slow
        ),
        (("--epochs 3", "--epochs 3 --lr 0.1"), "--lr is left out in process 0 of the job, 0.1 in process 1"),
    ],
)
def test_processes_with_different_flags_are_told(lines, said, capfd):
    codes, err, _ = ends_of(2, jobs.start_with_flags, *lines, capfd=capfd)
    assert codes == ([2, 2] if said else [0, 0])
    assert err == (f"error: {said}: give all the same flags\n" if said else "")


def test_a_bug_in_one_process_shows_its_traceback_once(capfd):
    codes, err, _ = ends_of(2, jobs.fail_in_one, 1, "bug", capfd=capfd)
    assert codes == [1, 1]
    assert err.count("Traceback") == 1
    assert err.endswith("ZeroDivisionError: bees\n")


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_takes_the_others_with_it(rank, capfd, monkeypatch):
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # as jobs.early does for scripts
    codes, err, _ = ends_of(2, jobs.fail_in_one, rank, "kill", capfd=capfd)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    assert "without a message" in err
    assert err.count("\n") == 1  # nothing of C++'s stack


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_done_waits_for_the_others(rank, capfd):
    codes, err, _ = ends_of(2, jobs.leave_early, rank, capfd=capfd)
    assert (codes, err) == ([0, 0], "")


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_a_script_at_once_where_nothing_is_to_save(number, capsys):
    @script
    def main():
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("it went on")

    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, SAVED, UNREAD) == (75, 75, 141)
    assert capsys.readouterr().err == f"stopped by {number.name}\n"


def test_a_signal_waits_for_who_defers_it(capsys):
    @script
    def main():
        with deferred():
            assert received() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert received() == "SIGTERM"
        raise Stopped("saved")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == SAVED
    assert capsys.readouterr().err == "saved\n"


def test_a_second_ctrl_c_does_not_wait(capsys):
    @script
    def main():
        with deferred():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it went on")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped at once by a second Ctrl-C\n"


def test_a_signal_to_a_script_that_is_ending_changes_nothing(capsys):
    class Slow(UserError):
        def __str__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            return "bees"

    @script
    def main():
        raise Slow

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: bees\n"


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP is under nohup."""

    @script
    def main():
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        main()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_during_the_imports_is_one_line(number):
    """The script is stopped when it begins to import torch."""
    code = (
        "import sys, os, runpy, signal\n"
        "def stop(event, arguments):\n"
        f"    if event == 'import' and arguments[0] == 'torch': os.kill(os.getpid(), {int(number)})\n"
        "sys.addaudithook(stop); sys.argv = ['run.py']; runpy.run_path('run.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (SAVED, f"stopped by {number.name}\n")


def test_signals_during_the_imports_are_those_of_later():
    assert tuple(getattr(signal, name) for name in STOP_NAMES) == STOP_SIGNALS
    for path in ROOT.glob("*.py"):
        if "@script" in path.read_text():
            imported = re.findall(r"^(?:from|import) (\S+)", path.read_text(), re.MULTILINE)
            before = imported[: imported.index("jobs.early")]
            assert {name.split(".")[0] for name in before} <= sys.stdlib_module_names, path


@pytest.mark.parametrize(
    ("fails", "text"),
    [
        (lambda: torch.empty(10**13), "out of memory, give a smaller --batch-size, --n-views, --out_dim or data: "),
        (
            lambda: torch.empty(10**10, 10**10),
            "out of memory, give a smaller --batch-size, --n-views, --out_dim or data: ",
        ),
        (
            lambda: np.empty(10**15),
            "out of memory, give a smaller --batch-size, --n-views, --out_dim or data: Unable to allocate",
        ),
        (
            lambda: [0] * 10**15,
            "out of memory, give a smaller --batch-size, --n-views, --out_dim or data: no memory is left",
        ),
        (lambda: Path("/dev/full").write_text("x"), "No space left on device"),
        (lambda: Path("/proc/version/x").read_text(), "Not a directory: /proc/version/x"),
    ],
)
def test_what_the_machine_lacks_is_one_line(fails, text, capsys):
    with pytest.raises(SystemExit) as stop:
        script(fails)()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {text}")
    assert error.count("\n") == 1


def test_signals_are_as_before_when_a_script_is_done():
    before = signal.getsignal(signal.SIGTERM)

    @script
    def main():
        assert signal.getsignal(signal.SIGTERM) != before

    main()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_traceback_stays_one_and_an_error_of_the_user_one_line(capsys):
    @script
    def broken():
        raise KeyError("bug")

    @script
    def refused():
        raise UserError("two\nlines")

    with pytest.raises(KeyError):
        broken()
    with pytest.raises(SystemExit) as stop:
        refused()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: two lines\n"


# ---- output that nobody reads ----------------------------------------------------------------------------------------

PRINTING = """
import sys
from jobs.early import STOP_NAMES
from jobs.ending import Stopped, deferred, received, script, show
from utils import STOP_SIGNALS, UserError

@script
def main():
    sys.stdin.read()  # until the test has closed the other end of the pipe
    if sys.argv[1] == "deferred":
        with deferred():
            show("a line")
            show("another")
            if received() == "SIGPIPE":
                raise Stopped("saved")
    print("a table", flush=sys.argv[1] == "flushed")
    if sys.argv[1] == "refused":
        raise UserError("bees")
    if sys.argv[1] == "bug":
        raise ZeroDivisionError("bees")
    if sys.argv[1] == "exit":
        sys.exit(3)

main()
"""


@pytest.mark.parametrize(
    ("how", "code", "last"),
    [
        ("flushed", UNREAD, ""),
        ("buffered", UNREAD, ""),
        ("deferred", UNREAD, ""),
        ("exit", 3, ""),
        ("refused", 2, "error: bees"),
        ("bug", 1, "ZeroDivisionError: bees"),
    ],
)
def test_a_closed_pipe_ends_a_script_quietly(how, code, last):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    started = subprocess.Popen([sys.executable, "-c", PRINTING, how], env=environment, text=True, **pipes)
    started.stdout.close()
    started.stdin.close()
    err = started.stderr.read()
    assert started.wait(timeout=60) == code
    assert err.rstrip("\n").rpartition("\n")[2] == last
    assert "Exception ignored" not in err
    assert "BrokenPipeError" not in err


def test_another_pipe_that_breaks_is_an_error(capsys):
    @script
    def main():
        reading, writing = os.pipe()
        os.close(reading)
        os.write(writing, b"x")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fails", "code", "text"),
    [(False, UNREAD, ""), pytest.param(True, 2, "error: bees\n", marks=pytest.mark.slow)],
)
def test_a_closed_pipe_ends_all_processes_of_a_job(fails, code, text, capfd):
    codes, err, _ = ends_of(2, jobs.print_to_nobody, fails, capfd=capfd)
    assert codes == [code, code]
    assert err == text


# ---- a run that is told to stop --------------------------------------------------------------------------------------

RUN = (
    *("run.py", "--dataset", "npz:../tiny.npz", "--arch", "resnet10w32", "--epochs", "4", "-b", "16"),
    *("--device", "cpu", "--precision", "fp32", "--optimizer", "sgd", "--lr", "0.01", "--resume", "--watermark"),
)


def start(folder, processes, *arguments):
    """A script in several processes, by the flags of 2022; their Popen objects. Alone without them."""
    port = jobs.free_port()
    started = []
    for rank in range(processes):
        flags = ["--world-size", processes, "--rank", rank, "--dist-url", f"tcp://127.0.0.1:{port}"]
        line = [sys.executable, ROOT / arguments[0], *arguments[1:], *(flags if processes > 1 else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(list(map(str, line)), cwd=folder, env=environment, **pipes))
    return started


def finish(started):
    """Exit codes, outputs and errors."""
    ended = [one.communicate(timeout=120) for one in started]
    return [one.returncode for one in started], *zip(*ended, strict=True)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_any_more_saves(tmp_path, write_npz):
    """As with `run.py | head -n 1`."""
    write_npz(train=64, test=8)
    folder = tmp_path / "cut"
    folder.mkdir()
    (started,) = start(folder, 1, *RUN, "--print-freq", 1)
    wait_for(lambda: [*folder.rglob("metrics.jsonl")])
    started.stdout.close()
    assert (started.stderr.read(), started.wait(timeout=60)) == ("", UNREAD)
    saved = torch.load(next(folder.rglob("checkpoint.pth.tar")))
    assert saved["epoch"] < 4
    assert "begun" in saved


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_as_if_it_had_not_been(processes, tmp_path, write_npz):
    """A signal to one of its processes after the first epoch; the weights are those of an undisturbed run."""
    write_npz(train=64, test=8)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    codes, _, errors = finish(start(whole, processes, *RUN))
    assert codes == [0] * processes, errors
    started = start(cut, processes, *RUN)
    wait_for(lambda: [*cut.rglob("metrics.jsonl")])  # written after the first epoch
    started[-1].send_signal(signal.SIGUSR1)
    codes, _, errors = finish(started)
    assert codes == [SAVED] * processes
    (message,) = [text for text in errors if text]
    assert message.startswith("stopped at step ")
    assert message.count("\n") == 1
    held = torch.load(next(cut.rglob("checkpoint.pth.tar")))
    assert held["epoch"] in (1, 2, 3)
    assert 0 <= held["begun"]["step"] < 8
    codes, outputs, _ = finish(start(cut, processes, *RUN))
    assert codes == [0] * processes
    step = f", step {held['begun']['step']}" if held["begun"]["step"] else ""
    assert f"resumed after epoch {held['epoch']}{step}" in outputs[0]
    ends = [torch.load(next(folder.rglob("checkpoint.pth.tar"))) for folder in (whole, cut)]
    for part in ("state_dict", "watermark_state_dict"):
        for key, value in ends[0][part].items():
            assert torch.equal(value, ends[1][part][key]), key
    lines = [next(folder.rglob("metrics.jsonl")).read_text().splitlines() for folder in (whole, cut)]
    assert len(lines[0]) == len(lines[1]) == 4
    # A run that is finished has nothing to do.
    codes, outputs, _ = finish(start(cut, processes, *RUN))
    assert codes == [0] * processes
    assert "has all 4 epochs already" in outputs[0]
