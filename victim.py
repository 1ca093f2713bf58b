"""The black box: an encoder that answers queries, keeps an exact record of them and cannot be trained."""

import copy
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data_aug.datasets import to_float
from models import SimCLREncoder
from utils import Precision, UserError

# A defence takes the answers (B, D), the images as the encoder saw them and the account's name, and gives the answers
# that the account gets to see.
Defence = Callable[[Tensor, Tensor, str], Tensor]


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

    def record(self, images: Tensor, account: str = "default", calls: int = 1) -> None:
        """Enter the images (N, 3, H, W) that were answered in so many calls."""
        entry = self.accounts.setdefault(account, Account())
        entry.queries += len(images)
        entry.calls += calls
        entry.images.update(image_digests(images))

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
        h = self.encoder(images)
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
    `defences` change the answers in their order.
    """

    def __init__(
        self,
        encoder: nn.Module,
        budget: int | None = None,
        defences: Sequence[Defence] = (),
        precision: Precision | None = None,
    ):
        self._encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        self._precision = precision or Precision("fp32", next(encoder.parameters()).device)
        self._encoder.to(self._precision.device, memory_format=self._precision.memory_format)
        self.budget = budget
        self.defences = list(defences)
        self.ledger = Ledger()

    @property
    def dim(self) -> int:
        """Width of an answer."""
        return self._encoder.dim

    @functools.cached_property
    def version(self) -> str:
        """Names the weights that answer: see `version_of`."""
        return version_of(self._encoder)

    @torch.no_grad()
    def query(self, images: Tensor, account: str = "default") -> Tensor:
        """Answers (B, dim), float32 on the victim's device, to images (B, 3, H, W), uint8 or float in [0, 1].

        BudgetExceeded when the budget does not cover all of them; then none is answered or recorded.
        """
        asked = self.ledger.queries
        if self.budget is not None and asked + len(images) > self.budget:
            raise BudgetExceeded(
                f"a query of {len(images)} images would exceed the budget of {self.budget}: {asked} are spent"
            )
        images = to_float(images.to(self._precision.device, non_blocking=True))
        with self._precision.autocast():
            answers = self._encoder(images.contiguous(memory_format=self._precision.memory_format)).float()
        for defence in self.defences:
            answers = defence(answers, images, account)
        self.ledger.record(images, account)
        return answers


def ask_once(victim: Victim, images: Tensor, keep: Path | None = None, batch_size: int = 512) -> Tensor:
    """Answers (N, dim), float32 on the CPU, to images (N, 3, H, W), each asked once.

    The file `keep` gets the answers' rows as they arrive. Those that an earlier, killed attack already paid for are
    read back from it and entered in the ledger instead of being asked again.
    """
    if keep is None:
        return torch.cat([victim.query(batch).cpu() for batch in images.split(batch_size)])
    row_bytes = 4 * victim.dim
    answers = torch.empty(len(images), victim.dim)
    keep.touch()
    done = min(keep.stat().st_size // row_bytes, len(images))
    if done:
        answers[:done] = torch.from_numpy(np.fromfile(keep, np.float32, done * victim.dim)).view(done, -1)
        known = victim.ledger.queries
        if done > known:
            victim.ledger.record(images[known:done], calls=math.ceil((done - known) / batch_size))
    with (
        keep.open("r+b") as file,
        tqdm(total=len(images), initial=done, unit="query", disable=None, leave=False) as bar,
    ):
        file.truncate(done * row_bytes)  # a row cut off by a kill
        file.seek(0, 2)
        while done < len(images):
            rows = victim.query(images[done : done + batch_size]).cpu()
            file.write(rows.numpy().tobytes())
            file.flush()
            answers[done : done + len(rows)] = rows
            done += len(rows)
            bar.update(len(rows))
    return answers
