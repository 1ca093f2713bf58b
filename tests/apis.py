"""APIs that answer over HTTP: this project's in a process of its own, a relay in front of it, and a course's."""

import base64
import http.client
import io
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from attacks.client import Client
from attacks.remote import RemoteVictim
from data_aug.images import Stored
from service.store import Store
from tests.conftest import ROOT
from tests.jobs import free_port


class Service:
    """serve.py in a process, on a port that stays when it is started again. `add` makes accounts while it serves."""

    def __init__(self, folder, victim, *flags):
        self.folder, self.port = folder, free_port()
        self.database = folder / "service.sqlite"
        line = ["serve.py", "--victim", victim, "--database", self.database, "--port", self.port, "--device", "cpu"]
        line += ["--threads", torch.get_num_threads()]
        self.line = [sys.executable, str(ROOT / line[0]), *map(str, [*line[1:], *flags])]
        self.store = Store(self.database)
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        log = (self.folder / "serve.log").open("a+")
        self.process = subprocess.Popen(self.line, cwd=self.folder, stdout=log, stderr=log)
        for _ in range(3000):
            if self.process.poll() is not None:
                raise AssertionError((self.folder / "serve.log").read_text())
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/healthz")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("serve.py does not answer")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def again(self):
        self.kill()
        self.start()

    def add(self, path, *names, **terms):
        """New accounts of these names, without their earlier usage; their keys are written to the path, a line each."""
        there = {customer.name for customer in self.store.customers()}
        for name in names:
            if name in there:
                self.store.remove(name)
        path.write_text("".join(self.store.add(name, terms) + "\n" for name in names))
        return path

    def queries(self, name="default"):
        return next(customer.queries for customer in self.store.customers() if customer.name == name)


class Relay(ThreadingHTTPServer):
    """Passes requests on to a port, and answers back. `troubles` are functions of the handler by the number of the
    POST, counted from 1, or 0 for all: each returns whether it has dealt with the request. With `certificate`, by
    trustme, it speaks TLS."""

    daemon_threads = True

    def __init__(self, port, troubles=None, certificate=None):
        super().__init__(("127.0.0.1", 0), _Relaying)
        self.scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.upstream, self.troubles, self.posts = port, dict(troubles or {}), 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"{self.scheme}://127.0.0.1:{self.server_port}"


class _Relaying(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except OSError:  # the client has gone
            self.close_connection = True

    def do_GET(self):
        if not self.server.troubles.get(self.path, lambda handler: False)(self):
            self.give(*self.passed_on())

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts += 1
        troubles = self.server.troubles
        trouble = troubles.get(self.server.posts, troubles.get(0, lambda handler: False))
        if not trouble(self):
            self.give(*self.passed_on())

    def passed_on(self):
        """The answer of the API behind: status, headers, content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        connection.request(self.command, self.path, getattr(self, "body", None), dict(self.headers))
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()

    def give(self, status, headers, content, cut=None):
        """Answer, or only the first bytes of it and then close."""
        self.send_response(status)
        for name in {"Content-Type", "Retry-After", "X-Queries-Used"} & headers.keys():
            self.send_header(name, headers[name])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:cut])
        self.close_connection = cut is not None

    def hang_up(self):
        self.close_connection = True
        return True

    def log_message(self, *arguments):
        pass


class Course(ThreadingHTTPServer):
    """A course's API: a token, pictures as base64 PNG in JSON, at most 1,000 of them, a pause between calls."""

    daemon_threads = True

    def __init__(self, victim, pause):
        super().__init__(("127.0.0.1", 0), _Answering)
        self.victim, self.pause, self.last, self.calls = victim, pause, -np.inf, []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class _Answering(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        pictures = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["token"] != "secret" or len(pictures) > 1000:
            return self.send_error(403)
        if time.monotonic() < server.last + server.pause:
            return self.send_error(429)
        images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in pictures]
        answers = server.victim.query(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
        content = json.dumps({"representations": answers.tolist()}).encode()
        server.calls.append(len(pictures))
        server.last = time.monotonic()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)
        return None

    def log_message(self, *arguments):
        pass


def killing(pid=None, number=signal.SIGKILL):
    """A trouble that signals a process, by default this one, once the API has answered; the answer is lost."""

    def trouble(handler):
        handler.passed_on()
        os.kill(pid() if pid else os.getpid(), number)
        return handler.hang_up()

    return trouble


def ask_in_a_job(url, key, images, folder):
    """What a process of a job does: asks as one of them, and saves the answers that it has."""
    answers = Client(RemoteVictim(url, [key]), folder / "kept").ask(Stored(images), torch.arange(len(images)))
    torch.save(answers, folder / f"answers-{dist.get_rank()}")
