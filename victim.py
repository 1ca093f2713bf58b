"""The black box: an encoder that answers queries, keeps an exact record of them and cannot be trained."""

import copy
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data_aug.datasets import to_float
from defenses import Defence, Query
from models import SimCLREncoder
from utils import Precision, UserError


class BudgetExceeded(UserError):
    """The queries asked for would exceed the budget; none of them was answered."""


def image_digests(images: Tensor) -> list[bytes]:
    """A 16-byte digest for each image (N, 3, H, W): equal for equal pixels, whether uint8 or float in [0, 1]."""
    rows = to_float(images).cpu().contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def digest_tensor(images: Tensor) -> Tensor:
    """`image_digests` as uint8 (N, 16), as checkpoints keep them: so an evaluation knows which images were queried."""
    return torch.frombuffer(bytearray(b"".join(image_digests(images))), dtype=torch.uint8).view(-1, 16)


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
                "images": torch.frombuffer(bytearray(b"".join(sorted(account.images))), dtype=torch.uint8),
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

    def query(self, images: Tensor, account: str = "default") -> Tensor:
        """Answers (B, dim), float32 on the victim's device, to images (B, 3, H, W), uint8 or float in [0, 1].

        BudgetExceeded when the budget does not cover all of them; then none is answered or recorded.
        """
        asked = self.ledger.queries
        if self.budget is not None and asked + len(images) > self.budget:
            raise BudgetExceeded(
                f"a query of {len(images)} images would exceed the budget of {self.budget}: {asked} are spent"
            )
        digests = image_digests(images)
        answers = self._answer(images, digests, account)
        self.ledger.record(digests, account)
        return answers

    def recall(self, images: Tensor, account: str = "default") -> None:
        """Take it that these images were answered in an earlier process: the ledger and the defences remember them."""
        digests = image_digests(images)
        if any(defence.remembers for defence in self.defences):
            self._answer(images, digests, account)
        self.ledger.record(digests, account)

    def met(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """What the defences report of accounts whose queries (N,) were of the images of these numbers."""
        reports = {type(one).__name__.lower(): one.report(sources) for one in self.defences}
        return {f"{name}_{key}": value for name, report in reports.items() for key, value in report.items()}

    @torch.no_grad()
    def _answer(self, images: Tensor, digests: Sequence[bytes], account: str) -> Tensor:
        images = to_float(images.to(self._precision.device, non_blocking=True))
        with self._precision.autocast():
            h = self._service.encoder(images.contiguous(memory_format=self._precision.memory_format))
            answers = self._service.sell(h).float()
        if not self.defences:
            return answers
        if not len(images):
            return answers.new_empty(0, self.dim)
        first = self.ledger.accounts.get(account, Account()).queries
        query = Query(images, digests, h.float(), self._project, account, first)
        for defence in self.defences:
            answers = defence(answers, query)
        return answers.clone()  # a view would carry the numbers that a defence left out

    def _project(self, h: Tensor) -> Tensor:
        with self._precision.autocast():
            return self._service.encoder.backbone.fc(h)


class Purchases:
    """An attacker's side of the API: asks in batches, and keeps every answer in a file as it arrives.

    The file `keep` holds the rows of all answers in the order in which they were asked for. What an earlier, killed
    attack already paid for is read back from it instead of being asked again: ask the same in the same order.
    """

    def __init__(self, victim: Victim, keep: Path | None = None, batch_size: int = 512):
        self.victim, self.keep, self.batch_size = victim, keep, batch_size
        self.asked = 0
        self.kept = np.empty((0, victim.dim), np.float32)
        if keep and keep.exists():
            whole = keep.stat().st_size // (4 * victim.dim)
            self.kept = np.fromfile(keep, np.float32, whole * victim.dim).reshape(-1, victim.dim)
            os.truncate(keep, self.kept.nbytes)  # a row cut off by a kill

    def ask(self, images: Tensor, account: str = "default") -> Tensor:
        """Answers (N, dim), float32 on the CPU, to images (N, 3, H, W), each asked once."""
        answers = []
        with tqdm(total=len(images), unit="query", disable=None, leave=False) as bar:
            for batch in images.split(self.batch_size):
                answers.append(self._ask(batch, account))
                bar.update(len(batch))
        return torch.cat(answers) if answers else torch.empty(0, self.victim.dim)

    def _ask(self, batch: Tensor, account: str) -> Tensor:
        paid = torch.from_numpy(self.kept[self.asked : self.asked + len(batch)])
        self.asked += len(batch)
        if len(paid):
            self.victim.recall(batch[: len(paid)], account)
        if len(paid) == len(batch):
            return paid
        rows = self.victim.query(batch[len(paid) :], account).cpu()
        if self.keep:
            with self.keep.open("ab") as file:
                file.write(rows.numpy().tobytes())
        return torch.cat([paid, rows])
