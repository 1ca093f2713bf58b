"""Runs the project's scripts in forked children: torch and the scripts are imported once, not in every trial.

A trial costs its computation only. A child leads a session, so that signals reach it and its children alone.
"""

import contextlib
import importlib
import itertools
import mmap
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads of OpenMP do not survive a fork

import numpy as np
import torch

SCRIPTS = ("run", "steal", "linear_eval", "legitimate", "stealhead", "steallabels", "verify", "detect", "runs")
SCRIPTS = (*SCRIPTS, "reproduce", "stealsimsiam", "linsimsiam", "demo")
LIMIT = 20.0  # seconds after which a script counts as hanging
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.truncate", "os.link", "os.symlink"}  # audit events; and open


@dataclass(frozen=True)
class Stop:
    """When a script gets which signal: so many seconds after its start, or just before its write number `event`."""

    signal: signal.Signals
    seconds: float | None = None
    event: int | None = None
    group: bool = False

    def __str__(self) -> str:
        when = f"{self.seconds:.2f} s" if self.event is None else f"write {self.event}"
        return f"{self.signal.name} at {when}"


@dataclass(frozen=True)
class Ended:
    """How a script ended. code: as subprocess has it, None where it hung. memory: peak in MiB above the start's.

    writes: how often it opened a file to write, renamed or removed something. answered: images that victims answered.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    memory: float
    writes: int
    answered: int
    left: bool  # whether processes that it started outlived it

    @property
    def last(self) -> str:
        return (self.err.strip() or self.out.strip() or "nothing printed").splitlines()[-1][:300]


def import_scripts() -> None:
    """Import what every child needs, in the process that forks them."""
    torch.set_num_threads(1)
    for name in (*SCRIPTS, "torch.utils.tensorboard", "sklearn.linear_model"):
        importlib.import_module(name)


def call(
    words: Sequence[str],
    folder: Path,
    stop: Stop | None = None,
    limit: float = LIMIT,
    memory: float | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Ended:
    """Call a script's main() in a child in this folder.

    memory: MiB of address space that it may add. variables: of its environment, besides those that are there.
    """
    counters = mmap.mmap(-1, 16)  # shared with the child, and kept when it is killed
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        ready, tell = os.pipe()
        started_with = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.environ.update(variables)
            _child(list(map(str, words)), folder, out.fileno(), err.fileno(), tell, counters, stop, memory)
        os.close(tell)
        os.read(ready, 1)
        os.close(ready)
        started = time.monotonic()
        code, peak = _wait(pid, stop, limit)
        seconds = time.monotonic() - started
        left = _end_group(pid)
        out.seek(0), err.seek(0)
        printed = [file.read().decode(errors="replace") for file in (out, err)]
    writes, answered = np.frombuffer(counters, np.int64).tolist()
    return Ended(code, *printed, seconds, max(0, peak - started_with) / 1024, writes, answered, left)


def _wait(pid: int, stop: Stop | None, limit: float) -> tuple[int | None, int]:
    """The child's exit code, None where it had to be killed, and its peak of memory in KiB."""
    started, sent = time.monotonic(), stop is None or stop.seconds is None
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss
        elapsed = time.monotonic() - started
        if not sent and elapsed >= stop.seconds:
            sent = True
            (os.killpg if stop.group else os.kill)(pid, stop.signal)
        if elapsed > limit:
            os.killpg(pid, signal.SIGKILL)
            return None, os.wait4(pid, 0)[2].ru_maxrss
        time.sleep(0.003)


def _end_group(pid: int) -> bool:
    """Kill what is left of a session; whether something was."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
        return True
    return False


# ---- in the child ----------------------------------------------------------------------------------------------------


def _child(words, folder, out, err, tell, counters, stop, memory) -> None:  # does not return
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = words
        if memory is not None:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE + int(memory * 2**20)
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        shared = np.frombuffer(counters, np.int64)
        _count(shared, stop)
        main = importlib.import_module(words[0].removesuffix(".py")).main
        os.write(tell, b"r")
        code = _exit_code(main)
    finally:
        os._exit(code)


def _exit_code(main: Callable[[], None]) -> int:
    """What the interpreter would exit with after main()."""
    code = 1
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it is over: what is left is this campaign's
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _count(shared: np.ndarray, stop: Stop | None) -> None:
    """Count this process's writes and the images that victims answer; `stop` it at the write that it names."""
    from victim import Victim

    numbers, here = itertools.count(1), os.getpid()

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            writes = not str(arguments[0]).startswith("/dev/")
        else:
            writes = event in WRITES
        if writes and os.getpid() == here:
            shared[0] = number = next(numbers)
            if stop is not None and stop.event == number:
                os.kill(here, stop.signal)

    query = Victim.query

    def counted(self, images, *arguments, **options):
        answers = query(self, images, *arguments, **options)
        shared[1] += len(images)
        return answers

    Victim.query = counted
    sys.addaudithook(hook)
