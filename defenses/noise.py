"""Additive noise: the 2022 code's second defence."""

import math
from dataclasses import dataclass

from torch import Tensor

from defenses.base import Defence, Query, setting


@dataclass
class Noise(Defence):
    """Adds N(mu, sigma^2) to every number of an answer (2022 paper, section on defences).

    One draw for each answer: the same image asked again gets a fresh one, unless the noise is consistent; then it
    follows from the image's pixels and the owner's secret, and averaging repeated answers gains nothing.
    """

    mu: float = setting(5.0, "mean of what noise adds")
    sigma: float = setting(0.5, "standard deviation of what noise adds and of what poisoning answers")
    consistent_noise: bool = setting(False, "the same image gets the same noise again")

    def __post_init__(self):
        self.require(math.isfinite(self.mu), "mu", "finite")
        self.require(0 <= self.sigma < math.inf, "sigma", "0 or more and finite")

    def __call__(self, answers: Tensor, query: Query) -> Tensor:
        return answers + self.mu + self.sigma * self.normal(query, answers.shape[1], self.consistent_noise)
