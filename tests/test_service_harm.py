"""Requests that mean harm: each is refused with its code, nothing is charged, and the service goes on."""

import os
import pickle
import select
import socket
import struct
import time
import zlib

import numpy as np
import pytest
import torch

from data_aug.datasets import to_float
from defenses.buckets import Buckets
from service import bodies, patience
from service.answering import Desk
from service.bodies import Limits, Preprocessing, Reader
from service.refusal import Refusal
from tests.networks import small_encoder
from tests.service import KNOWN, NPY, as_json, form, npy, picture, refused, serving
from victim import Victim


def header(shape="(1, 3, 32, 32)", descr="'|u1'", order="False"):
    """An npy file's header that says this, without data."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width, height):
    """A PNG of a few bytes that says it has so many pixels."""
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")


IMAGES = torch.arange(2 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(2, 3, 32, 32)
FLOATS = to_float(IMAGES)
WHOLE = picture(IMAGES[0])
JSON, PNG = "application/json", "image/png"


def with_number(value):
    changed = FLOATS.clone()
    changed[1, 2, 3, 4] = value
    return npy(changed)


class Harm:
    """What unpickling would call."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


# Name: the status and the code, the type, the body.
BODIES = {
    "nothing": (400, "bad_array", NPY, b""),
    "no type": (415, "unsupported_type", "", npy(IMAGES)),
    "another type": (415, "unsupported_type", "text/html", npy(IMAGES)),
    "a pickle": (400, "bad_array", NPY, pickle.dumps(Harm())),
    "an array of objects": (400, "bad_array", NPY, npy(np.array([[[[Harm()]]]], dtype=object))),
    "objects by the header": (400, "bad_array", NPY, header(descr="'|O'") + pickle.dumps(Harm())),
    "an npz": (400, "bad_array", NPY, b"PK\x03\x04" + bytes(100)),
    "a picture as an array": (400, "bad_array", NPY, WHOLE),
    "doubles": (400, "bad_array", NPY, npy(FLOATS.double())),
    "halves": (400, "bad_array", NPY, npy(FLOATS.half())),
    "long integers": (400, "bad_array", NPY, npy(IMAGES.long())),
    "the other order of bytes": (400, "bad_array", NPY, npy(FLOATS.numpy().astype(">f4"))),
    "a structure": (400, "bad_array", NPY, npy(np.zeros((1, 3, 32, 32), [("a", "u1")]))),
    "truth": (400, "bad_array", NPY, npy(IMAGES > 9)),
    "text": (400, "bad_array", NPY, npy(np.full((1, 3, 32, 32), "a"))),
    "two dimensions": (400, "bad_array", NPY, npy(IMAGES[0, 0])),
    "five dimensions": (400, "bad_array", NPY, npy(IMAGES[None])),
    "no dimension": (400, "bad_array", NPY, npy(np.uint8(3))),
    "grey": (400, "bad_array", NPY, npy(IMAGES[:, :1])),
    "no image": (400, "bad_array", NPY, npy(IMAGES[:0])),
    "another size": (400, "bad_image", NPY, npy(IMAGES[:, :, :16, :16])),
    "too many images": (413, "too_large", NPY, npy(IMAGES.repeat(5, 1, 1, 1))),
    "a shape without data": (400, "bad_array", NPY, header("(1000000000000, 3, 32, 32)")),
    "a shape beyond 64 bits": (400, "bad_array", NPY, header(f"({2**70}, 3, 32, 32)")),
    "a negative shape": (400, "bad_array", NPY, header("(-1, 3, -32, 32)") + bytes(3072)),
    "a shape of texts": (400, "bad_array", NPY, header("('a', 3, 32, 32)") + bytes(3072)),
    "data cut off": (400, "bad_array", NPY, npy(IMAGES)[:-1]),
    "data too long": (400, "bad_array", NPY, npy(IMAGES) + b"\0"),
    "the other order of axes": (400, "bad_array", NPY, npy(np.asfortranarray(IMAGES.numpy()))),
    "a header that is deep": (400, "bad_array", NPY, header("(" * 400)),
    "a header that is long": (400, "bad_array", NPY, header("(1, 3, 32, 32)" + " " * 60_000) + bytes(3072)),
    "a header that is code": (400, "bad_array", NPY, header("__import__('os').system('touch harmed')")),
    "a header that is cut off": (400, "bad_array", NPY, npy(IMAGES)[:30]),
    "a version of tomorrow": (400, "bad_array", NPY, b"\x93NUMPY\x09\x00" + bytes(100)),
    "NaN": (422, "bad_numbers", NPY, with_number(float("nan"))),
    "infinite": (422, "bad_numbers", NPY, with_number(float("inf"))),
    "minus infinite": (422, "bad_numbers", NPY, with_number(float("-inf"))),
    "negative": (422, "bad_numbers", NPY, with_number(-1e-6)),
    "up to 255": (422, "bad_numbers", NPY, npy(IMAGES.float())),
    "a body too large": (413, "too_large", NPY, bytes(2 * 2**20)),
    "a PNG that swells": (400, "bad_image", PNG, bomb(60_000, 60_000)),
    "a PNG beyond PIL": (400, "bad_image", PNG, bomb(2**31 - 1, 2**31 - 1)),
    "a PNG without pixels": (400, "bad_image", PNG, bomb(0, 32)),
    "a PNG with other data": (400, "bad_image", PNG, WHOLE[:60] + bytes(40) + WHOLE[100:]),
    "a PNG cut off": (400, "bad_image", PNG, WHOLE[: len(WHOLE) // 2]),
    "a PNG of another size": (400, "bad_image", PNG, picture(IMAGES[0, :, :8, :8])),
    "a JPEG cut off": (400, "bad_image", "image/jpeg", picture(IMAGES[0], "JPEG")[:300]),
    "a GIF": (400, "bad_image", PNG, picture(IMAGES[0], "GIF")),
    "PostScript": (400, "bad_image", PNG, b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    "an array as a picture": (400, "bad_image", PNG, npy(IMAGES)),
    "broken JSON": (400, "bad_request", JSON, b'{"images": ["'),
    "JSON of numbers": (400, "bad_request", JSON, b'{"images": [1, 2]}'),
    "JSON that is a list": (400, "bad_request", JSON, b'["aaaa"]'),
    "JSON without images": (400, "bad_request", JSON, b'{"images": []}'),
    "JSON of another key": (400, "bad_request", JSON, b'{"pictures": ["aaaa"]}'),
    "JSON that is deep": (400, "bad_request", JSON, b'{"images": ' + b"[" * 500_000),
    "JSON of lists": (400, "bad_request", JSON, b'{"images": [' + b"[]," * 300_000 + b"[]]}"),
    "JSON of too many": (413, "too_large", JSON, b'{"images": [' + b'"",' * 300_000 + b'""]}'),
    "JSON of no base64": (400, "bad_request", JSON, b'{"images": ["!!!!"]}'),
    "JSON of no picture": (400, "bad_image", JSON, b'{"images": ["aaaa"]}'),
    "JSON that is no text": (400, "bad_request", JSON, b'{"images": ["\xff\xfe"]}'),
    "JSON of a long number": (400, "bad_request", JSON, b'{"images": [' + b"9" * 100_000 + b"]}"),
    "two types at once": (400, "bad_array", JSON, as_json(npy(IMAGES), npy(FLOATS))),
    "a form without its boundary": (400, "bad_request", "multipart/form-data", form(WHOLE)[1]),
    "a form of another boundary": (400, "bad_request", "multipart/form-data; boundary=abc", form(WHOLE)[1]),
    "a form of another field": (400, "bad_request", *form(WHOLE, name="files")),
    "a form of too many": (400, "bad_request", *form(*[WHOLE] * 9)),
    "a form cut off": (400, "bad_request", form(WHOLE)[0], form(WHOLE)[1][:40]),
    "a form without files": (400, "bad_request", *form()),
    "a form of arrays": (400, "bad_image", *form(npy(IMAGES))),
}
GOOD = npy(IMAGES)
# Name: the status and the code, the account, the method, the path, further headers.
ASK = ("POST", "/v1/representations")
REQUESTS = {
    "no key": (401, "bad_key", None, *ASK, {}),
    "another key": (401, "bad_key", None, *ASK, {"Authorization": "Bearer sk-" + "a" * 43}),
    "a long key": (401, "bad_key", None, *ASK, {"Authorization": "Bearer " + "a" * 9000}),
    "a key of strange letters": (401, "bad_key", None, "GET", "/v1/usage", {"Authorization": "Bearer \xff' OR 1=1 --"}),
    "another scheme": (401, "bad_key", None, "GET", "/v1/model", {"Authorization": "Basic YWxpY2U6"}),
    "a key that is over": (403, "expired", "late", *ASK, {}),
    "a budget that is spent": (402, "budget_exceeded", "poor", *ASK, {}),
    "a rate that is too low": (413, "too_large", "slow", *ASK, {}),
    "another path": (404, "not_found", "good", "GET", "/v1/../../etc/passwd", {}),
    "another method": (405, "bad_method", "good", "GET", "/v1/representations", {}),
    "another method on usage": (405, "bad_method", "good", "DELETE", "/v1/usage", {}),
    "a compressed body": (415, "unsupported_type", "good", *ASK, {"Content-Encoding": "gzip"}),
    "a request's key with blanks": (400, "bad_request", "good", *ASK, {"Idempotency-Key": "a b"}),
    "a request's key that is long": (400, "bad_request", "good", *ASK, {"Idempotency-Key": "a" * 65}),
}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A server of small limits with several accounts."""
    accounts = {"good": {}, "late": {"expires": "2020-01-01"}, "poor": {"budget": 1}, "slow": {"rate": "1/day"}}
    victim = Victim(small_encoder(), defences=[Buckets(bucket_bits=4, secret=7)])
    folder, limits = tmp_path_factory.mktemp("attacked"), Limits(max_batch=8, max_body=1, patience=2.0)
    with pytest.MonkeyPatch.context() as patch, serving(folder, victim, accounts, limits=limits) as server:
        patch.setattr(patience, "SECONDS", 2.0)
        yield server


@pytest.fixture
def unharmed(attacked, tmp_path, monkeypatch):
    """The server; after the test it has charged nothing for that, has run nothing, and answers."""
    monkeypatch.chdir(tmp_path)
    before = attacked.usage("good")["queries"]
    yield attacked
    assert not list(tmp_path.iterdir())
    assert attacked.usage("good")["queries"] == before
    assert torch.isfinite(attacked.query(IMAGES, "good")).all()


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_means_harm(name, unharmed):
    status, code, kind, body = BODIES[name]
    found, _, answer = unharmed.ask("POST", "/v1/representations", body, {"Content-Type": kind}, "good")
    assert refused(found, answer) == (status, code)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_that_means_harm(name, unharmed):
    status, code, account, method, path, headers = REQUESTS[name]
    found, answered, answer = unharmed.ask(
        method, path, GOOD if method == "POST" else b"", {**KNOWN, **headers}, account
    )
    assert refused(found, answer) == (status, code)
    assert len(answered["X-Request-Id"]) == 32


# Name: the status and the code, the picture; of a service that takes images of any size.
SWELLING = {
    "a side too long": (413, "too_large", bomb(4097, 1)),
    "far too many pixels": (413, "too_large", bomb(20_000, 3_000)),
    "more than PIL opens": (400, "bad_image", bomb(60_000, 60_000)),
    "fewer data than pixels": (400, "bad_image", bomb(4096, 4096)),
    "no pixels": (400, "bad_image", bomb(0, 32)),
}


@pytest.mark.parametrize("name", SWELLING)
def test_a_picture_of_any_size_that_swells(name):
    status, code, file = SWELLING[name]
    with pytest.raises(Refusal) as refusal:
        Reader(Preprocessing(resize=32), 32).read(PNG, [file])
    assert (refusal.value.status, refusal.value.code) == (status, code)


def test_pictures_that_swell_together(monkeypatch):
    monkeypatch.setattr(bodies, "MOST_PIXELS", 5 * 64**2)
    large = picture(torch.zeros(3, 64, 64, dtype=torch.uint8))
    reader = Reader(Preprocessing(resize=32), 32)
    assert reader.read("multipart/form-data", [large] * 5).shape == (5, 3, 32, 32)
    with pytest.raises(Refusal, match="more than 20,480 pixels"):
        reader.read("multipart/form-data", [large] * 6)


def test_there_are_enough_requests_that_mean_harm():
    assert len(BODIES) + len(REQUESTS) >= 40


def head(server, *lines):
    """The beginning of a request for answers."""
    words = ["POST /v1/representations HTTP/1.1", "Host: x", f"Authorization: Bearer {server.keys['good']}"]
    return "\r\n".join([*words, f"Content-Type: {NPY}", *lines, "", ""]).encode()


def test_a_body_that_does_not_come(unharmed):
    answer = unharmed.raw(head(unharmed, "Content-Length: 9000") + GOOD[:100])
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"slow_body"' in answer


def test_a_body_that_comes_in_drops(unharmed):
    answer = unharmed.raw(head(unharmed, "Content-Length: 9000"), *[b"x"] * 20, pause=0.15)
    assert b'"slow_body"' in answer


def test_a_body_without_end(unharmed):
    chunks = [b"100000\r\n" + bytes(2**20) + b"\r\n"] * 12
    assert b'"too_large"' in unharmed.raw(head(unharmed, "Transfer-Encoding: chunked"), *chunks)


def test_a_body_of_a_terabyte_is_refused_at_once(unharmed):
    answer = unharmed.raw(head(unharmed, f"Content-Length: {10**12}"))
    assert b'"too_large"' in answer


@pytest.mark.parametrize(
    "words",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"A" * 200_000,
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
    ],
    ids=["TLS", "no path", "a long line", "a broken header"],
)
def test_what_is_no_http(words, unharmed):
    answer = unharmed.raw(words, b"\r\n\r\n")
    assert not answer or answer.startswith(b"HTTP/1.1 400 ")


def test_headers_that_do_not_come(unharmed):
    started = time.monotonic()
    assert unharmed.raw(head(unharmed)[:40]) == b""
    assert time.monotonic() - started > 1.5


def test_a_client_that_goes_away(unharmed):
    with socket.create_connection(("127.0.0.1", unharmed.port)) as connection:
        connection.sendall(head(unharmed, "Content-Length: 9000") + GOOD[:100])


def test_more_requests_at_once_than_there_are_places(tmp_path):
    """Slow requests of an account take all of its places, and none of another's."""
    with serving(tmp_path, Victim(small_encoder()), {"good": {}, "poor": {"budget": 1}}) as server:
        waiting = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(17)]
        for connection in waiting:
            connection.sendall(head(server, "Content-Length: 9000"))
        (last, *_), _, _ = select.select(waiting, [], [], 25)  # the one that found no place
        assert last.recv(100).startswith(b"HTTP/1.1 503 ")
        status, headers, answer = server.ask("POST", "/v1/representations", GOOD, KNOWN, "good")
        assert refused(status, answer) == (503, "busy")
        assert headers["Retry-After"] == "2"
        assert server.ask("POST", "/v1/representations", GOOD, KNOWN, "poor")[0] == 402
        for connection in waiting:
            connection.close()
        deadline = time.monotonic() + 25
        while server.ask("POST", "/v1/representations", GOOD, KNOWN, "good")[0] != 200:
            assert time.monotonic() < deadline


class Broken(Desk):
    """A desk with a fault of its own."""

    def answer(self, customer, images, key=None):
        raise {1: KeyError("bug"), 2: MemoryError()}[len(images)]


def test_a_fault_of_the_service_is_no_traceback(images, tmp_path):
    with serving(tmp_path, Victim(small_encoder()), desk=Broken) as server:
        for count, expected in ((1, (500, "internal")), (2, (503, "busy"))):
            status, headers, answer = server.ask("POST", "/v1/representations", npy(images[:count]), KNOWN)
            assert refused(status, answer) == expected
            assert len(headers["X-Request-Id"]) == 32
