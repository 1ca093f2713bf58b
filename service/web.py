"""The HTTP side: routes, keys, bodies within limits, and errors as JSON with a code and a remedy.

A body is read whole before it is looked at, up to --max-body, within --patience seconds, and only for a valid key.
What takes long runs in threads, so the process goes on answering /healthz and refusals.
"""

import asyncio
import contextlib
import io
import json
import logging
import re
import sqlite3
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.accounts import Customer
from service.answering import Answered, Desk
from service.bodies import KINDS, Reader
from service.refusal import Refusal

AT_ONCE, OF_AN_ACCOUNT = 32, 16  # requests; fewer than the threads that Starlette has for them
NPY_TYPE, JSON_TYPE = "application/x-npy", "application/json"


class Front:
    """The routes. card: what GET /v1/model says of the model."""

    def __init__(self, desk: Desk, reader: Reader, card: Mapping[str, Any]):
        self.desk, self.reader, self.limits, self.card = desk, reader, reader.limits, dict(card)
        self._active: Counter[str] = Counter()

    def app(self) -> Callable[..., Awaitable[None]]:
        """The ASGI application."""
        silent = dict.fromkeys(("tracing", "metrics", "logs", "auto_configure"), False)
        app = FastAPI(title="Representations of images", version="1", redoc_url=None, telemetry=silent)
        with_key = {"dependencies": [Depends(HTTPBearer(auto_error=False))]}
        body = {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in KINDS}}
        asking = {"methods": ["POST"], "openapi_extra": {"requestBody": body}, **with_key}
        app.add_api_route("/v1/representations", self.representations, **asking)
        app.add_api_route("/v1/usage", self.usage, **with_key)
        app.add_api_route("/v1/model", self.model, **with_key)
        app.add_api_route("/healthz", self.health)
        for kind in (Refusal, HTTPException, ClientDisconnect, sqlite3.OperationalError, Exception):
            app.add_exception_handler(kind, _refused)
        return Numbered(app)

    # ---- routes ----

    async def health(self) -> dict[str, str]:
        """Whether the service runs."""
        return {"status": "ok"}

    async def model(self, request: Request) -> dict[str, Any]:
        """What the model takes and answers, and what that costs."""
        await self._customer(request)
        return self.card

    async def usage(self, request: Request) -> dict[str, Any]:
        """The account's queries, and what its terms leave."""
        return (await self._customer(request)).usage

    async def representations(self, request: Request) -> Response:
        """The representations of images: an array (B, 3, H, W), or pictures."""
        customer = await self._customer(request)
        kind, key = _media_type(request.headers), _idempotency_key(request.headers)
        with self._place(customer.name):
            body = await self._body(request)
            return await run_in_threadpool(self._answer, request.headers, customer, kind, body, key)

    # ---- parts of a request ----

    async def _customer(self, request: Request) -> Customer:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Refusal(401, "bad_key", "the request has no key", "send Authorization: Bearer KEY")
        return await run_in_threadpool(self.desk.customer, key.strip())

    @contextlib.contextmanager
    def _place(self, account: str) -> Iterator[None]:
        """One of the places for requests that are read or answered. Refusal where all are taken."""
        if self._active.total() >= AT_ONCE or self._active[account] >= OF_AN_ACCOUNT:
            raise _busy("too many requests are being answered")
        self._active[account] += 1
        try:
            yield
        finally:
            self._active[account] -= 1

    async def _body(self, request: Request) -> bytes:
        most, size, chunks = self.limits.max_body * 2**20, 0, []
        refusal = Refusal(
            413, "too_large", f"the body has more than {self.limits.max_body} MiB", "send fewer images in a request"
        )
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise refusal  # uvicorn throws the rest of the body away
        try:
            async with asyncio.timeout(self.limits.patience):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > most:
                        raise refusal
                    chunks.append(chunk)
        except TimeoutError:
            said = f"the body did not arrive within {self.limits.patience:g} seconds"
            raise Refusal(408, "slow_body", said, "send fewer images in a request") from None
        return b"".join(chunks)

    def _answer(self, headers: Headers, customer: Customer, kind: str, body: bytes, key: str | None) -> Response:
        """In a thread: the response to a body that has arrived."""
        parts = _files_of(headers, body, self.limits.max_batch) if kind == "multipart/form-data" else [body]
        try:
            images = self.reader.read(kind, parts)
            return _response(self.desk.answer(customer, images, key), JSON_TYPE in headers.get("accept", ""))
        except (MemoryError, torch.OutOfMemoryError):
            raise _busy("the service is out of memory") from None


def _media_type(headers: Headers) -> str:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in KINDS or headers.get("content-encoding", "identity") != "identity":
        said = f"bodies of type {kind[:40] or 'none'}, or compressed ones, are not read"
        raise Refusal(415, "unsupported_type", said, f"send, not compressed, {', '.join(KINDS)}")
    return kind


def _idempotency_key(headers: Headers) -> str | None:
    key = headers.get("idempotency-key")
    if key is not None and not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", key):
        remedy = "use up to 64 letters, digits, dots, dashes, underscores"
        raise Refusal(400, "bad_request", "the Idempotency-Key has other characters, or is too long", remedy)
    return key


def _files_of(headers: Headers, body: bytes, most: int) -> list[bytes]:
    """The contents of the files in a multipart body."""

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    async def parse() -> list[bytes]:
        form = await MultiPartParser(headers, stream(), max_files=most, max_fields=0).parse()
        if {name for name, _ in form.multi_items()} - {"images"}:
            raise ValueError("a file is not in the field `images`")
        return [await file.read() for _, file in form.multi_items()]

    try:
        return asyncio.run(parse())  # this thread has no loop of its own
    except (MultiPartException, ValueError, KeyError) as error:
        said = f"the form cannot be read: {str(getattr(error, 'message', error))[:100]}"
        raise Refusal(400, "bad_request", said, f"send at most {most} files in the field `images`") from None


# ---- responses -------------------------------------------------------------------------------------------------------


def _response(answered: Answered, as_json: bool) -> Response:
    usage = answered.customer.usage
    headers = {"X-Queries-Used": str(usage["queries"])}
    headers |= {} if usage["left"] is None else {"X-Queries-Left": str(usage["left"])}
    headers |= {"X-Replayed": "true"} if answered.replayed else {}
    if not as_json:
        return Response(answered.answers, headers=headers, media_type=NPY_TYPE)
    rows = np.load(io.BytesIO(answered.answers), allow_pickle=False).tolist()
    return Response(json.dumps({"representations": rows, "usage": usage}), headers=headers, media_type=JSON_TYPE)


def _busy(message: str) -> Refusal:
    return Refusal(503, "busy", message, "send it again in 2 seconds", 2)


async def _refused(request: Request, error: Exception) -> Response:
    """The response to what a route raised; uvicorn logs the traceback of what nobody expected."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody reads it
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "bad_method"}.get(error.status_code, "bad_request")
        error = Refusal(error.status_code, code, f"{request.method} {request.url.path[:80]} is none", "see /docs")
    elif isinstance(error, sqlite3.OperationalError):
        error = _busy("the ledger cannot be written now")
    elif not isinstance(error, Refusal):
        error = Refusal(500, "internal", "the service failed", "send it again, or tell its owner the X-Request-Id")
    headers = {} if error.wait is None else {"Retry-After": str(error.wait)}
    headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    return Response(json.dumps(error.content), error.status, headers, JSON_TYPE)


class Numbered:
    """An ASGI application whose responses have a number, X-Request-Id; the log has that of a request that failed."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Callable[..., Any], send: Callable[..., Awaitable[None]]
    ) -> None:
        number = uuid.uuid4().hex.encode()

        async def numbered(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", number)]
            await send(message)

        try:
            await self.app(scope, receive, numbered)
        except Exception:
            logging.getLogger("uvicorn.error").error("request %s failed", number.decode())
            raise
