"""Rounding of answers."""

from dataclasses import dataclass

from torch import Tensor

from defenses.base import Defence, Query, setting


@dataclass
class Rounding(Defence):
    """Rounds every number of an answer to so many decimals (a baseline of StolenEncoder, Cont-Steal and RDA)."""

    decimals: int = setting(1, "decimals that rounding leaves")

    def __post_init__(self):
        self.require(0 <= self.decimals <= 6, "decimals", "from 0 to 6")

    def __call__(self, answers: Tensor, query: Query) -> Tensor:
        return answers.round(decimals=self.decimals)
