"""The black box: an encoder that answers queries, keeps an exact record of them and cannot be trained."""

import copy
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data_aug.datasets import to_float
from defenses import Defence, Query
from distributed import any_of, barrier, gather, share
from models import SimCLREncoder
from stopping import Stopped, deferred, received
from utils import Precision, UserError, first_process, quiet


class BudgetExceeded(UserError):
    """The queries asked for would exceed the budget; none of them was answered."""


def image_digests(images: Tensor) -> list[bytes]:
    """A 16-byte digest for each image (N, 3, H, W): equal for equal pixels, whether uint8 or float in [0, 1]."""
    rows = to_float(images).cpu().contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def digest_tensor(images: Tensor) -> Tensor:
    """`image_digests` as uint8 (N, 16), as checkpoints keep them: so an evaluation knows which images were queried."""
    return as_tensor(image_digests(images))


def as_tensor(digests: Iterable[bytes]) -> Tensor:
    """Digests as uint8 (N, 16)."""
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).copy()).view(-1, 16)


def as_bytes(digests: Tensor) -> list[bytes]:
    """Digests (N, 16) as `image_digests` gives them."""
    return [bytes(row) for row in digests.numpy()]


def version_of(network: nn.Module) -> str:
    """Names a network's weights: 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for key, value in network.state_dict().items():
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Account:
    """What one account asked: queries, calls, and the digests of its distinct images."""

    queries: int = 0
    calls: int = 0
    images: set[bytes] = field(default_factory=set)

    @property
    def distinct(self) -> int:
        return len(self.images)


class Ledger:
    """The victim's own record of what was asked, by account and in all.

    A query is one image sent once: the same image sent again is another query, and so is another view of it.
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
        return len(set().union(*(account.images for account in self.accounts.values())))

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
        """Plain types and tensors: what a checkpoint keeps of the record."""
        return {
            name: {
                "queries": account.queries,
                "calls": account.calls,
                "images": as_tensor(sorted(account.images)).flatten(),
            }
            for name, account in self.accounts.items()
            if account.images
        }

    def load_state_dict(self, state: Mapping) -> None:
        self.accounts = {}
        for name, entry in state.items():
            digests = entry["images"].numpy().tobytes()
            images = {digests[i : i + 16] for i in range(0, len(digests), 16)}
            self.accounts[name] = Account(entry["queries"], entry["calls"], images)


class Service(nn.Module):
    """What an API makes of an encoder: images (B, 3, H, W) -> answers (B, dim).

    `sells` says what an answer is: `representations` h, `projections` z, `both` of them side by side, or of the linear
    `classifier` on h the `probabilities` or the `labels` (rows of 0 with a 1).
    """

    def __init__(self, encoder: SimCLREncoder, sells: str = "representations", classifier: nn.Linear | None = None):
        super().__init__()
        self.encoder, self.sells, self.classifier = encoder, sells, classifier

    @property
    def dim(self) -> int:
        if self.classifier is not None:
            return self.classifier.out_features
        widths = {"representations": self.encoder.dim, "projections": self.encoder.out_dim}
        return widths.get(self.sells) or sum(widths.values())

    def forward(self, images: Tensor) -> Tensor:
        return self.sell(self.encoder(images))

    def sell(self, h: Tensor) -> Tensor:
        """Answers (B, dim) made of representations (B, D)."""
        if self.classifier is not None:
            logits = self.classifier(h).float()
            return logits.softmax(dim=1) if self.sells == "probabilities" else F.one_hot(logits.argmax(dim=1), self.dim)
        if self.sells == "representations":
            return h
        z = self.encoder.backbone.fc(h)
        return z if self.sells == "projections" else torch.cat([h, z], dim=1)


class Victim:
    """An encoder, or a `Service` of one, behind an API: who holds this object sees answers only.

    The encoder is copied, set to eval mode and detached from autograd, so that nothing that happens here or to the
    original changes it. `budget` is the most queries that are answered over the object's life; None sets no limit.
    `defences` change the answers in their order. UserError when one of them cannot work on such answers.
    """

    def __init__(
        self,
        encoder: SimCLREncoder | Service,
        budget: int | None = None,
        defences: Sequence[Defence] = (),
        precision: Precision | None = None,
    ):
        service = encoder if isinstance(encoder, Service) else Service(encoder)
        self._service = copy.deepcopy(service).eval().requires_grad_(False)
        self._precision = precision or Precision("fp32", next(encoder.parameters()).device)
        self._service.to(self._precision.device, memory_format=self._precision.memory_format)
        self.budget = budget
        self.defences = list(defences)
        self.ledger = Ledger()
        self.dim = service.dim  # width of an answer
        for defence in self.defences:
            self.dim = defence.width(self.dim)
            if defence.needs_head and not service.encoder.has_head:
                name = type(defence).__name__.lower()
                raise UserError(f"{name} compares projections and this victim has no head: choose another --defence")

    @functools.cached_property
    def version(self) -> str:
        """Names the weights that answer: see `version_of`."""
        return version_of(self._service)

    def query(self, images: Tensor, account: str = "default", total: int | None = None) -> Tensor:
        """Answers (B, dim), float32 on the victim's device, to images (B, 3, H, W), uint8 or float in [0, 1].

        BudgetExceeded when the budget does not cover all of them; then none is answered or recorded. In a job of
        several processes a call is of `total` images, of which each process gives its `distributed.share` and asks
        about no other; all of them get all answers and enter all images in their ledger, so that these agree.
        """
        return self.answer(images, account, total)[0]

    def answer(self, images: Tensor, account: str = "default", total: int | None = None) -> tuple[Tensor, Tensor]:
        """As `query`, with the digests uint8 (B, 16) of the images that were answered."""
        count = len(images) if total is None else total
        asked = self.ledger.queries
        if self.budget is not None and asked + count > self.budget:
            raise BudgetExceeded(
                f"a query of {count} images would exceed the budget of {self.budget}: {asked} are spent"
            )
        digests = digest_tensor(images)
        digests = digests if total is None else gather(digests, total)
        answers = self._answer(images, as_bytes(digests), account, total)
        self.ledger.record(as_bytes(digests), account)
        return answers, digests

    def recall(self, digests: Tensor, account: str = "default", images: Tensor | None = None) -> None:
        """Take it that images with these digests (B, 16) were answered in an earlier process.

        The ledger and the defences remember them; defences that do need the images (B, 3, H, W) again.
        """
        if any(defence.remembers for defence in self.defences):
            self._answer(images, as_bytes(digests), account)
        self.ledger.record(as_bytes(digests), account)

    def met(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """What the defences report of accounts whose queries (N,) were of the images of these numbers."""
        reports = {type(one).__name__.lower(): one.report(sources) for one in self.defences}
        return {f"{name}_{key}": value for name, report in reports.items() for key, value in report.items()}

    @torch.no_grad()
    def _answer(self, images: Tensor, digests: Sequence[bytes], account: str, total: int | None = None) -> Tensor:
        images = to_float(images.to(self._precision.device, non_blocking=True))
        with self._precision.autocast():
            h = self._service.encoder(images.contiguous(memory_format=self._precision.memory_format))
            h = h if total is None else gather(h, total)
            answers = self._service.sell(h).float()
        if not self.defences:
            return answers
        if not len(h):
            return answers.new_empty(0, self.dim)
        first = self.ledger.accounts.get(account, Account()).queries
        query = Query(digests, h.float(), self._project, account, first)
        for defence in self.defences:
            answers = defence(answers, query)
        return answers.clone()  # a view would carry the numbers that a defence left out

    def _project(self, h: Tensor) -> Tensor:
        with self._precision.autocast():
            return self._service.encoder.backbone.fc(h)


class Purchases:
    """An attacker's side of the API: asks in batches, and keeps every answer in a file as it arrives.

    The file `keep` has a record for each answer, in the order in which they were asked for: the image's digest, and the
    answer in `dtype`. What an earlier, killed attack already paid for is read back from it instead of being asked
    again: ask the same in the same order. Of a job's processes each asks about its share of a batch, and the first
    writes.
    """

    def __init__(self, victim: Victim, keep: Path | None = None, batch_size: int = 512, dtype: type = np.float32):
        self.victim, self.keep, self.batch_size = victim, keep, batch_size
        self.asked = 0
        self.record = np.dtype([("digest", np.uint8, 16), ("answer", dtype, victim.dim)])
        self.kept = np.empty(0, self.record)
        if keep and keep.exists():
            whole = keep.stat().st_size // self.record.itemsize
            if first_process():
                os.truncate(keep, whole * self.record.itemsize)  # a record cut off by a kill
            self.kept = np.memmap(keep, self.record, "r", shape=whole) if whole else self.kept
        barrier()  # before anyone adds to the file that all have to find the same

    def ask(self, images: Tensor, account: str = "default") -> Tensor:
        """Answers (N, dim), float32 on the CPU, to images (N, 3, H, W), each asked once."""
        answers = list(self.ask_each(len(images), lambda parts: (images[part] for part in parts), account))
        return torch.cat(answers) if answers else torch.empty(0, self.victim.dim)

    def ask_each(
        self, count: int, images: Callable[[Sequence[slice]], Iterable[Tensor]], account: str = "default"
    ) -> Iterator[Tensor]:
        """Answers (B, dim), float32 on the CPU, batch by batch, to `count` images of which `images` gives parts.

        It is asked once for all parts that are needed: what is paid for already isn't got again, unless a defence has
        to see it. Stopped when a signal came: the answers so far are kept.
        """
        paid = self.kept[self.asked : self.asked + count]
        self.asked += len(paid)
        with tqdm(total=count, unit="query", disable=quiet(), leave=False) as bar, deferred():
            for known in self._recall(paid, images, account):
                yield known
                bar.update(len(known))
            rest = self._batches(len(paid), count)
            own = [share(part.stop - part.start) for part in rest]
            mine = [slice(part.start + o.start, part.start + o.stop) for part, o in zip(rest, own, strict=True)]
            for part, wanted in zip(rest, images(mine), strict=True):
                rows, digests = self.victim.answer(wanted, account, part.stop - part.start)
                self._keep(digests, rows.cpu())
                yield rows.cpu()
                bar.update(len(rows))
                if any_of(received() is not None):
                    raise Stopped(f"stopped by {received()}: {self.asked} answers are kept, --resume goes on from them")

    def answers(self, count: int) -> np.ndarray:
        """The first `count` answers (count, dim) as the file holds them, read when they are looked at."""
        return np.memmap(self.keep, self.record, "r", shape=count)["answer"]

    def _batches(self, start: int, stop: int) -> list[slice]:
        return [slice(first, min(first + self.batch_size, stop)) for first in range(start, stop, self.batch_size)]

    def _recall(
        self, paid: np.ndarray, images: Callable[[Sequence[slice]], Iterable[Tensor]], account: str
    ) -> Iterator[Tensor]:
        parts = self._batches(0, len(paid))
        seen = images(parts) if any(one.remembers for one in self.victim.defences) else [None] * len(parts)
        for part, again in zip(parts, seen, strict=True):
            self.victim.recall(torch.from_numpy(paid[part]["digest"].copy()), account, again)
            yield torch.from_numpy(paid[part]["answer"].astype(np.float32))

    def _keep(self, digests: Tensor, rows: Tensor) -> None:
        self.asked += len(rows)
        if self.keep and first_process():
            fresh = np.empty(len(rows), self.record)
            limit = np.finfo(fresh["answer"].dtype).max  # what a defence exaggerates may not fit float16
            fresh["digest"], fresh["answer"] = digests.numpy(), rows.numpy().clip(-limit, limit)
            with self.keep.open("ab") as file:
                file.write(fresh.tobytes())
