"""What every defence is made of: the call it sees, its settings, which become flags, and its random draws."""

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from settings import Command, Settings, setting

__all__ = ["Call", "Defence", "setting"]


@dataclass(frozen=True)
class Call:
    """A call of an account as the owner sees it.

    digests: of its B images. representations: the encoder's true h (B, D). project: returns the projections z of them.
    first: how many queries the account had before this call.
    """

    digests: Sequence[bytes]
    representations: Tensor
    project: Callable[[Tensor], Tensor]
    account: str = "default"
    first: int = 0

    @functools.cached_property
    def projections(self) -> Tensor:
        """z (B, P)."""
        return self.project(self.representations)


@dataclass
class Defence(Settings, ABC):
    """Changes answers before an account sees them. A subclass is a dataclass whose `setting` fields become flags.

    `secret` is the owner's: it seeds every draw, so that nobody else can repeat them. A defence whose answers depend on
    earlier queries has `remembers` set and keeps what it remembers by account. A defence that compares projections has
    `needs_head` set.
    """

    secret: int = field(default=0, repr=False)
    remembers = False
    needs_head = False
    title = "defence"

    @abstractmethod
    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        """Answers (B, E) to give instead of answers (B, D)."""

    def width(self, dim: int) -> int:
        """The width E that it makes of answers of `dim` numbers. UserError when it cannot work on these."""
        return dim

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures about the queries it saw. `sources`: for each account, the image index (N,) of each query."""
        return {}

    @classmethod
    def absent(cls, command: Command) -> str:
        """Why the settings have no effect where the defence is not in force."""
        return f"with --defence {command.defence}" if command.defence else "without --defence"

    def normal(self, call: Call, width: int, by_image: bool = False) -> Tensor:
        """Standard normal draws (B, width): a row for each query of the account, or the same row for the same image."""
        if by_image:
            keys: Iterable[str] = (digest.hex() for digest in call.digests)
        else:
            keys = (f"{call.account}/{call.first + row}" for row in range(len(call.digests)))
        rows = [_normal_row(f"{self.secret}/{type(self).__name__}/{key}", width) for key in keys]
        return torch.from_numpy(np.stack(rows)).to(call.representations.device)


def _normal_row(key: str, width: int) -> np.ndarray:
    """Standard normal draws (width,), float32, that follow from the key."""
    # Philox takes 128 bits of a key; torch's generator takes 32, of which an attacker could try all.
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    draws = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return draws.standard_normal(width, np.float32)
