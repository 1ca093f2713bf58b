"""A detector: does an account's stream of queries look like an attack? It changes no answer.

Every statistic gives a score to an account's stream, larger for what an attacker is expected to send. Attackers differ,
so no statistic works against all of them:

nearest   The mean cosine similarity of each query to its nearest earlier query. Repeated images and views of an image
          are close to each other. But so are the images of a user with a narrow task, while those of an attacker who
          queries many different images once each are far apart: there the score may well be worse than chance.
coverage  The percentage of hash buckets that the queries fell into (B4B; Dubinski et al., NeurIPS 2023). An attacker
          wants the whole space, a user part of it. It grows with the number of queries, so only streams of similar
          length are comparable, and an attacker who repeats images covers less with the same number.
prada     1 - W, where W is Shapiro and Wilk's statistic of the nearest distances (PRADA; Juuti et al., EuroS&P 2019):
          those of benign users are expected to be normally distributed. It says how far they are from that, not why:
          a mixture of classes of different spread scores like a mixture of repeated and fresh images.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from defenses.base import Call, Defence, setting
from defenses.buckets import Coverage, hyperplanes
from defenses.nearest import Memory
from utils import generator

MEMORY, BITS = 10_000, 12
OUTLIERS = 3.0  # standard deviations from the mean beyond which PRADA leaves distances out


class Stream:
    """A detector's state for an account, whose representations arrive in parts (B, D) in query order."""

    def __init__(self, memory: int = MEMORY, bits: int = BITS, secret: int = 0):
        self.bits, self.secret = bits, secret
        self._memory = Memory(memory)
        self._coverage: Coverage | None = None
        self._distances: list[Tensor] = []

    def add(self, representations: Tensor) -> None:
        """Add representations (B, D)."""
        if self._coverage is None:
            normals = hyperplanes(self.bits, representations.shape[1], generator(self.secret, "detection"))
            self._coverage = Coverage(normals.to(representations.device))
        self._distances.append(self._memory.nearest(representations).cpu())
        self._coverage.add(representations)

    @property
    def distances(self) -> Tensor:
        """Cosine distances (N - 1,), float32 on the CPU, of all queries but the first to the nearest earlier query."""
        return torch.cat([torch.empty(0), *self._distances])[1:]

    @property
    def coverage(self) -> float:
        """Percentage of the 2^bits buckets that the queries fell into."""
        return self._coverage.percent if self._coverage else 0.0


def similarity(distances: Tensor) -> float:
    """The mean of 1 - d over nearest distances (N,), from -1 to 1; 0 without any."""
    return 1 - distances.double().mean().item() if len(distances) else 0.0


def non_normality(distances: Tensor) -> float:
    """PRADA's test as a score from 0 to 1: 1 - W of nearest distances (N,), without those beyond 3 standard deviations.

    W: Shapiro & Wilk, Biometrika 1965, as scipy computes it. Returns 0 for fewer than three distances, and 1 where all
    are equal (W is undefined). PRADA compares inputs, and has a set of distances for each predicted class; an encoder
    predicts no classes, so here an account has a single set, of distances between representations.
    """
    from scipy.stats import shapiro  # imported here: it takes a second, and most runs have no detector

    if len(distances) < 3:
        return 0.0
    values = distances.double().numpy()
    values = values[np.abs(values - values.mean()) <= OUTLIERS * values.std()]
    if np.ptp(values) == 0:
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the p-value, not W, is inexact for more than 5,000
        return 1 - float(shapiro(values).statistic)


# A new statistic is a row here: a function of a stream, larger for an attacker.
SCORES: dict[str, Callable[[Stream], float]] = {
    "nearest": lambda stream: similarity(stream.distances),
    "coverage": lambda stream: stream.coverage,
    "prada": lambda stream: non_normality(stream.distances),
}


def scores_of(representations: Tensor, memory: int = MEMORY, bits: int = BITS, secret: int = 0) -> dict[str, float]:
    """Each statistic's score of a whole stream of representations (N, D)."""
    stream = Stream(memory, bits, secret)
    stream.add(representations)
    return {name: score(stream) for name, score in SCORES.items()}


@dataclass
class Detection(Defence):
    """Watches each account's stream and leaves the answers as they are; `scores` says how much it looks like an attack.

    It sees the encoder's true representations, whatever other defences do to the answers, and does not depend on how a
    stream is split into calls. The owner chooses the threshold for a score from users' streams (detect.py).
    """

    detection_memory: int = setting(
        MEMORY, "earlier queries of an account that detection compares a query with", at_least=1
    )
    detection_bits: int = setting(
        BITS, "hyperplanes that hash representations into 2^N buckets for detection", at_least=1, at_most=24
    )
    remembers = True
    _streams: dict[str, Stream] = field(default_factory=dict, repr=False)

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        self.watch(call.representations, call.account)
        return answers

    def watch(self, representations: Tensor, account: str = "default") -> None:
        """Add an account's next representations (B, D)."""
        if account not in self._streams:
            self._streams[account] = Stream(self.detection_memory, self.detection_bits, self.secret)
        self._streams[account].add(representations)

    def distances(self, account: str = "default") -> Tensor:
        """The account's nearest distances (N - 1,) in query order: see `Stream.distances`."""
        return self._streams[account].distances if account in self._streams else torch.empty(0)

    def scores(self, account: str = "default") -> dict[str, float]:
        """The account's score by each statistic; empty for an account without queries."""
        return {key: rate(self._streams[account]) for key, rate in SCORES.items()} if account in self._streams else {}

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """The largest score of any account by each statistic."""
        scores = [self.scores(account) for account in sources if account in self._streams]
        return {name: max(figures[name] for figures in scores) for name in SCORES} if scores else {}
