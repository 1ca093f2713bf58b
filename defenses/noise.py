"""Additive noise: the 2022 code's second defence."""

from dataclasses import dataclass

from torch import Tensor

from defenses.base import Call, Defence, setting


@dataclass
class Noise(Defence):
    """Adds N(mu, sigma^2) to every number of an answer (2022 paper, section on defences).

    One draw for each answer: the same image asked again gets a fresh one, unless the noise is consistent; then it
    follows from the image's pixels and the owner's secret, and averaging repeated answers gains nothing.
    """

    mu: float = setting(5.0, "mean of what noise adds")
    sigma: float = setting(0.5, "standard deviation of what noise adds and of what poisoning answers", at_least=0)
    consistent_noise: bool = setting(False, "the same image gets the same noise again")

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        return answers + self.mu + self.sigma * self.normal(call, answers.shape[1], self.consistent_noise)
