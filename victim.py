"""The black box: an encoder that answers queries, keeps an exact record of them and cannot be trained.

victim = Victim(load_encoder("checkpoint.pth.tar"), budget=9000, defences=[Noise(sigma=0.2)])
answers = victim.query(images, account="alice")
victim.ledger.queries, victim.ledger.distinct, victim.ledger.calls
"""

import copy
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_aug.datasets import to_float
from defenses import Call, Defence
from models import SimCLREncoder
from utils import Precision, UserError

Gather = Callable[[Tensor], Tensor]


class BudgetExceeded(UserError):
    """The queries asked for would exceed the budget; none of them was answered."""


# ---- digests ---------------------------------------------------------------------------------------------------------


def image_digests(images: Tensor) -> list[bytes]:
    """A 16-byte digest for each image (N, 3, H, W): equal for equal pixels, whether uint8 or float in [0, 1]."""
    rows = to_float(images).cpu().contiguous().numpy()
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]


def digest_tensor(images: Tensor) -> Tensor:
    """`image_digests` as uint8 (N, 16), as checkpoints keep them: so an evaluation knows which images were queried."""
    return pack_digests(image_digests(images))


def pack_digests(digests: Iterable[bytes]) -> Tensor:
    """Digests as uint8 (N, 16)."""
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).copy()).view(-1, 16)


def unpack_digests(digests: Tensor) -> list[bytes]:
    """Digests uint8 (N, 16), or as many flattened, as `image_digests` returns them."""
    return [bytes(row) for row in digests.view(-1, 16).numpy()]


def check_query(images: Tensor) -> None:
    """ValueError for what is not a query: images (B, 3, H, W), uint8 or float in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        kind = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"a query is of images (B, 3, H, W), uint8 or float in [0, 1], not {kind}")
    # Written so that a number that is not a number fails too.
    if images.is_floating_point() and images.numel() and not (images.amin() >= 0 and images.amax() <= 1):
        low, high = images.amin().item(), images.amax().item()
        raise ValueError(f"float images are in [0, 1], these are from {low:g} to {high:g}: divide by 255")


def version_of(network: nn.Module) -> str:
    """A name for a network's weights: 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for key, value in network.state_dict().items():
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- the record ------------------------------------------------------------------------------------------------------


@dataclass
class Account:
    """What an account asked: queries, calls, and the digests of its distinct images."""

    queries: int = 0
    calls: int = 0
    images: set[bytes] = field(default_factory=set)

    @property
    def distinct(self) -> int:
        return len(self.images)


class Ledger:
    """The victim's record of what was asked, by account and in all.

    A query is an image sent once: the same image sent again is another query, and so is another view of it.
    """

    def __init__(self):
        self.accounts: dict[str, Account] = {}

    @property
    def queries(self) -> int:
        """Images answered."""
        return sum(account.queries for account in self.accounts.values())

    @property
    def distinct(self) -> int:
        """Different images answered, whichever accounts asked."""
        return len(self.images)

    @property
    def images(self) -> set[bytes]:
        """The digests of all images answered."""
        return set().union(*(account.images for account in self.accounts.values()))

    @property
    def calls(self) -> int:
        """Calls of `Victim.query`."""
        return sum(account.calls for account in self.accounts.values())

    def record(self, digests: Sequence[bytes], account: str = "default") -> None:
        """Enter a call: the digests of the images that were answered."""
        entry = self.accounts.setdefault(account, Account())
        entry.queries += len(digests)
        entry.calls += 1
        entry.images.update(digests)

    def summary(self) -> dict[str, int]:
        return {"queries": self.queries, "distinct": self.distinct, "calls": self.calls}

    def state_dict(self) -> dict:
        """Plain types and tensors, for a checkpoint."""
        return {
            name: {
                "queries": account.queries,
                "calls": account.calls,
                "images": pack_digests(sorted(account.images)).flatten(),
            }
            for name, account in self.accounts.items()
            if account.images
        }

    def load_state_dict(self, state: Mapping) -> None:
        self.accounts = {
            name: Account(entry["queries"], entry["calls"], set(unpack_digests(entry["images"])))
            for name, entry in state.items()
        }


# ---- the black box ---------------------------------------------------------------------------------------------------


class AnyVictim(Protocol):
    """What an attacker's `Client` needs of a victim, wherever it runs.

    dim: width of an answer. version: a name for the weights that answer. budget: the most queries that are answered, or
    None. ledger: usage so far. stateful: whether a replay has to show the images again.
    """

    dim: int
    version: str
    budget: int | None
    ledger: Ledger
    stateful: bool

    def query(self, images: Tensor, account: str = "default", gather: Gather | None = None) -> Tensor: ...

    def replay(self, digests: Tensor, account: str = "default", images: Tensor | None = None) -> None: ...

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]: ...


class Api(nn.Module):
    """What an API returns of an encoder: images (B, 3, H, W) -> answers (B, dim).

    `output` is `representations` h, `projections` z, `both` of them side by side, or, of the linear `classifier` on h,
    the `probabilities` or the `labels` (one-hot rows).
    """

    def __init__(self, encoder: SimCLREncoder, output: str = "representations", classifier: nn.Linear | None = None):
        super().__init__()
        self.encoder, self.output, self.classifier = encoder, output, classifier

    @property
    def dim(self) -> int:
        if self.classifier is not None:
            return self.classifier.out_features
        widths = {"representations": self.encoder.dim, "projections": self.encoder.out_dim}
        return widths.get(self.output) or sum(widths.values())

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(self.encoder(images))

    def answer(self, h: Tensor) -> Tensor:
        """Answers (B, dim) made of representations (B, D)."""
        if self.classifier is not None:
            logits = self.classifier(h).float()
            return logits.softmax(dim=1) if self.output == "probabilities" else F.one_hot(logits.argmax(1), self.dim)
        if self.output == "representations":
            return h
        z = self.encoder.backbone.fc(h)
        return z if self.output == "projections" else torch.cat([h, z], dim=1)


class Victim:
    """An encoder, or an `Api` of an encoder, behind an API: whoever has this object sees answers only.

    The encoder is copied, set to eval mode and detached from autograd, so that nothing that happens here or to the
    original changes it. `budget` is the most queries that are answered over the object's life; None sets no limit.
    `defences` change the answers in their order. UserError when a defence cannot work on such answers.
    """

    def __init__(
        self,
        encoder: SimCLREncoder | Api,
        budget: int | None = None,
        defences: Sequence[Defence] = (),
        precision: Precision | None = None,
    ):
        api = encoder if isinstance(encoder, Api) else Api(encoder)
        self._api = copy.deepcopy(api).eval().requires_grad_(False)
        self._precision = precision or Precision("fp32", next(encoder.parameters()).device)
        self._api.to(self._precision.device, memory_format=self._precision.memory_format)
        self.budget = budget
        self.defences = list(defences)
        self.ledger = Ledger()
        self.dim = api.dim
        for defence in self.defences:
            self.dim = defence.width(self.dim)
            if defence.needs_head and not api.encoder.has_head:
                name = type(defence).__name__.lower()
                raise UserError(f"{name} compares projections and this victim has no head: choose another --defence")

    @functools.cached_property
    def version(self) -> str:
        """A name for the weights that answer: see `version_of`."""
        return version_of(self._api)

    @property
    def stateful(self) -> bool:
        """Whether answers depend on earlier queries."""
        return any(defence.remembers for defence in self.defences)

    def query(self, images: Tensor, account: str = "default", gather: Gather | None = None) -> Tensor:
        """Answers (B, dim), float32 on the victim's device, to images (B, 3, H, W), uint8 or float in [0, 1].

        BudgetExceeded when the budget does not cover all of them, ValueError for other tensors or numbers; then none is
        answered or recorded. In a job of
        several processes each of them asks about its share of a call's images, and `gather` brings the rows of all
        shares together: every process gets all answers, and the ledgers agree.
        """
        check_query(images)
        gather = gather or (lambda rows: rows)
        digests = unpack_digests(gather(digest_tensor(images)))
        asked = self.ledger.queries
        if self.budget is not None and asked + len(digests) > self.budget:
            raise BudgetExceeded(
                f"a query of {len(digests)} images would exceed the budget of {self.budget}: {asked} are spent"
            )
        answers = self._answer(images, digests, account, gather)
        self.ledger.record(digests, account)
        return answers

    def replay(self, digests: Tensor, account: str = "default", images: Tensor | None = None) -> None:
        """Replay queries answered before a restart, so that ledger and stateful defences are as they were.

        digests uint8 (B, 16); a stateful victim needs all the images (B, 3, H, W) again.
        """
        asked = unpack_digests(digests)
        if self.stateful:
            self._answer(images, asked, account, lambda rows: rows)
        self.ledger.record(asked, account)

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """The defences' reports, prefixed by their names. sources: for each account, the image index of each query."""
        reports = {type(defence).__name__.lower(): defence.report(sources) for defence in self.defences}
        return {f"{name}_{key}": value for name, report in reports.items() for key, value in report.items()}

    @torch.no_grad()
    def _answer(self, images: Tensor, digests: Sequence[bytes], account: str, gather: Gather) -> Tensor:
        images = to_float(images.to(self._precision.device, non_blocking=True))
        with self._precision.autocast():
            h = gather(self._api.encoder(images.contiguous(memory_format=self._precision.memory_format)))
            answers = self._api.answer(h).float()
        if not self.defences:
            return answers
        if not len(h):
            return answers.new_empty(0, self.dim)
        first = self.ledger.accounts.get(account, Account()).queries
        call = Call(digests, h.float(), self._project, account, first)
        for defence in self.defences:
            answers = defence(answers, call)
        return answers.clone()  # a view would carry the numbers that a defence left out

    def _project(self, h: Tensor) -> Tensor:
        with self._precision.autocast():
            return self._api.encoder.backbone.fc(h)
