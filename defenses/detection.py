"""A detector: does what an account asks look like an attack? It watches the stream of queries and changes no answer.

Every statistic gives one score for an account's stream, larger for what an attacker is expected to send. They expect
different things, so that none holds for every attack:

nearest   The mean cosine similarity of the queries to their nearest earlier ones. Repeated images and views of the same
          image are close to each other. But so are the images of a user with a narrow task, while an attacker who asks
          each of many different images once is far from itself: against that one the score may well be below chance.
coverage  The percentage of hash buckets that the queries fell into (B4B; Dubinski et al., NeurIPS 2023). An attacker
          wants the whole space, a user a part of it. It grows with the number of queries, so only streams of about the
          same length compare, and an attacker who repeats images covers less for the same number.
prada     1 - W, where W is Shapiro and Wilk's statistic of the nearest distances (PRADA; Juuti et al., EuroS&P 2019):
          those of benign users are expected to look normal. It says how unlike a normal distribution they are, not why:
          a mixture of classes of different width does it as well as a mixture of repeated and fresh images.
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
    """What a detector keeps of an account's representations, which come in parts (B, D) in the order of asking."""

    def __init__(self, memory: int = MEMORY, bits: int = BITS, secret: int = 0):
        self.bits, self.secret = bits, secret
        self._memory = Memory(memory)
        self._coverage: Coverage | None = None
        self._distances: list[Tensor] = []

    def add(self, representations: Tensor) -> None:
        """Enter representations (B, D)."""
        if self._coverage is None:
            normals = hyperplanes(self.bits, representations.shape[1], generator(self.secret, "detection"))
            self._coverage = Coverage(normals.to(representations.device))
        self._distances.append(self._memory.nearest(representations).cpu())
        self._coverage.add(representations)

    @property
    def distances(self) -> Tensor:
        """Cosine distances (N - 1,), float32 on the CPU, of all queries but the first to their nearest earlier ones."""
        return torch.cat([torch.empty(0), *self._distances])[1:]

    @property
    def coverage(self) -> float:
        """Percentage of the 2^bits buckets that were met."""
        return self._coverage.percent if self._coverage else 0.0


def similarity(distances: Tensor) -> float:
    """The mean of 1 - d over nearest distances (N,), from -1 to 1; 0 without any."""
    return 1 - distances.double().mean().item() if len(distances) else 0.0


def non_normality(distances: Tensor) -> float:
    """PRADA's test as a score from 0 to 1: 1 - W of nearest distances (N,) less those beyond 3 standard deviations.

    W: Shapiro & Wilk, Biometrika 1965, as scipy computes it. Fewer than three distances say nothing: 0. Where all
    are the same there is no W: 1. PRADA compares inputs, and has a set of distances for each class that the model
    predicts; an encoder predicts none, so here an account has one set, of distances between representations.
    """
    from scipy.stats import shapiro  # here, because it takes a second and most runs have no detector

    if len(distances) < 3:
        return 0.0
    values = distances.double().numpy()
    values = values[np.abs(values - values.mean()) <= OUTLIERS * values.std()]
    if np.ptp(values) == 0:
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the p-value, not W, is inexact for more than 5,000
        return 1 - float(shapiro(values).statistic)


# A new statistic is a row: what it makes of a stream, larger for an attacker.
SCORES: dict[str, Callable[[Stream], float]] = {
    "nearest": lambda stream: similarity(stream.distances),
    "coverage": lambda stream: stream.coverage,
    "prada": lambda stream: non_normality(stream.distances),
}


def scores_of(representations: Tensor, memory: int = MEMORY, bits: int = BITS, secret: int = 0) -> dict[str, float]:
    """The score by each statistic of a whole stream of representations (N, D)."""
    stream = Stream(memory, bits, secret)
    stream.add(representations)
    return {name: one(stream) for name, one in SCORES.items()}


@dataclass
class Detection(Defence):
    """Watches each account's stream and leaves the answers as they are; `scores` says how like an attacker's it looks.

    It looks at the encoder's true representations, whatever other defences make of the answers, and does not depend on
    how a stream is cut into calls. Which score is too high is the owner's to choose, from users' streams (detect.py).
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
        """Enter an account's next representations (B, D)."""
        if account not in self._streams:
            self._streams[account] = Stream(self.detection_memory, self.detection_bits, self.secret)
        self._streams[account].add(representations)

    def distances(self, account: str = "default") -> Tensor:
        """The account's nearest distances in the order of asking (N - 1,): see `Stream.distances`."""
        return self._streams[account].distances if account in self._streams else torch.empty(0)

    def scores(self, account: str = "default") -> dict[str, float]:
        """The account's score by each statistic; empty for one that asked nothing."""
        return {name: one(self._streams[account]) for name, one in SCORES.items()} if account in self._streams else {}

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """The largest score of an account by each statistic."""
        scores = [self.scores(account) for account in sources if account in self._streams]
        return {name: max(one[name] for one in scores) for name in SCORES} if scores else {}
