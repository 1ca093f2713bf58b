"""Calls of accounts: admitted by their terms, answered as in process, and written down before the answer leaves.

A request is a call of the victim. All calls have one order, that of their transactions. A defence that remembers goes
on from what the file says: the true representations of all earlier calls, which are shown to it again after a restart,
and when another process answered meanwhile. So answers are those of a single process that was never stopped.
"""

import copy
import hashlib
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_aug.digests import HASH_BYTES, unpack_digests
from defenses import Call
from service.accounts import Customer
from service.refusal import Refusal
from service.store import Store
from victim import Victim


@dataclass(frozen=True)
class Answered:
    """Answers, float32 (B, dim), as an npy file; the account after them; whether an earlier request got them too."""

    answers: bytes
    customer: Customer
    replayed: bool


class Desk:
    """A victim that answers accounts by their terms. Several threads may ask; other processes may share the file."""

    def __init__(self, victim: Victim, store: Store, clock: Callable[[], float] = time.time):
        self.victim, self.store, self.clock = victim, store, clock
        self._unused = copy.deepcopy(victim.defences)  # as they are before the first call
        self._shown: dict[str, tuple[int, int]] = {}  # by account: its id, and how many calls the defences have seen
        # A thread each: a library that computes keeps a pool of threads, or memory of a GPU, for each that calls it.
        self._encoder, self._order = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def customer(self, key: str) -> Customer:
        """The account of a key. Refusal where there is none, or it is over."""
        customer = self.store.customer(key)
        if customer is None:
            raise Refusal(401, "bad_key", "no account has this key", "send Authorization: Bearer KEY with a valid key")
        customer.check_day(self.clock())
        return customer

    def answer(self, customer: Customer, images: Tensor, key: str | None = None) -> Answered:
        """Answers to images (B, 3, H, W), uint8 or float in [0, 1]: all of them, or a Refusal and no trace of the call.

        A request that has the key and the images of an earlier request gets the answers of that, and costs nothing.
        """
        sent = _digest_of(images)
        earlier = self._replayed(customer, key, sent)
        if earlier:
            return earlier
        customer.admit(len(images), self.clock())  # before the encoder works for nothing; again in the transaction
        call = self._encoder.submit(self.victim.look_at, images, customer.name).result()
        return self._order.submit(self._enter, customer, call, key, sent).result()

    def _enter(self, customer: Customer, call: Call, key: str | None, sent: bytes) -> Answered:
        """Answer a call and write it down, or neither."""
        try:
            # Outside the transaction, where other processes need not wait for it.
            self._catch_up(self.store.current(customer) or customer, call)
            with self.store.transaction():
                return self._replayed(customer, key, sent) or self._write(customer, call, key, sent)
        except Refusal:
            raise
        except BaseException:
            self._forget()  # defences may have seen a call that the file does not have
            raise

    def _write(self, customer: Customer, call: Call, key: str | None, sent: bytes) -> Answered:
        """Inside a transaction: answer a call, and write down all that follows from it."""
        now, current = self.clock(), self.store.current(customer)
        if current is None:
            raise Refusal(401, "bad_key", f"the account {customer.name} was removed", "ask the owner of the service")
        tokens = current.admit(len(call.digests), now)
        self._catch_up(current, call)
        answers = self.victim.respond(replace(call, first=current.queries)).cpu().numpy()
        file = io.BytesIO()
        np.save(file, answers, allow_pickle=False)
        if self.victim.stateful:
            h = call.representations.cpu().numpy().tobytes()
            self.store.add_seen(current, b"".join(call.digests), b"".join(call.hashes), h)
            self._shown[current.name] = (current.id, current.calls + 1)
        self.store.charge(current, call.digests, tokens, now)
        if key:
            self.store.keep(current, key, sent, file.getvalue())
        return Answered(file.getvalue(), self.store.current(current), False)

    def _replayed(self, customer: Customer, key: str | None, sent: bytes) -> Answered | None:
        """The answers to an earlier request with this key; None where there was none."""
        kept = self.store.kept(customer, key) if key else None
        if kept is None:
            return None
        if kept[0] != sent:
            message = "an earlier request with this Idempotency-Key had other images"
            raise Refusal(409, "idempotency_mismatch", message, "send a new key with new images")
        return Answered(kept[1], self.store.current(customer) or customer, True)

    # ---- defences that remember ----

    def _catch_up(self, customer: Customer, call: Call) -> None:
        """Show the defences those of the account's calls that they have not seen."""
        if not self.victim.stateful:
            return
        known, shown = self._shown.get(customer.name, (customer.id, 0))
        if known != customer.id or shown > customer.calls:  # the account was removed and made again
            self._forget()
            shown = 0
        width, device = call.representations.shape[1], call.representations.device
        for row in self.store.seen(customer, shown):
            h = torch.from_numpy(np.frombuffer(row["representations"], np.float32).copy()).view(-1, width)
            digests, hashes = (
                unpack_digests(torch.from_numpy(np.frombuffer(row[name], np.uint8).copy()), size)
                for name, size in (("digests", 16), ("hashes", HASH_BYTES))
            )
            earlier = replace(call, digests=digests, hashes=hashes, representations=h.to(device), first=row["first"])
            self.victim.respond(earlier)
            self._shown[customer.name] = (customer.id, row["call"] + 1)

    def _forget(self) -> None:
        """Put the defences back to where they were before the first call: the next call shows them all others again."""
        self.victim.defences = copy.deepcopy(self._unused)
        self._shown.clear()


def _digest_of(images: Tensor) -> bytes:
    """A digest of a request's images, for the requests that repeat it."""
    digest = hashlib.blake2b(f"{images.dtype} {tuple(images.shape)}".encode(), digest_size=16)
    digest.update(images.contiguous().numpy())
    return digest.digest()
