"""The server's processes: a socket that they share, and what they compute with."""

import functools
import importlib.util
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from settings import Settings, setting
from utils import UserError

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
WAITING = 256  # connections that nobody has accepted yet
KEEP_ALIVE = 30  # seconds for which a connection waits for its next request
END_WITHIN = 20  # seconds for requests in progress when the server is told to stop


@dataclass(frozen=True)
class Database(Settings):
    """Where the service keeps what it must not forget."""

    database: Path = setting(
        Path("checkpoints/service.sqlite"), "accounts, ledger, and what the defences remember", named=False
    )
    title = "service"


@dataclass(frozen=True)
class Serving(Settings):
    """Where the service listens, and how many processes answer."""

    host: str = setting("127.0.0.1", "address to listen at")
    port: int = setting(8000, "port to listen at; 0 is any free port", at_least=0, at_most=65535)
    workers: int = setting(1, "processes that answer", at_least=1, at_most=64)
    threads: int | None = setting(
        None,
        "CPU threads of each process; another number changes the last digits of answers",
        at_least=1,
        otherwise="all cores, shared out",
    )
    title = "service"

    def use_threads(self) -> None:
        """Compute with this process's share of the threads."""
        torch.set_num_threads(self.threads or max(1, torch.get_num_threads() // self.workers))


def check_packages() -> None:
    """UserError where a package that the server needs is not installed."""
    absent = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if absent:
        raise UserError(f"{', '.join(absent)} not installed: pip install -r requirements-serve.txt")


def run_server(serving: Serving, make: Callable[[], Any]) -> None:
    """Serve the ASGI application that `make` returns, until a signal comes; in several processes, each its own.

    `make` is a function that a new process can import. UserError where the port is taken.
    """
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    from service.patience import Patient

    listening = listen(serving.host, serving.port)  # clients that come while the victim is read wait
    app = make()  # of several processes too, so that what is wrong is said once
    host, port = listening.getsockname()[:2]
    print(f"serving on http://{host}:{port} (its routes: /docs), Ctrl-C ends it", flush=True)
    options = {"log_level": "warning", "server_header": False, "ws": "none", "lifespan": "off"}
    options |= {
        "http": Patient,
        "timeout_keep_alive": KEEP_ALIVE,
        "timeout_graceful_shutdown": END_WITHIN,
        "backlog": WAITING,
    }
    if serving.workers == 1:
        uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listening])
        return
    del app
    make = functools.partial(_as_worker, make)
    config = uvicorn.Config(make, factory=True, workers=serving.workers, timeout_worker_healthcheck=60, **options)
    listening.set_inheritable(True)
    Multiprocess(config, [listening]).run()


def _as_worker(make: Callable[[], Any]) -> Any:
    """What `make` returns, in a process that ends when the one that started it is gone."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    return make()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. UserError where the address cannot be had."""
    try:
        return socket.create_server((host, port), backlog=WAITING)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host} port {port} ({said}): give another --port or --host") from None
