"""Accounts, the ledger and what stateful defences saw, in an SQLite file that all processes of a service share.

A call is written in a single transaction before its answer leaves. The file is in WAL mode, so reading never waits for
writing; with synchronous=FULL each transaction is on the disk when it ends, so even a power cut takes no paid answer
out of the ledger.

Of a key only its SHA-256 is kept. A key has 256 random bits, so nobody can try all of them; a slow hash, as passwords
need, would only slow down every request.
"""

import contextlib
import hashlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from service.accounts import Customer, check_account_name
from utils import UserError

VERSION = 1  # of the tables
WAIT = 20.0  # seconds for another process's transaction
KEPT, KEPT_BYTES = 64, 64 * 2**20  # answers that are kept for an account's repeated requests, and their bytes
TABLES = """
CREATE TABLE IF NOT EXISTS service (secret BLOB NOT NULL, version TEXT);
CREATE TABLE IF NOT EXISTS accounts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, key BLOB NOT NULL UNIQUE,
    budget INTEGER, rate TEXT, expires TEXT,
    queries INTEGER NOT NULL DEFAULT 0, distinct_images INTEGER NOT NULL DEFAULT 0, calls INTEGER NOT NULL DEFAULT 0,
    tokens REAL, filled REAL
);
CREATE TABLE IF NOT EXISTS images (
    account INTEGER REFERENCES accounts ON DELETE CASCADE, digest BLOB, PRIMARY KEY (account, digest)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (
    account INTEGER REFERENCES accounts ON DELETE CASCADE, call INTEGER, first INTEGER, digests BLOB, hashes BLOB,
    representations BLOB, PRIMARY KEY (account, call)
);
CREATE TABLE IF NOT EXISTS kept (
    id INTEGER PRIMARY KEY, account INTEGER REFERENCES accounts ON DELETE CASCADE, key TEXT, images BLOB, answers BLOB,
    UNIQUE (account, key)
);
"""


class Store:
    """The file. Each thread has a connection of its own. UserError for a file that is something else."""

    def __init__(self, path: Path):
        self.path, self._local = path, threading.local()
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # only the owner reads it: it has the secret of the defences
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        try:
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, VERSION) or (not found and self._db.execute("SELECT 1 FROM sqlite_master").fetchone()):
                raise UserError(f"{path} is the database of another program, or another version: give --database PATH")
            with self.transaction() as db:
                for statement in TABLES.split(";"):
                    db.execute(statement)
                if not db.execute("SELECT 1 FROM service").fetchone():
                    db.execute("INSERT INTO service VALUES (?, NULL)", (secrets.token_bytes(32),))
                db.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} cannot be used as a database ({error}): give --database PATH") from None
        self.secret: bytes = self._db.execute("SELECT secret FROM service").fetchone()[0]

    @property
    def _db(self) -> sqlite3.Connection:
        """This thread's connection."""
        if not hasattr(self._local, "db"):
            db = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
            db.row_factory = sqlite3.Row
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                db.execute(f"PRAGMA {pragma}")
            self._local.db = db
        return self._local.db

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Inside it no other thread or process writes; what is written is kept whole, or not at all on an exception."""
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def derive(self, purpose: str, content: str = "") -> bytes:
        """16 bytes that follow from the file's secret, a purpose and a content, and that nobody else can compute."""
        key = hashlib.blake2b(purpose.encode(), key=self.secret, digest_size=32).digest()
        return hashlib.blake2b(content.encode(), key=key, digest_size=16).digest()

    def settle(self, settings: str) -> str:
        """The version of a service with these settings, 16 hexadecimal digits.

        UserError where the file has calls of a service with other settings: its defences cannot go on from them.
        """
        version = self.derive("version", settings).hex()[:16]
        with self.transaction() as db:
            used = db.execute("SELECT 1 FROM accounts WHERE calls > 0").fetchone()
            if used and db.execute("SELECT version FROM service").fetchone()[0] != version:
                raise UserError(
                    f"{self.path} has calls that another victim, other defences, preprocessing or precision answered: "
                    "start the service as before, or give --database PATH for a new service"
                )
            db.execute("UPDATE service SET version = ?", (version,))
        return version

    # ---- accounts ----

    def add(self, name: str, terms: Mapping[str, Any]) -> str:
        """A new account; returns its key, which is nowhere else. UserError for a name that is taken or no name."""
        key = _new_key()
        columns = {"name": check_account_name(name), "key": digest_of(key), **terms}
        with self.transaction() as db:
            if db.execute("SELECT 1 FROM accounts WHERE name = ?", (name,)).fetchone():
                raise UserError(f"there is an account {name}: choose another name, or renew or remove it")
            marks = ", ".join("?" * len(columns))
            db.execute(f"INSERT INTO accounts ({', '.join(columns)}) VALUES ({marks})", tuple(columns.values()))
        return key

    def renew(self, name: str, terms: Mapping[str, Any], keep_key: bool = False) -> str | None:
        """Give an account other terms, and another key unless it keeps its own; its usage stays. Returns the key."""
        key = None if keep_key else _new_key()
        columns = {**terms, **({"key": digest_of(key)} if key else {})}
        columns |= {"tokens": None, "filled": None} if "rate" in terms else {}
        with self.transaction() as db:
            self._known(db, name)
            for column, value in columns.items():
                db.execute(f"UPDATE accounts SET {column} = ? WHERE name = ?", (value, name))
        return key

    def remove(self, name: str) -> None:
        """Remove an account, its usage, and all that the service knows of its calls."""
        with self.transaction() as db:
            self._known(db, name)
            db.execute("DELETE FROM accounts WHERE name = ?", (name,))

    def _known(self, db: sqlite3.Connection, name: str) -> None:
        if not db.execute("SELECT 1 FROM accounts WHERE name = ?", (name,)).fetchone():
            names = ", ".join(customer.name for customer in self.customers()) or "none"
            raise UserError(f"no account {name}; there: {names}")

    def customers(self) -> list[Customer]:
        """All accounts, by name."""
        return [Customer.of(row) for row in self._db.execute("SELECT * FROM accounts ORDER BY name")]

    def customer(self, key: str) -> Customer | None:
        """The account of a key."""
        row = self._db.execute("SELECT * FROM accounts WHERE key = ?", (digest_of(key),)).fetchone()
        return Customer.of(row) if row else None

    def current(self, customer: Customer) -> Customer | None:
        """The account as it is now; None where it was removed."""
        row = self._db.execute("SELECT * FROM accounts WHERE id = ?", (customer.id,)).fetchone()
        return Customer.of(row) if row else None

    # ---- calls: inside a transaction ----

    def charge(self, customer: Customer, digests: Sequence[bytes], tokens: float | None, now: float) -> None:
        """Enter a call in the ledger: the digests of its images, and the tokens that the account has left now."""
        db, before = self._db, self._db.total_changes
        db.executemany("INSERT OR IGNORE INTO images VALUES (?, ?)", [(customer.id, digest) for digest in digests])
        new = db.total_changes - before
        db.execute(
            "UPDATE accounts SET queries = queries + ?, distinct_images = distinct_images + ?, calls = calls + 1, "
            "tokens = ?, filled = ? WHERE id = ?",
            (len(digests), new, tokens, now, customer.id),
        )

    def add_seen(self, customer: Customer, digests: bytes, hashes: bytes, representations: bytes) -> None:
        """Keep what stateful defences saw of the account's next call."""
        row = (customer.id, customer.calls, customer.queries, digests, hashes, representations)
        self._db.execute("INSERT INTO seen VALUES (?, ?, ?, ?, ?, ?)", row)

    def seen(self, customer: Customer, after: int) -> Iterator[sqlite3.Row]:
        """What stateful defences saw of the account's calls from number `after` on, in order."""
        return iter(
            self._db.execute("SELECT * FROM seen WHERE account = ? AND call >= ? ORDER BY call", (customer.id, after))
        )

    def kept(self, customer: Customer, key: str) -> tuple[bytes, bytes] | None:
        """The digest of the images, and the answers, of an earlier request with this key."""
        query = "SELECT images, answers FROM kept WHERE account = ? AND key = ?"
        row = self._db.execute(query, (customer.id, key)).fetchone()
        return (row["images"], row["answers"]) if row else None

    def keep(self, customer: Customer, key: str, images: bytes, answers: bytes) -> None:
        """Keep the answers to a request with a key, and the last of the account's others as far as there is room."""
        row = (customer.id, key, images, answers)
        self._db.execute("INSERT INTO kept (account, key, images, answers) VALUES (?, ?, ?, ?)", row)
        self._db.execute(
            "DELETE FROM kept WHERE id IN (SELECT id FROM (SELECT id, ROW_NUMBER() OVER newest AS place, "
            "SUM(LENGTH(answers)) OVER newest AS total FROM kept WHERE account = ? WINDOW newest AS "
            "(ORDER BY id DESC)) WHERE place > ? OR (place > 1 AND total > ?))",
            (customer.id, KEPT, KEPT_BYTES),
        )


def _new_key() -> str:
    return f"sk-{secrets.token_urlsafe(32)}"


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).digest()
