"""A server of the service in this process or another, and a client that sends what it is told."""

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import uvicorn
from PIL import Image

from service.answering import Desk
from service.bodies import Limits, Preprocessing, Reader
from service.patience import Patient
from service.running import listen
from service.store import Store
from service.web import Front
from tests.conftest import ROOT

NPY = "application/x-npy"
KNOWN = {"Content-Type": NPY}


def npy(images):
    """Images, a tensor or an array, as an npy file."""
    file = io.BytesIO()
    np.save(file, np.asarray(images), allow_pickle=True)
    return file.getvalue()


def picture(image, kind="PNG"):
    """An image, uint8 (3, H, W), as a file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, kind)
    return file.getvalue()


def form(*files, name="images"):
    """The type and the body of a form with these files."""
    parts = [
        f'--xyz\r\nContent-Disposition: form-data; name="{name}"; filename="{number}"\r\n\r\n'.encode() + file + b"\r\n"
        for number, file in enumerate(files)
    ]
    return "multipart/form-data; boundary=xyz", b"".join(parts) + b"--xyz--\r\n"


def as_json(*files):
    return json.dumps({"images": [base64.b64encode(file).decode() for file in files]}).encode()


@dataclass
class Server:
    """An address, and the keys of accounts there."""

    port: int
    keys: dict = field(default_factory=dict)

    def ask(self, method, path, body=b"", headers=(), account="alice", **options):
        """The status, the headers and the body of the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        key = {"Authorization": f"Bearer {self.keys[account]}"} if account else {}
        with contextlib.closing(connection):
            connection.request(method, path, body, {**key, **dict(headers)}, **options)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def query(self, images, account="alice", **headers):
        """The answers to images, from npy to npy."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        status, _, body = self.ask("POST", "/v1/representations", npy(images), {**KNOWN, **named}, account)
        assert status == 200, body
        return torch.from_numpy(np.load(io.BytesIO(body), allow_pickle=False))

    def usage(self, account="alice"):
        return json.loads(self.ask("GET", "/v1/usage", account=account)[2])

    def raw(self, *parts, pause=0.0):
        """What comes back when these bytes are sent one after the other."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            for part in parts:
                with contextlib.suppress(OSError):
                    connection.sendall(part)
                time.sleep(pause)
            answer = b""
            with contextlib.suppress(OSError):
                while chunk := connection.recv(2**16):
                    answer += chunk
        return answer


@contextlib.contextmanager
def serving_app(app, keys):
    """A server of an ASGI application in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", http=Patient))
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Server(listening.getsockname()[1], keys)
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def serving(folder, victim, accounts=None, preprocessing=None, limits=None, desk=Desk):
    """A server of a victim with accounts, in a thread of this process."""
    store = Store(folder / "service.sqlite")
    keys = {name: store.add(name, terms) for name, terms in (accounts or {"alice": {}, "bob": {}}).items()}
    reader = Reader(preprocessing or Preprocessing(), 32, limits or Limits())
    card = {"input": [32, 32], "dim": victim.dim, "version": store.settle("")}
    with serving_app(Front(desk(victim, store), reader, card).app(), keys) as server:
        yield server


@contextlib.contextmanager
def started(folder, *words):
    """The server as a process of its own, whose group is killed at the end; yields it and its port."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, str(ROOT / "serve.py"), "--victim", "victim.pth.tar", "--database", "service.sqlite"]
    command += ["--port", "0", "--device", "cpu", "--precision", "fp32", "--threads", threads, *words]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        line = next(line for line in process.stdout if line.startswith("serving on "))
        yield process, Server(int(line.split()[2].rpartition(":")[2]))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def refused(status, body):
    """The code of an error's body, which has a message and a remedy and nothing else."""
    error = json.loads(body)["error"]
    assert error.keys() == {"code", "message", "remedy"}
    assert all(isinstance(words, str) and 0 < len(words) < 300 for words in error.values())
    assert "Traceback" not in body.decode()
    return status, error["code"]
