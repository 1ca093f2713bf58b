"""How a script ends: with one line for what the user can mend, saved on a signal, and with all processes of its job.

A process that fails tells the others through the job's store. A thread of each process watches the store and ends its
process, which might otherwise wait forever for the failed one inside a collective operation. Only the first process to
fail prints a message.
"""

import contextlib
import functools
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta

from jobs.early import SAVED

import torch
import torch.distributed as dist

from utils import STOP_SIGNALS, UserError, first_by_launcher

UNREAD = 141  # exit code: nobody reads the output any more, as a shell reports SIGPIPE
LOOK_EVERY = 0.5  # seconds between looks at the job's store
SILENT_FOR = 30.0  # seconds without a sign of life after which a process counts as dead


class Stopped(BaseException):
    """The job was told to stop and has saved what it needs to go on. What catches every `Exception` lets it pass."""


class Misplaced(UserError):
    """An error about this process's place in its job: each process says it, not rank 0 for all."""


# ---- one line --------------------------------------------------------------------------------------------------------


def script(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates a script's main(): what the user can mend is printed as one line, with exit code 2.

    On a signal to stop the script exits with code SAVED: at once, or inside `deferred()` when the work in progress is
    saved; a second Ctrl-C does not wait for that. When the reader of the output has gone (`| head -n 1`), the next
    print ends the script in the same way, but silently and with code UNREAD. When one process of a job fails, all of
    them end with its exit code.
    """

    @functools.wraps(main)
    def wrapper() -> None:
        with _listening():
            try:
                main()
                sys.stdout.flush()  # here, so that a closed pipe is noticed before the interpreter exits
            except BaseException as error:
                _Signals.ending = True
                code, text = _verdict(error)
                _flush()
                if _membership:
                    _membership.fail(code, text)  # does not return
                if text is None:
                    raise
                if first_by_launcher() or isinstance(error, Misplaced):
                    _complain(text)
                sys.exit(code)
            if _membership:
                _membership.leave()

    return wrapper


def _verdict(error: BaseException) -> tuple[int, str | None]:
    """The exit code for the exception that ended main(), and the text to print; None for Python's own traceback."""
    if isinstance(error, Stopped):
        return (UNREAD, "") if _Signals.received == "SIGPIPE" else (SAVED, f"{error}\n")
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped at once by a second Ctrl-C\n"
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None), None
    if isinstance(error, UserError):
        return 2, _one_line(str(error))
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _is_too_large(error):
        said = str(error).splitlines()[0] if str(error) else "no memory is left"
        return 2, _one_line(f"out of memory, give a smaller --batch-size, --n-views, --out_dim or data: {said}")
    if isinstance(error, BrokenPipeError) and (_unread(sys.stdout) or _unread(sys.stderr)):
        return UNREAD, ""
    if isinstance(error, PermissionError):
        return 2, _one_line(f"no permission to write or read {error.filename}: choose another folder")
    if isinstance(error, OSError):
        return 2, _one_line(f"{error.strerror or error}: {error.filename or 'disk'}")
    if _membership and isinstance(error, RuntimeError) and any(sign in str(error) for sign in _GONE):
        return 1, _one_line("another process of the job died without a message, as when it is killed or out of memory")
    return 1, None


# What torch says of sizes that cannot be had.
# Whole phrases: an error that is no lack of memory has to keep its traceback.
_TOO_LARGE = (
    "can't allocate memory",
    "not enough memory",
    "Storage size calculation overflow",
    "integer multiplication overflow",
    "could not create a memory object",
)


def _is_too_large(error: BaseException) -> bool:
    return isinstance(error, RuntimeError | OverflowError) and any(sign in str(error) for sign in _TOO_LARGE)


# What gloo and the store say when the process at the other end is no more.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed")


def _one_line(text: str) -> str:
    return f"error: {' '.join(text.split())}\n"


# ---- output that nobody reads ----------------------------------------------------------------------------------------


def show(text: str) -> None:
    """Print a line at once. Inside `deferred()` it counts as a signal, SIGPIPE, that nobody reads the output."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        if not _Signals.deferred:
            raise
        _Signals.received = "SIGPIPE"
        _flush()


def _unread(stream: object) -> bool:
    """Whether a stream is a pipe whose reader has gone: other pipes, such as those to workers, break for a reason."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    try:
        poll.register(stream, 0)  # errors are always reported
    except (AttributeError, OSError, TypeError, ValueError):  # no file at all
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _flush() -> None:
    """Flush what is printed; where nobody reads it any more it goes to os.devnull, from now on too."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _complain(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, end="", flush=True)
    _flush()


# ---- signals ---------------------------------------------------------------------------------------------------------


class _Signals:
    """The signal received, if any, how many `deferred()` blocks are active, and whether the script is ending."""

    received: str | None = None
    deferred = 0
    ending = False


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    """Inside it a signal to stop raises Stopped, or is remembered while it is deferred."""
    owner = os.getpid()

    def receive(number: int, frame: object) -> None:
        # A DataLoader's worker leaves it to its parent, which has the signal too. A script that ends, ends.
        if os.getpid() != owner or _Signals.ending:
            return
        if _Signals.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        _Signals.received = signal.Signals(number).name
        if not _Signals.deferred:
            raise Stopped(f"stopped by {_Signals.received}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Signals.received, _Signals.deferred, _Signals.ending = None, 0, False
    threading.excepthook = _of_thread
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, receive) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        threading.excepthook = threading.__excepthook__


def _of_thread(arguments: threading.ExceptHookArgs) -> None:
    """Nothing is said of a full disk by the thread that writes tensorboard's events: its caller has the error too."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside it a signal to stop is only remembered: the work in progress asks `received()` and saves first."""
    _Signals.deferred += 1
    try:
        yield
    finally:
        _Signals.deferred -= 1


def received() -> str | None:
    """The name of the signal that told this process to stop; None if there was no signal."""
    return _Signals.received


# ---- a job of several processes --------------------------------------------------------------------------------------


class _Membership:
    """This process in its job: gives signs of life, and knows who failed first. Its thread runs until the end."""

    def __init__(self, store: dist.Store, rank: int, processes: int, hosted_by_process: bool):
        self.store, self.rank, self.processes = store, rank, processes
        self.hosted_by_process = hosted_by_process
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        """Until this process leaves: give signs of life, and end when another process has failed."""
        seen = [(0, time.monotonic())] * self.processes
        while not self.leaving.wait(LOOK_EVERY):
            try:
                self.store.add(f"life/{self.rank}", 1)
                if self.store.check(["failed"]):
                    self._follow()
                if self.rank == 0:
                    seen = [self._sign_of(other, *seen[other]) for other in range(self.processes)]
            except (RuntimeError, dist.DistNetworkError):  # the process that hosts the store is gone
                # A launcher that hosts the store exits when it is told to, while its processes have yet to save.
                if not self.leaving.wait(LOOK_EVERY if self.hosted_by_process else SILENT_FOR):
                    self._end(1, _one_line("the process of rank 0, or the launcher, is gone without a message"))

    def _sign_of(self, other: int, signs: int, when: float) -> tuple[int, float]:
        """A process's signs of life so far, and when the last one came; its silence is a failure of the job."""
        now, current = time.monotonic(), self.store.add(f"life/{other}", 0)
        if current == signs and signs and now - when > SILENT_FOR:
            self.fail(1, _one_line(f"process {other} of {self.processes} has been silent for {SILENT_FOR:.0f} seconds"))
        return (current, now) if current != signs else (signs, when)

    def fail(self, code: int, text: str | None) -> None:
        """End this process, and with it the job. The text is printed unless another process failed before."""
        self.leaving.set()
        # Without a store to ask rank 0 prints; where it was the host, it is gone, and the others do.
        said = self.rank > 0 and not self.hosted_by_process
        with contextlib.suppress(RuntimeError):
            if text is None or code == 1:  # perhaps a consequence of another failure: let that process print first
                time.sleep(2 * LOOK_EVERY)
            if self.store.add("failures", 1) > 1:
                self.store.wait(["failed"], timedelta(seconds=5))
                self._follow()
            self.store.set("failed", str(code))
            self.store.set(f"followed/{self.rank}", "")
            said = False
        self._end(code, "" if said else traceback.format_exc() if text is None else text)

    def _follow(self) -> None:
        """End with the exit code of the process that failed first."""
        code = int(self.store.get("failed"))
        self.store.set(f"followed/{self.rank}", "")  # by either thread, or both
        self._end(code, "")

    def _end(self, code: int, text: str) -> None:
        """Exit at once: an ordinary exit would wait for operations that other processes take no part in any more."""
        _flush()
        if text:
            _complain(text)
        if self.hosted_by_process and self.rank == 0:  # the others have to read the store first
            deadline = time.monotonic() + 5
            with contextlib.suppress(RuntimeError):
                others = [f"followed/{rank}" for rank in range(1, self.processes)]
                while not self.store.check(others) and time.monotonic() < deadline:
                    time.sleep(0.1)
        os._exit(code)

    def leave(self) -> None:
        """The ordinary end of a job: wait for the others, then exit.

        At once, too: while an interpreter shuts down, threads of the job's collectives may still release Python
        objects, which aborts the process (seen once in some 300 ends on a busy machine).
        """
        dist.all_reduce(torch.zeros(1))
        self.leaving.set()
        self.thread.join()
        _flush()
        os._exit(0)


_membership: _Membership | None = None


def join(store: dist.Store, rank: int, processes: int, hosted_by_process: bool) -> None:
    """From here on this process ends together with the others of its job.

    `store` is a separate connection to the job's store, hosted by rank 0 (`hosted_by_process`) or by a launcher.
    """
    global _membership
    _membership = _Membership(store, rank, processes, hosted_by_process)
