"""Additive noise: the 2022 code's second defence."""

from dataclasses import dataclass

from torch import Tensor

from defenses.base import Call, Defence, setting


@dataclass
class Noise(Defence):
    """Adds N(mu, sigma^2) to every number of an answer (2022 paper, section on defences).

    Every answer has a new draw, also for a repeated image, unless the noise is consistent. Then it is a function of the
    image's perceptual hash and the owner's secret: the same image gets the same noise, and a near-copy mostly does. An
    attacker who changes the pixels more crosses the hash's boundaries, gets other draws, and averages a part away.
    """

    mu: float = setting(5.0, "mean of the noise added to answers")
    sigma: float = setting(0.5, "standard deviation of the noise added to answers and of poisoned answers", at_least=0)
    consistent_noise: bool = setting(False, "give a repeated image, and most near-copies of it, the same noise")

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        return answers + self.mu + self.sigma * self.normal(call, answers.shape[1], self.consistent_noise)
