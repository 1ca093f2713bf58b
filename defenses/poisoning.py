"""Similarity-triggered poisoning: the 2022 code's first defence, with a memory across an account's calls."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from defenses.base import Call, Defence, setting
from defenses.nearest import Memory
from utils import UserError

REPLACEMENT = 1000.0  # mean of the answer to a query that looks like an earlier query


@dataclass
class Poisoning(Defence):
    """Answers N(1000, sigma^2) to a query whose projection is close to that of an earlier query of the account.

    Close means (cos + 1) / 2 above the threshold (2022 code): two views of one image, which contrastive attacks send.
    Each query is compared with the `poison_memory` queries before it, exactly, whether in this call or an earlier call,
    so answers do not depend on how a stream is split into calls.
    """

    sigma: float = setting(0.5, "standard deviation of the noise added to answers and of poisoned answers", at_least=0)
    poison_memory: int = setting(
        10_000, "earlier queries of an account that poisoning compares a query with", at_least=1
    )
    poison_threshold: float = setting(
        0.8, "similarity, (cos + 1) / 2, above which a query is poisoned", at_least=0, at_most=1
    )
    remembers = True
    needs_head = True
    _seen: dict[str, Memory] = field(default_factory=dict, repr=False)
    _scores: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list), repr=False)

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        similarity = self.nearest(call)
        replacement = REPLACEMENT + self.sigma * self.normal(call, answers.shape[1])
        return torch.where((similarity > self.poison_threshold)[:, None], replacement, answers)

    def nearest(self, call: Call) -> Tensor:
        """Largest (cos + 1) / 2 of each query (B,) with an earlier query of the account; -inf for the first query."""
        if call.account not in self._seen:
            self._seen[call.account] = Memory(self.poison_memory)
        similarity = 1 - self._seen[call.account].nearest(call.projections) / 2
        self._scores[call.account].append(similarity)
        return similarity

    def scores(self, account: str = "default") -> Tensor:
        """The results of `nearest` for the account's queries so far (N,), in order, on the CPU."""
        return torch.cat(self._scores[account]).cpu() if self._scores[account] else torch.empty(0)

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """Number of poisoned answers, with F1 and AUC of telling repeats of the account's images from other queries.

        F1 and AUC are left out where no image was repeated.
        """
        scores = torch.cat([self.scores(account) for account in sources])
        truth = torch.cat([repeats(images) for images in sources.values()])
        figures = {"poisoned": float((scores > self.poison_threshold).sum())}
        if truth.any() and not truth.all():
            figures |= detection_figures(scores, truth, self.poison_threshold)
        return figures


def repeats(images: Tensor) -> Tensor:
    """Whether each query of a stream, given by image index (N,), repeats an image queried before."""
    first = torch.ones(len(images), dtype=torch.bool)
    order = images.sort(stable=True).indices
    first[order[1:]] = images[order[1:]] != images[order[:-1]]
    return ~first


def detection_figures(scores: Tensor, truth: Tensor, threshold: float) -> dict[str, float]:
    """F1 of scores (N,) above the threshold, and AUC of the scores, as predictions of `truth` (N,).

    UserError when all queries are of one kind: both are undefined then.
    """
    from sklearn.metrics import f1_score, roc_auc_score

    if truth.all() or not truth.any():
        raise UserError("all queries are of one kind: F1 and AUC need some that repeat an image and some that do not")
    ranked = scores.clamp_min(-1).numpy()  # the first query has nothing before it
    return {
        "f1": float(f1_score(truth.numpy(), (scores > threshold).numpy())),
        "auc": float(roc_auc_score(truth.numpy(), ranked)),
    }
