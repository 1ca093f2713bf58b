"""Processes that run scripts without importing PyTorch anew: a run of a second does not wait five for its start.

A server process imports what the scripts import, once, and forks a process for each run. It computes nothing itself:
threads of a computation would be missing in its forks. Other systems than Linux start a new interpreter for each run.
"""

import ast
import contextlib
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

from jobs.early import SAVED

import torch

from utils import STOP_SIGNALS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent  # the folder of the scripts
METHOD = "forkserver" if sys.platform.startswith("linux") else "spawn"
_CAN_BLOCK = hasattr(signal, "pthread_sigmask")  # not on Windows
# What the project or PyTorch (for the first optimizer) imports where it is needed.
_LATE = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "scipy.stats",
    "sklearn.cluster",
    "sklearn.metrics",
    "sklearn.mixture",
)


class Workers:
    """Starts scripts in processes of their own, with `threads` CPU threads each. scripts: those that it will start."""

    def __init__(self, scripts: Iterable[str], threads: int, method: str = METHOD):
        self.threads, self.context = threads, multiprocessing.get_context(method)
        self.context.set_forkserver_preload([*_LATE, *sorted(_imports_of(ROOT / script for script in scripts))])

    def start(self, words: Sequence[str], log: Path) -> BaseProcess:
        """A process that runs a script with its flags in the scripts' folder, and adds what it prints to a log.

        It ends with the script's exit code. It is told to stop by SIGTERM, and by the end of this process; Ctrl-C at
        the terminal does not reach it. While another process has the log, as one that runs the same command, it waits.
        """
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup's are ignored
        given = ([*words], log.absolute(), self.threads, heard)
        process = self.context.Process(target=_run, args=given, name=words[0])
        with _surroundings(self.threads):
            process.start()
        return process


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _imports_of(scripts: Iterable[Path]) -> set[str]:
    """What scripts import, as names of modules; some are names of functions, which the server skips."""
    names = set()
    for script in scripts:
        with contextlib.suppress(OSError, SyntaxError):  # the script's own process will say what is wrong
            for node in ast.walk(ast.parse(script.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@contextlib.contextmanager
def _surroundings(threads: int) -> Iterator[None]:
    """What a new process, or the server that forks it, takes over: folder, threads, blocked signals, no main module.

    The server does not end by a signal to all processes, and a new process gets its signals when it is ready. Without
    a main module it does not import that of this process again.
    """
    resource_tracker.ensure_running()  # here, since it unblocks signals
    main, before = sys.modules["__main__"], os.environ.get("OMP_NUM_THREADS")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if _CAN_BLOCK else ()
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        with contextlib.chdir(ROOT):
            yield
    finally:
        sys.modules["__main__"] = main
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        if _CAN_BLOCK:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


# ---- in the new process ----------------------------------------------------------------------------------------------


def _run(words: list[str], log: Path, threads: int, heard: Iterable[int]) -> None:
    """All that a new process does. heard: signals that stop it."""
    for number in heard:
        signal.signal(number, _end)  # until the script listens
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one tells it
    if _CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.set_start_method(None, force=True)  # workers that read images are started in the usual way
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    _print_to(log)
    print(f"$ python {shlex.join(words)}")
    sys.argv = words
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def _print_to(log: Path) -> None:
    """Send standard output and errors to the end of a file, which this process has for itself until it ends."""
    descriptor = os.open(
        log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666
    )  # left open: closing it would unlock the file
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)
        stream.reconfigure(line_buffering=True)


def _end(number: int, frame: object) -> None:
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(SAVED)


def _end_with_parent() -> None:
    """Stop this process when the one that started it has ended, even if that was killed."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
