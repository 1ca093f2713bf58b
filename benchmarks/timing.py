"""Ways of doing the same work take turns, so that a slow spell of the machine meets all of them.

contest = Contest(effort)
contest.add("classic", lambda: classic_training(...), amount=512)
contest.add("ours", lambda: our_training(...), amount=512)
seconds = contest.run()          # way -> seconds for a unit of the amount, of each round
"""

import functools
import importlib
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch

from benchmarks.memory import peak_memory
from jobs.memory import keep_freed_memory
from utils import Precision

Value = TypeVar("Value")
SHORTEST = 0.2  # seconds: shorter work is repeated, so that the clock and the host's delays do not count


class Missing(Exception):
    """Why a way of doing the work, or a whole row, was left out."""


@dataclass(frozen=True)
class Effort:
    """How much is measured: `rounds` counted rounds, of which those are left out that begin after `seconds`.

    quick: sizes that say nothing about speed, to try the code.
    """

    precision: Precision
    rounds: int = 5
    seconds: float = math.inf
    quick: bool = False

    @property
    def device(self) -> torch.device:
        return self.precision.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def size(self, cpu: Value, gpu: Value, quick: Value) -> Value:
        """The value for this device, or for a quick run."""
        return quick if self.quick else gpu if self.on_gpu else cpu


class Contest:
    """Ways of doing the same work, which take turns.

    seconds: of a unit of each way's amount, by round. missing: why a way has none. first: seconds until a way's first
    call had ended, its making included. memory: the bytes that this took at most, above those in use before.
    """

    def __init__(self, effort: Effort):
        self.effort = effort
        self.names: list[str] = []
        self.ways: dict[str, tuple[Callable[[], float], float]] = {}
        self.others: set[str] = set()  # ways that are not this project's
        self.seconds: dict[str, list[float]] = {}
        self.missing: dict[str, str] = {}
        self.first: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    def add(
        self,
        name: str,
        make: Callable[[], Callable[[], Any]],
        amount: float = 1.0,
        repeat: bool = False,
        warm_up: bool = True,
        own_clock: bool = False,
        ours: bool = True,
    ) -> None:
        """Make a way and call it once, which does not count. An error is noted, and the others go on.

        amount: how much work a call does. repeat: call short work several times in a round. own_clock: a call returns
        the seconds that count. ours: freed memory stays with the process, as in this project's scripts.
        """
        self.names.append(name)
        self.others |= set() if ours else {name}
        keep_freed_memory(ours)
        started = time.perf_counter()
        try:
            with peak_memory() as peak:
                work = make()
                if warm_up:
                    work()
                    synchronise()
                    self.first[name] = time.perf_counter() - started
            if warm_up and peak.bytes is not None:
                self.memory[name] = peak.bytes
            times = _calls_for(work) if repeat and not self.effort.quick else 1
        except Exception as error:
            self.missing[name] = reason(error)
            return
        timed = work if own_clock else functools.partial(seconds_of, _repeated(work, times))
        self.ways[name] = (timed, amount * times)

    def run(self) -> dict[str, list[float]]:
        """Time the ways in turn; the seconds so far of a way that fails are dropped."""
        self.seconds = {name: [] for name in self.ways}
        begun = time.perf_counter()
        for number in range(self.effort.rounds):
            if number and time.perf_counter() - begun > self.effort.seconds:
                break
            for name, (timed, amount) in list(self.ways.items()):
                keep_freed_memory(name not in self.others)
                try:
                    self.seconds[name].append(timed() / amount)
                except Exception as error:
                    self.missing[name] = reason(error)
                    del self.seconds[name], self.ways[name]
        return self.seconds


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of a call, until the device has done its work."""
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    """Wait for what was given to the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """Why something is missing, in a line; of an error that nobody expected, what it is."""
    if isinstance(error, Missing):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:300]}"


def peer(name: str) -> ModuleType:
    """Another software's module. Missing where its package is not installed, or cannot be imported."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise Missing(f"{package} is not installed: pip install -r requirements-bench.txt") from None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Missing(f"{package} cannot be imported: {lines[0][:200]}") from None


def child(command: Sequence[str], timeout: float | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output. It is told to stop, and waited for, whatever ends this call.

    Missing where it takes longer than `timeout` seconds.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(command), **{**pipes, **options})
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Missing(f"stopped after {timeout:.0f} seconds") from None
    finally:
        stop(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def stop(process: subprocess.Popen) -> None:
    """Tell a process to stop, if it still runs, and wait for its end."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _calls_for(work: Callable[[], Any]) -> int:
    """How many calls of work take SHORTEST seconds."""
    return max(1, min(1000, math.ceil(SHORTEST / max(seconds_of(work), 1e-6))))


def _repeated(work: Callable[[], Any], times: int) -> Callable[[], Any]:
    def several() -> None:
        for _ in range(times):
            work()

    return work if times == 1 else several
