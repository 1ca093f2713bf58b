"""What every defence is made of: the query it sees, its settings that become flags, and its random draws."""

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from utils import UserError


@dataclass(frozen=True)
class Query:
    """One call of an account as the owner sees it.

    A digest of each of its images; the encoder's true representations h (B, D), and `project`, which gives its
    projections z of them; `first`, the number of the account's queries before this call.
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


def setting(default: object, text: str, choices: Sequence[str] | None = None) -> Field:
    """A field of a defence that scripts offer as a flag of its name, with this help."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Defence(ABC):
    """Changes answers before an account sees them. A subclass is a dataclass whose `setting` fields become flags.

    `secret` is the owner's: it seeds every draw, so that nobody else can repeat them. A defence whose answers depend on
    earlier queries says so by `remembers`; what it keeps, it keeps by account. One that looks at projections says
    `needs_head`.
    """

    secret: int = field(default=0, repr=False)
    remembers = False
    needs_head = False

    @abstractmethod
    def __call__(self, answers: Tensor, query: Query) -> Tensor:
        """Answers (B, E) to give instead of answers (B, D)."""

    def width(self, dim: int) -> int:
        """The width E that it makes of answers of `dim` numbers. UserError when it cannot work on these."""
        return dim

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures of what it met. `sources`: for each account, the image (N,) that each of its queries was of."""
        return {}

    def require(self, holds: bool, name: str, wanted: str) -> None:
        """UserError for a setting that is not as wanted."""
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is not {wanted}: give another number")

    def normal(self, query: Query, width: int, by_image: bool = False) -> Tensor:
        """Standard normal draws (B, width): a row for each query of the account, or the same row for the same image."""
        if by_image:
            keys: Iterable[str] = (digest.hex() for digest in query.digests)
        else:
            keys = (f"{query.account}/{query.first + row}" for row in range(len(query.digests)))
        rows = [_normal_row(f"{self.secret}/{type(self).__name__}/{key}", width) for key in keys]
        return torch.from_numpy(np.stack(rows)).to(query.representations.device)


def _normal_row(key: str, width: int) -> np.ndarray:
    """Standard normal draws (width,), float32, that follow from the key."""
    # Philox takes 128 bits of a key; torch's generator takes 32, of which an attacker could try all.
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    draws = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return draws.standard_normal(width, np.float32)


def settings_of(defence: type[Defence]) -> dict[str, Field]:
    """The fields of a defence that are flags."""
    return {one.name: one for one in fields(defence) if "help" in one.metadata and one.default is not MISSING}
