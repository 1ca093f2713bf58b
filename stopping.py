"""How a script ends: with one line for what the user can mend, saved on a signal, and with all processes of its job.

A process that fails tells the others through the job's store; a thread of each looks there and ends its process, which
may be waiting for the failed one inside a collective operation and would wait forever. Only the first to fail speaks.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from utils import UserError

SAVED = 75  # exit code: what was done is saved, the same command with --resume goes on (EX_TEMPFAIL of sysexits.h)
# A scheduler's before it takes the machine away; Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
LOOK_EVERY = 0.5  # seconds between looks at the job's store
SILENT_FOR = 30.0  # seconds without a sign of life after which a process counts as dead


class Stopped(Exception):
    """The job was told to stop and has saved what it needs to go on."""


# ---- one line --------------------------------------------------------------------------------------------------------


def script(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a script's main(): what the user can mend is printed as one line and exits with code 2.

    On SIGTERM or SIGUSR1 the script exits with code SAVED: at once, or from `deferred()` on when what it is in the
    middle of is saved. When one process of a job fails, all end with its line and code.
    """

    @functools.wraps(main)
    def wrapper() -> None:
        with _listening():
            try:
                main()
            except BaseException as error:
                code, text = _verdict(error)
                if _membership:
                    _membership.fail(code, text)  # does not return
                if text is None:
                    raise
                if first_by_launcher():
                    print(text, file=sys.stderr, end="")
                sys.exit(code)
            if _membership:
                _membership.leave()

    return wrapper


def _verdict(error: BaseException) -> tuple[int, str | None]:
    """The exit code for what ended main(), and what to print; None where Python's own traceback says it best."""
    if isinstance(error, Stopped):
        return SAVED, f"{error}\n"
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None), None
    if isinstance(error, UserError):
        return 2, _one_line(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return 2, _one_line(f"out of device memory, give a smaller --batch-size: {error}")
    if isinstance(error, PermissionError):
        return 2, _one_line(f"no permission to write or read {error.filename}: choose another folder")
    if isinstance(error, OSError):
        return 2, _one_line(f"{error.strerror or error}: {error.filename or 'disk'}")
    if _membership and isinstance(error, RuntimeError) and any(sign in str(error) for sign in _GONE):
        return 1, _one_line("another process of the job died without a message, as when it is killed or out of memory")
    return 1, None


# What gloo and the store say when the process at the other end is no more.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed")


def first_by_launcher() -> bool:
    """Whether a launcher's variables leave it to this process to say what all of its job find wrong with the flags."""
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return int(os.environ.get("RANK") or (several and os.environ.get("SLURM_PROCID")) or 0) == 0


def _one_line(text: str) -> str:
    return f"error: {' '.join(text.split())}\n"


# ---- signals ---------------------------------------------------------------------------------------------------------


class _Signals:
    """What was received, and whether somebody will act on it at a better moment."""

    received: str | None = None
    deferred = 0


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    """Within it a signal to stop raises Stopped, or is remembered while someone defers it."""
    owner = os.getpid()

    def receive(number: int, frame: object) -> None:
        if os.getpid() != owner:
            return  # a worker of a DataLoader: its parent, which has the signal too, says when it ends
        _Signals.received = signal.Signals(number).name
        if not _Signals.deferred:
            raise Stopped(f"stopped by {_Signals.received}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Signals.received, _Signals.deferred = None, 0
    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within it a signal to stop waits until `received` is asked: for work that has to be saved first."""
    _Signals.deferred += 1
    try:
        yield
    finally:
        _Signals.deferred -= 1


def received() -> str | None:
    """The name of the signal that told this process to stop, if one did."""
    return _Signals.received


# ---- a job of several processes --------------------------------------------------------------------------------------


class _Membership:
    """This process's part in a job: signs of life, and who failed first. Runs a thread until `leave` or `fail`."""

    def __init__(self, store: dist.Store, rank: int, processes: int, hosted_by_process: bool):
        self.store, self.rank, self.processes = store, rank, processes
        self.hosted_by_process = hosted_by_process
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        """Until this process leaves: give a sign of life, and end with the process that failed first."""
        seen = [(0, time.monotonic())] * self.processes
        while not self.leaving.wait(LOOK_EVERY):
            try:
                self.store.add(f"life/{self.rank}", 1)
                if self.store.check(["failed"]):
                    self._follow()
                if self.rank == 0:
                    seen = [self._sign_of(other, *seen[other]) for other in range(self.processes)]
            except (RuntimeError, dist.DistNetworkError):  # the process that holds the store is gone
                # A launcher that keeps the store goes when it was told to, and its processes have yet to save.
                if not self.leaving.wait(LOOK_EVERY if self.hosted_by_process else SILENT_FOR):
                    self._end(1, "")

    def _sign_of(self, other: int, signs: int, when: float) -> tuple[int, float]:
        """Signs of life of a process so far, and when the last one came; its silence is a failure of the job."""
        now, current = time.monotonic(), self.store.add(f"life/{other}", 0)
        if current == signs and signs and now - when > SILENT_FOR:
            self.fail(1, _one_line(f"process {other} of {self.processes} has been silent for {SILENT_FOR:.0f} seconds"))
        return (current, now) if current != signs else (signs, when)

    def fail(self, code: int, text: str | None) -> None:
        """End this process, and with it the job: with this text if no other process failed before."""
        self.leaving.set()
        said = self.rank > 0  # without a store to ask, the first process speaks
        with contextlib.suppress(RuntimeError):
            if text is None or code == 1:  # perhaps only because another one failed: let it speak first
                time.sleep(2 * LOOK_EVERY)
            if self.store.add("failures", 1) > 1:
                self.store.wait(["failed"], timedelta(seconds=5))
                self._follow()
            self.store.set("failed", str(code))
            self.store.set(f"followed/{self.rank}", "")
            said = False
        self._end(code, "" if said else traceback.format_exc() if text is None else text)

    def _follow(self) -> None:
        """End as the process that failed first."""
        code = int(self.store.get("failed"))
        self.store.set(f"followed/{self.rank}", "")  # by either thread, or both
        self._end(code, "")

    def _end(self, code: int, text: str) -> None:
        """Leave at once: an ordinary exit would wait for operations that no other process takes part in any more."""
        sys.stdout.flush()
        if text:
            print(text, file=sys.stderr, end="", flush=True)
        if self.hosted_by_process and self.rank == 0:  # the others have to read it first
            deadline = time.monotonic() + 5
            with contextlib.suppress(RuntimeError):
                others = [f"followed/{rank}" for rank in range(1, self.processes)]
                while not self.store.check(others) and time.monotonic() < deadline:
                    time.sleep(0.1)
        os._exit(code)

    def leave(self) -> None:
        """The ordinary end of a job: wait for the others, then part.

        At once too: while an interpreter shuts down, threads of the job's collectives may still let go of Python
        objects, which aborts the process (seen once in some 300 ends on a busy machine).
        """
        dist.all_reduce(torch.zeros(1))
        self.leaving.set()
        self.thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


_membership: _Membership | None = None


def join(store: dist.Store, rank: int, processes: int, hosted_by_process: bool) -> None:
    """From here on this process ends with the job's others.

    `store` is a connection of its own to the job's store, which the first process keeps, or else a launcher.
    """
    global _membership
    _membership = _Membership(store, rank, processes, hosted_by_process)
