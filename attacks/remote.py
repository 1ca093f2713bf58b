"""The victim of an API over HTTP (docs/service.md), as an attacker or a user asks it.

victim = RemoteVictim("http://127.0.0.1:8000", keys=[Path("alice.key").read_text().strip()], budget=9000)
answers = victim.query(images)                                          # as of a `Victim` in this process
"""

import hashlib
import io
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from attacks.connection import Connection, Unreachable
from attacks.elsewhere import BATCH, LARGEST_WIDTH, Elsewhere
from files.address import Address
from files.reading import checked, list_of, number, optional, read_json, record, text
from files.writing import atomic_path
from jobs.ending import show
from settings import Command, Settings, setting
from utils import UserError, first_process
from victim import BudgetExceeded

LARGEST_BODY = 32 * 2**20  # bytes of a request
_COUNT, _MANY = number(whole=True, at_least=0), number(whole=True, at_least=1, at_most=LARGEST_WIDTH)
_CARD = {"input": list_of(_MANY, at_least=2), "dim": _MANY, "version": text(), "max_batch": _MANY}
# What an attack notes beside its answers.
_NOTE = {"name": text(), "counted": number(whole=True), "address": text(), "card": record(**_CARD)}
_NOTE_IS = "a note of an attack's requests"
_USAGE = {"queries": _COUNT, "left": optional(_COUNT), "rate": optional(text())}


def _without_api(command: Command) -> str | None:
    over_http = isinstance(command.victim, Address) and command.victim.startswith("http")
    return None if over_http else "without --victim http://HOST:PORT"


@dataclass(frozen=True)
class Remote(Settings):
    """How a victim behind an API over HTTP is asked."""

    api_key_file: Path | None = setting(
        None,
        "file with the account's key, for --victim http://HOST:PORT; for --sybils a key on each line",
        named=False,
        acts=_without_api,
    )
    max_wait: float = setting(
        3600.0,
        "seconds to wait in all for an API that is busy, limits its rate or cannot be reached",
        at_least=0,
        named=False,
        acts=_without_api,
    )
    title = "victim"


def read_keys(path: Path | None, url: str) -> list[str]:
    """The keys in a file, one on each line. UserError where there is none, or a line cannot be a key."""
    if path is None:
        raise UserError(f"{url} has accounts: give --api-key-file FILE, which has the account's key")
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"--api-key-file {path}: {error.strerror}: give the file with the account's key") from None
    except UnicodeDecodeError:
        lines = [""]
    if not lines or not all(line.isascii() and line.isprintable() and " " not in line and line for line in lines):
        raise UserError(f"--api-key-file {path} has {'a line that is' if lines else ''} no key: a line is a key")
    return lines


class Usage(NamedTuple):
    """What the API counts: queries so far; how many are left, None for any number; the most images of a request where
    the rate, such as 100/minute, does not let more pass at once."""

    queries: int
    left: int | None
    burst: int | None


class RemoteVictim(Elsewhere):
    """The victim behind the API at a URL. Each of the keys is of an account; the first is used first.

    attacks: the folder of earlier attacks, to go on with one although the API cannot be reached any more. UserError
    where no such API answers, or it refuses a key.
    """

    repeats = True

    def __init__(
        self,
        url: str,
        keys: Sequence[str],
        budget: int | None = None,
        max_wait: float = 3600.0,
        attacks: Path | None = None,
    ):
        super().__init__(budget)
        self._http, self._keys, self.accounts = Connection(url, max_wait), list(keys), len(keys)
        self.address, self.label = url, self._http.host
        try:
            self._card, usage = self._get("/v1/model", _CARD), self._usage()
        except Unreachable:
            self._card, usage = self._remembered(attacks), Usage(0, 0, None)
            if self._card is None:
                raise
        self.dim, self.version = self._card["dim"], self._card["version"]
        if not (self.version.isascii() and self.version.isalnum() and len(self.version) <= 64):
            raise UserError(f"{url} has a version that is no name: {self.version[:80]!r}")
        height, width = self.input_size = tuple(self._card["input"][:2])
        fitting = max(1, LARGEST_BODY // (3 * height * width))
        self.most = self.batch_size = min(BATCH, fitting, self._card["max_batch"], usage.burst or BATCH)
        self._name, self._counted, self._left = secrets.token_hex(8), usage.queries, usage.left

    def words(self) -> str:
        height, width = self.input_size
        left = "any number of" if self._left is None else self._left
        return f"{height} x {width} pixels, {self.dim} numbers, {self.most} images a request, {left} queries left"

    def _remembered(self, attacks: Path | None) -> dict[str, Any] | None:
        """What the API said of itself in the latest of the attacks on it; None where there was none."""
        notes = sorted(attacks.rglob("api-queries-*.json"), key=lambda path: path.stat().st_mtime) if attacks else []
        known = [checked(read_json(path, _NOTE_IS), _NOTE, str(path)) for path in notes]
        cards = [note["card"] for note in known if note.get("address") == self.address and "card" in note]
        if not cards:
            return None
        show(f"{self.address} cannot be reached: only an attack that has all its answers can go on")
        return cards[-1]

    def begin(self, keep: Path | None) -> None:
        """As `Elsewhere`. Beside the file goes how the attack's requests are named, and what the API had counted.

        A request whose answer was lost is repeated under its name, by this process or a later one: the API answers it
        without counting it again. UserError where the accounts cannot pay for the budget.
        """
        super().begin(keep)
        if not first_process():
            return
        note = keep.with_name(f"api-{keep.name}.json") if keep else None
        if keep and keep.exists() and note.exists():
            begun = checked(read_json(note, _NOTE_IS), _NOTE, str(note))
            self._name, self._counted = begun.get("name", self._name), begun.get("counted", self._counted)
            return
        usage, asked = self._usage(), self.ledger.queries
        self._name, self._counted = secrets.token_hex(8), usage.queries - asked
        needed = 0 if self.budget is None else self.budget - asked
        if usage.left is not None and usage.left < needed:
            raise BudgetExceeded(f"{self.address} has {usage.left} queries left, not {needed}: lower --num_queries")
        if note:
            content = {"name": self._name, "counted": self._counted, "address": self.address, "card": self._card}
            with atomic_path(note) as temporary:
                temporary.write_text(json.dumps(content))

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """What the API has counted since the attack began; prints how that differs from the ledger."""
        if not first_process():
            return {}
        try:
            counted = self._usage().queries - self._counted
        except UserError as error:  # the answers are there all the same
            show(f"what the API counted is not known: {error}")
            return {}
        more = counted - self.ledger.queries
        difference = f"{abs(more)} {'more' if more > 0 else 'fewer'} than here" if more else "as many as here"
        show(f"queries that {self.address} counted: {counted}, {difference}; waited {self._http.waited:.0f} s")
        return {"api_queries": counted}

    # ---- requests ----

    def _headers(self, number: int) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._keys[number]}", "Accept": "application/json"}

    def _get(self, path: str, fields: Mapping[str, Any], number: int = 0, patient: bool = False) -> dict[str, Any]:
        """These entries of what a route says to an account; those that may be null may lack."""
        content, where = self._http.request(path, self._headers(number), patient=patient), f"{self.address}{path}"
        try:
            found = checked(json.loads(content), fields, where)
        except (ValueError, RecursionError):
            raise UserError(f"{where} does not answer in JSON: is it such an API?") from None
        lacks = [name for name, check in fields.items() if name not in found and check(None)]
        if lacks:
            raise UserError(f"{where} says nothing of {lacks[0]}: is it such an API?")
        return found

    def _usage(self) -> Usage:
        """What the API counts of all accounts together."""
        accounts = [self._get("/v1/usage", _USAGE, number) for number in range(len(self._keys))]
        left = [account.get("left") for account in accounts]
        rates = [(account.get("rate") or "").split("/")[0] for account in accounts]
        bursts = [int(rate) for rate in rates if rate.isdecimal() and int(rate) > 0]
        queries = sum(account["queries"] for account in accounts)
        return Usage(queries, None if None in left else sum(left), min(bursts, default=None))

    def _send(self, images: Tensor, account: str) -> bytes:
        known = [*self.ledger.accounts]
        number = known.index(account) if account in known else len(known)
        if number >= len(self._keys):
            raise UserError(f"{number + 1} accounts ask with {len(self._keys)} keys: add a line to --api-key-file")
        file = io.BytesIO()
        np.save(file, images.contiguous().numpy(), allow_pickle=False)
        body = file.getvalue()
        # Named by what it has, too: images that have changed since the stop are another request.
        digest = hashlib.blake2b(b"%d " % number + body, digest_size=8).hexdigest()
        headers = self._headers(number) | {
            **{"Accept": "application/x-npy", "Content-Type": "application/x-npy"},
            "Idempotency-Key": f"{self._name}-{self.ledger.calls}-{digest}",
        }
        try:
            content = self._http.request("/v1/representations", headers, body, 4 * len(images) * self.dim + 4096)
            if self._http.lost:
                self._http.lost = False
                self._check_same()
        except UserError as error:
            raise UserError(f"{error}{self._kept()}") from None
        return content

    def _check_same(self) -> None:
        """UserError where the API that came back after it was gone has another victim."""
        version = self._get("/v1/model", _CARD, patient=True)["version"]
        if version != self.version:
            raise UserError(f"{self.address} came back with another victim or defence: start the one that was there")

    def _read(self, content: bytes, rows: int) -> np.ndarray:
        file = io.BytesIO(content)
        try:
            np.lib.format.read_magic(file)
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=4096)
            numbers = np.frombuffer(content, dtype, offset=file.tell()) if dtype.kind == "f" else np.empty(0)
        except ValueError:
            raise UserError(f"{self.address} answers with no array of NumPy: is it such an API?") from None
        if shape != (rows, self.dim) or numbers.size != rows * self.dim:
            raise UserError(f"{self.address} answers {shape} of {dtype}, not ({rows}, {self.dim}) of float32")
        return numbers.reshape(shape, order="F" if by_column else "C")
