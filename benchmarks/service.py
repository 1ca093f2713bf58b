"""The row of the victim over HTTP: clients at once, beside the same victim in this process.

The server is `serve.py` in a process of its own, with its ledger on the disk; clients are threads of this process, on
the same machine. No request repeats an image of an earlier request, as for a ledger that grows.
"""

import contextlib
import http.client
import io
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.row import Ratio, make_row
from benchmarks.steps import pictures
from benchmarks.timing import Contest, Effort, stop
from models import build_encoder
from service.store import Store
from utils import seeded
from victim import Victim

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = (1, 4, 16)


@contextlib.contextmanager
def served(checkpoint: dict[str, Any], effort: Effort, folder: Path) -> Iterator[tuple[int, str]]:
    """A server of the victim, without defences: its port, and the key of an account."""
    torch.save(checkpoint, folder / "victim.pth.tar")
    key = Store(folder / "service.sqlite").add("benchmark", {})
    flags = {"victim": folder / "victim.pth.tar", "database": folder / "service.sqlite", "port": 0}
    flags |= {"device": effort.device, "precision": effort.precision.name, "threads": torch.get_num_threads()}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(ROOT / "serve.py"), *words]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stdout if line.startswith("serving on "))
        yield int(line.split()[2].rpartition(":")[2]), key
    finally:
        stop(process)


def call(port: int, key: str, images: Tensor) -> np.ndarray:
    """The answers to a request on a connection of its own."""
    file, headers = io.BytesIO(), {"Authorization": f"Bearer {key}", "Content-Type": "application/x-npy"}
    np.save(file, images.numpy())
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("POST", "/v1/representations", file.getvalue(), headers)
        response = connection.getresponse()
        body = response.read()
    if response.status != 200:
        raise RuntimeError(body.decode())
    return np.load(io.BytesIO(body), allow_pickle=False)


def numbered(images: Tensor, number: int) -> Tensor:
    """The images with other pixels in a corner, as the number says."""
    changed = images.clone()
    changed[:, 0, 0, :4] = torch.tensor([number >> shift & 255 for shift in (0, 8, 16, 24)], dtype=torch.uint8)
    return changed


def service(effort: Effort, arch: str) -> dict[str, Any]:
    """The row: images a second of clients at once, and in this process."""
    batch = effort.size(512, 512, 8)
    images, numbers, contest = pictures(batch), itertools.count(), Contest(effort)
    with seeded(0):
        encoder = build_encoder(arch).eval()
    checkpoint = {"epoch": 1, "arch": arch, "settings": {"epochs": 1}, "state_dict": encoder.state_dict()}
    victim = Victim(encoder.to(effort.device), precision=effort.precision)

    def clients(count: int, port: int, key: str) -> Callable[[], object]:
        pool = ThreadPoolExecutor(count)
        return lambda: list(pool.map(lambda _: call(port, key, numbered(images, next(numbers))), range(count)))

    with tempfile.TemporaryDirectory() as folder, served(checkpoint, effort, Path(folder)) as (port, key):
        contest.add("in process", lambda: lambda: victim.query(numbered(images, next(numbers))).cpu(), batch)
        for count in CLIENTS:
            name = f"{count} client{'s' * (count > 1)}"
            contest.add(name, lambda count=count: clients(count, port, key), count * batch)
        contest.run()
    ratios = [Ratio(name, "in process", 0.8) for name in contest.names[1:]]
    notes = (
        f"a request has {batch} images, uint8, and is answered in float32, both as npy files",
        "each request is a transaction that is on the disk before its answer leaves",
        "server and clients share the machine's cores",
    )
    return make_row(f"Service, {batch} images in a request, {arch}", contest, "images/s", ratios, notes)
