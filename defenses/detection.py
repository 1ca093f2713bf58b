"""A detector: does an account's stream of queries look like an attack? It changes no answer.

Every statistic gives a score to an account's stream, larger for what an attacker is expected to send. Attackers differ,
so no statistic works against all of them:

nearest   The mean cosine similarity of each query to its nearest earlier query. Repeated images and views of an image
          are close to each other. But so are the images of a user with a narrow task, while those of an attacker who
          queries many different images once each are far apart: there the score may well be worse than chance.
coverage  The percentage of hash buckets that the queries fell into (B4B; Dubinski et al., NeurIPS 2023). An attacker
          wants the whole space, a user part of it. It grows with the number of queries, so only streams of similar
          length are comparable, and an attacker who repeats images covers less with the same number.
normality 1 - W, where W is Shapiro and Wilk's statistic of the nearest distances of representations, all classes in one
          set. It says how far they are from a normal distribution, not why: a mixture of classes of different spread
          scores like a mixture of repeated and fresh images.

PRADA, from which the last one is derived, compares inputs of the same predicted class: see defenses/prada.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from defenses.base import Call, Defence, setting
from defenses.buckets import Coverage, Hyperplanes
from defenses.nearest import Memory
from defenses.prada import shapiro_w
from utils import generator

MEMORY, BITS = 10_000, 12


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
            draws = generator(self.secret, "detection")
            self._coverage = Coverage(Hyperplanes.draw(self.bits, representations.shape[1], draws))
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
    """1 - W of nearest distances (N,), from 0 to 1 (see `shapiro_w`); 0 for fewer than three."""
    return 1 - shapiro_w(distances.numpy()) if len(distances) > 2 else 0.0


# A new statistic is a row here: a function of a stream, larger for an attacker.
SCORES: dict[str, Callable[[Stream], float]] = {
    "nearest": lambda stream: similarity(stream.distances),
    "coverage": lambda stream: stream.coverage,
    "normality": lambda stream: non_normality(stream.distances),
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
