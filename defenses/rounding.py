"""Rounding of answers."""

from dataclasses import dataclass

from torch import Tensor

from defenses.base import Call, Defence, setting


@dataclass
class Rounding(Defence):
    """Rounds every number of an answer to `decimals` decimals (a baseline of StolenEncoder, Cont-Steal and RDA)."""

    decimals: int = setting(1, "decimals that rounding keeps", at_least=0, at_most=6)

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        return answers.round(decimals=self.decimals)
