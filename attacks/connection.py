"""A connection to an API over HTTP: requests that wait and try again, as long as the user allows in all."""

import contextlib
import http.client
import json
import random
import ssl
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from jobs.ending import Stopped, received, show
from utils import UserError

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before the second try, and the most where the API asks for none
# Seconds without a byte after which a request counts as lost, and the least of them where less is left to wait.
SILENCE, LEAST_SILENCE = 300.0, 30.0
LOOK_EVERY = 0.2  # seconds between looks for a signal, while waiting
LARGEST_TEXT = 2**20  # bytes of an answer in JSON
BUSY = (408, 429, 502, 503, 504)  # the same request may be answered later
TRIES_AFTER_500 = 5  # such an error may be of this request alone


class Unreachable(UserError):
    """Nothing answers at the address."""


class Connection:
    """A connection that is kept open, to the API at a URL. UserError where the URL cannot be of an API.

    waited: the seconds so far for an API that was busy, limited its rate or could not be reached; `max_wait` is the
    most of them, over the connection's life. lost: set where an answer was lost.
    """

    def __init__(self, url: str, max_wait: float):
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UserError(f"{url} is no address of an API ({error}): give http://HOST:PORT") from None
        if not parts.hostname or parts.query or parts.fragment or parts.username is not None:
            raise UserError(f"{url} is no address of an API: give http://HOST:PORT alone, and the key in a file")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.url, self.prefix = url, parts.path.rstrip("/")
        self.host = parts.hostname if port is None else f"{parts.hostname}_{port}"
        self.max_wait, self.waited = max_wait, 0.0
        self._http = kind(parts.hostname, port)
        self.lost = False
        self._told: set[int | None] = set()

    def request(
        self,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        most: int = LARGEST_TEXT,
        patient: bool = True,
    ) -> bytes:
        """What the API answers to GET, or with a body to POST: at most so many bytes.

        The same request is sent again, after Retry-After or a growing wait, where the API was busy or its answer was
        lost. With patient=False an API that cannot be reached is Unreachable at once. UserError where the API refuses,
        or `max_wait` is over; Stopped when a signal came while it waited.
        """
        tries = 0
        while True:
            began, fresh, asked, status = time.monotonic(), self._http.sock is None, None, None
            try:
                status, answered, content = self._once(path, headers, body, most)
            except ssl.SSLCertVerificationError as error:
                why = f"{self.url} is not trusted ({error.verify_message})"
                raise UserError(f"{why}: correct the address, or name its certificate by SSL_CERT_FILE") from None
            except (OSError, http.client.HTTPException) as error:
                self._http.close()
                self.lost = True
                why = f"cannot be reached ({error or type(error).__name__})"
                if not patient and (fresh or tries):
                    raise Unreachable(f"{self.url} {why}: start the API, or correct the address") from None
                self.waited += time.monotonic() - began
            else:
                if status == 200:
                    return content
                fresh, why = True, f"answers {status} {_said(content)}"
                if status not in BUSY and (status != 500 or tries >= TRIES_AFTER_500):
                    raise UserError(f"{self.url} {why}")
                asked = _seconds(answered.get("Retry-After"))
            if fresh or tries:  # a connection that was kept may have been closed by the other side long ago
                self._wait(tries, asked, why, status)
            tries += 1

    def _once(
        self, path: str, headers: Mapping[str, str], body: bytes | None, most: int
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content of the answer to a single request. OSError or HTTPException where it is lost."""
        self._http.timeout = min(SILENCE, max(LEAST_SILENCE, self.max_wait - self.waited))
        # An API that refuses may answer, and close, before it has read the whole body.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._http.request("GET" if body is None else "POST", self.prefix + path, body, dict(headers))
        response = self._http.getresponse()
        length = response.length
        content = response.read(most + 1)
        if len(content) > most:
            self._http.close()
            raise UserError(f"{self.url} answers with more than {most:,} bytes: is it such an API?")
        if length is not None and len(content) < length:
            raise http.client.IncompleteRead(content, length - len(content))
        return response.status, response.headers, content

    def _wait(self, tries: int, asked: int | None, why: str, status: int | None) -> None:
        """Wait the seconds that the API asked for, or longer with each try. UserError where that is too long.

        Why is said once for each status, None where there was no answer.
        """
        left = self.max_wait - self.waited
        growing = min(LONGEST_WAIT, FIRST_WAIT * 2**tries) * random.uniform(0.5, 1)
        # Not all clients that were told the same come back at the same time, nor at once where it was 0.
        seconds = min(growing, left) if asked is None else asked + random.uniform(0.1, FIRST_WAIT)
        why = "".join(filter(str.isprintable, why))
        if seconds > left:
            rest = f"--max-wait {self.max_wait:g} has {max(left, 0):.0f} left"
            raise UserError(f"{self.url} {why} and asks to wait {asked} seconds, {rest}: give more")
        if left <= 0:
            raise UserError(f"{self.url} {why}, and --max-wait {self.max_wait:g} is over: start the API, or give more")
        if status not in self._told:
            self._told.add(status)
            show(f"{self.url} {why}: the request is repeated, for {left:.0f} seconds at most")
        end = time.monotonic() + seconds
        while (rest := end - time.monotonic()) > 0:
            if received():
                raise Stopped(f"stopped by {received()} while {self.url} was waited for: --resume goes on")
            time.sleep(min(rest, LOOK_EVERY))
        self.waited += seconds


def _seconds(text: str | None) -> int | None:
    """The whole seconds of Retry-After; None where it has a date or nothing."""
    return int(text) if text and text.isdecimal() and len(text) < 10 else None


def _said(content: bytes) -> str:
    """The code, message and remedy in an answer that is an error, as far as it has them."""
    try:
        error = json.loads(content)["error"]
        code, message, remedy = (str(error.get(name, ""))[:300] for name in ("code", "message", "remedy"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "without a reason"
    return f"{code} ({message})" + (f": {remedy}" if remedy else "")
