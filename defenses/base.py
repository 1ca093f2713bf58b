"""The base of every defence: the call it sees, its settings (which become flags) and its random draws."""

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

    digests: those of its B images. representations: the encoder's true h (B, D). project: maps h to projections z.
    first: number of queries that the account made before this call. hashes: the images' `perceptual_hashes` by
    the first defence's secret, which near-copies of an image mostly share.
    """

    digests: Sequence[bytes]
    representations: Tensor
    project: Callable[[Tensor], Tensor]
    account: str = "default"
    first: int = 0
    hashes: Sequence[bytes] = ()

    @functools.cached_property
    def projections(self) -> Tensor:
        """z (B, P)."""
        return self.project(self.representations)


@dataclass
class Defence(Settings, ABC):
    """Changes answers before an account sees them. A subclass is a dataclass whose `setting` fields become flags.

    Only the owner knows `secret`, which seeds every draw, so that nobody else can repeat them. `remembers` is set where
    answers depend on earlier queries; such state is kept per account. `needs_head` is set where projections are
    compared.
    """

    secret: int = field(default=0, repr=False)
    remembers = False
    needs_head = False
    title = "defence"

    @abstractmethod
    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        """Returns the answers (B, E) to give instead of `answers` (B, D)."""

    def width(self, dim: int) -> int:
        """Width E of the answers that it returns for answers of width `dim`. UserError for a width it cannot handle."""
        return dim

    @property
    def owner_images(self) -> int:
        """How many of the owner's own images `prepare` wants; 0 for a defence that learns from none."""
        return 0

    def prepare(self, representations: Tensor) -> None:
        """Learn from representations (M, D) of the owner's own images, before the first query."""
        return

    def outlook(self, queries: int) -> str:
        """What it can do to an account with so many queries, in words; empty where that is not a matter of scale."""
        return ""

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures about the queries it saw. `sources`: for each account, the image index (N,) of each query."""
        return {}

    @classmethod
    def absent(cls, command: Command) -> str:
        """Why the settings have no effect where the defence is not in force."""
        if "defence" not in command.parser.settings:  # of a script that looks for the defence's traces
            return f"without --method {cls.__name__.lower()}"
        return f"with --defence {command.defence}" if command.defence else "without --defence"

    def normal(self, call: Call, width: int, by_image: bool = False) -> Tensor:
        """Standard normal draws (B, width): new for each query of an account, or with `by_image` fixed by its hash."""
        if by_image:
            keys: Iterable[str] = (key.hex() for key in call.hashes)
        else:
            keys = (f"{call.account}/{call.first + row}" for row in range(len(call.digests)))
        rows = [_normal_row(f"{self.secret}/{type(self).__name__}/{key}", width) for key in keys]
        return torch.from_numpy(np.stack(rows)).to(call.representations.device)


def _normal_row(key: str, width: int) -> np.ndarray:
    """Standard normal draws (width,), float32, determined by the key."""
    # Philox takes a 128-bit key; torch's generator takes 32 bits, few enough for an attacker to try them all.
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    draws = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return draws.standard_normal(width, np.float32)
