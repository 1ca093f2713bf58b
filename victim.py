"""The black box: an encoder that answers queries, keeps an exact record of them and cannot be trained.

victim = Victim(load_encoder("checkpoint.pth.tar"), budget=9000, defences=[Noise(sigma=0.2)])
answers = victim.query(images, account="alice")
victim.ledger.queries, victim.ledger.distinct, victim.ledger.calls
"""

import copy
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_aug.datasets import to_float
from data_aug.digests import HASH_BYTES, digest_tensor, image_digests, pack_digests, perceptual_hashes, unpack_digests
from defenses import Call, Defence
from models import SimCLREncoder, as_encoder
from utils import Precision, UserError

__all__ = ["Api", "Ledger", "Victim", "digest_tensor", "image_digests", "pack_digests", "unpack_digests", "version_of"]

Gather = Callable[[Tensor], Tensor]


class BudgetExceeded(UserError):
    """The queries asked for would exceed the budget; none of them was answered."""


# ---- queries ---------------------------------------------------------------------------------------------------------


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
    """What an account asked: queries, calls, the digests of its distinct images, and the perceptual hashes of these.

    The hashes are None where an earlier version kept none.
    """

    queries: int = 0
    calls: int = 0
    images: set[bytes] = field(default_factory=set)
    near: set[bytes] | None = field(default_factory=set)

    @property
    def distinct(self) -> int:
        return len(self.images)


class Ledger:
    """The victim's record of what was asked, by account and in all.

    A query is an image sent once: the same image sent again is another query, and so is another view of it. Images are
    distinct where any pixel differs; `near_distinct` counts the near-copies of an image once, most of the time.
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
    def near_distinct(self) -> int | None:
        """Different perceptual hashes of the images answered; None where an earlier version kept none.

        Of an earlier process's queries, those whose images were not shown again are left out.
        """
        known = [account.near for account in self.accounts.values()]
        return None if None in known else len(set().union(*known))

    @property
    def images(self) -> set[bytes]:
        """The digests of all images answered."""
        return set().union(*(account.images for account in self.accounts.values()))

    @property
    def calls(self) -> int:
        """Calls of `Victim.query`."""
        return sum(account.calls for account in self.accounts.values())

    def record(self, digests: Sequence[bytes], account: str = "default", hashes: Sequence[bytes] = ()) -> None:
        """Enter a call: the digests of the images that were answered, and their perceptual hashes."""
        entry = self.accounts.setdefault(account, Account())
        entry.queries += len(digests)
        entry.calls += 1
        entry.images.update(digests)
        self.note(hashes, account)

    def note(self, hashes: Sequence[bytes], account: str = "default") -> None:
        """Enter the perceptual hashes of images that an account asked about, once these are known."""
        entry = self.accounts.get(account)
        if entry and entry.near is not None:
            entry.near.update(hashes)

    def summary(self) -> dict[str, int | None]:
        counts = {"queries": self.queries, "distinct": self.distinct, "near_distinct": self.near_distinct}
        return {**counts, "calls": self.calls}

    def state_dict(self) -> dict:
        """Plain types and tensors, for a checkpoint."""
        return {
            name: {
                "queries": account.queries,
                "calls": account.calls,
                "images": pack_digests(sorted(account.images)).flatten(),
                **({} if account.near is None else {"near": pack_digests(sorted(account.near), HASH_BYTES).flatten()}),
            }
            for name, account in self.accounts.items()
            if account.images
        }

    def load_state_dict(self, state: Mapping) -> None:
        self.accounts = {
            name: Account(
                entry["queries"],
                entry["calls"],
                set(unpack_digests(entry["images"])),
                set(unpack_digests(entry["near"], HASH_BYTES)) if "near" in entry else None,
            )
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
    """An encoder, an `Api` of one, or any module with rows of `dim` numbers, behind an API that gives answers only.

    The encoder is copied, set to eval mode and detached from autograd, so that nothing that happens here or to the
    original changes it. `budget` is the most queries that are answered over the object's life; None sets no limit.
    `defences` change the answers in their order. UserError when a defence cannot work on such answers.
    """

    def __init__(
        self,
        encoder: SimCLREncoder | Api | nn.Module,
        budget: int | None = None,
        defences: Sequence[Defence] = (),
        precision: Precision | None = None,
        dim: int | None = None,
    ):
        api = encoder if isinstance(encoder, Api) else Api(as_encoder(encoder, dim))
        self._api = copy.deepcopy(api).eval().requires_grad_(False)
        self._precision = precision or Precision("fp32", next(encoder.parameters(), torch.empty(0)).device)
        self._api.to(self._precision.device, memory_format=self._precision.memory_format)
        self.budget = budget
        self.defences = list(defences)
        self._secret = self.defences[0].secret if self.defences else 0
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
        answered or recorded. In a job of several processes each of them asks about its share of a call's images, and
        `gather` brings the rows of all shares together: every process gets all answers, and the ledgers agree.
        """
        check_query(images)
        gather = gather or (lambda rows: rows)
        marks = [digest_tensor(images), perceptual_hashes(images), perceptual_hashes(images, self._secret)]
        parts = gather(torch.cat(marks, dim=1)).split([16, HASH_BYTES, HASH_BYTES], dim=1)
        digests, hashes, keys = (unpack_digests(part, part.shape[1]) for part in parts)
        asked = self.ledger.queries
        if self.budget is not None and asked + len(digests) > self.budget:
            raise BudgetExceeded(
                f"a query of {len(digests)} images would exceed the budget of {self.budget}: {asked} are spent"
            )
        answers = self._answer(images, digests, keys, account, gather)
        self.ledger.record(digests, account, hashes)
        return answers

    def prepare(self, images: Tensor) -> None:
        """Let the defences learn from the owner's own images (M, 3, H, W); see their `owner_images`."""
        h = torch.cat([self._represent(part).float() for part in images.split(512)])
        for defence in self.defences:
            defence.prepare(h)

    def replay(self, digests: Tensor, account: str = "default", images: Tensor | None = None) -> None:
        """Replay queries answered before a restart, so that ledger and stateful defences are as they were.

        digests uint8 (B, 16); a stateful victim needs all the images (B, 3, H, W) again.
        """
        asked = unpack_digests(digests)
        hashes = [] if images is None else unpack_digests(perceptual_hashes(images), HASH_BYTES)
        if self.stateful:
            keys = unpack_digests(perceptual_hashes(images, self._secret), HASH_BYTES)
            self._answer(images, asked, keys, account, lambda rows: rows)
        self.ledger.record(asked, account, hashes)

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """The defences' reports, prefixed by their names. sources: for each account, the image index of each query."""
        reports = {type(defence).__name__.lower(): defence.report(sources) for defence in self.defences}
        return {f"{name}_{key}": value for name, report in reports.items() for key, value in report.items()}

    @torch.no_grad()
    def _represent(self, images: Tensor) -> Tensor:
        images = to_float(images.to(self._precision.device, non_blocking=True))
        with self._precision.autocast():
            return self._api.encoder(images.contiguous(memory_format=self._precision.memory_format))

    def look_at(self, images: Tensor, account: str = "default") -> Call:
        """The owner's view of an account's first call, of images (B, 3, H, W); nothing is answered or recorded."""
        h, keys = self._represent(images).float(), perceptual_hashes(images, self._secret)
        return Call(image_digests(images), h, self._project, account, hashes=unpack_digests(keys, HASH_BYTES))

    @torch.no_grad()
    def respond(self, call: Call) -> Tensor:
        """Answers (B, dim), float32, to a call, which the defences see; the ledger has no entry of it."""
        with self._precision.autocast():
            answers = self._api.answer(call.representations).float()
        if not len(answers):
            return answers.new_empty(0, self.dim)
        for defence in self.defences:
            answers = defence(answers, call)
        return answers.clone()  # a view would carry the numbers that a defence left out

    def _answer(
        self, images: Tensor, digests: Sequence[bytes], keys: Sequence[bytes], account: str, gather: Gather
    ) -> Tensor:
        first = self.ledger.accounts.get(account, Account()).queries
        h = gather(self._represent(images)).float()
        return self.respond(Call(digests, h, self._project, account, first, keys))

    def _project(self, h: Tensor) -> Tensor:
        with self._precision.autocast():
            return self._api.encoder.backbone.fc(h)
