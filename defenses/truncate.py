"""Answers cut to their first dimensions."""

from dataclasses import dataclass

from torch import Tensor

from defenses.base import Call, Defence, setting
from utils import UserError


@dataclass
class Truncate(Defence):
    """Returns only the first `dimensions` numbers of an answer: answers get narrower."""

    dimensions: int = setting(128, "dimensions of an answer that truncate keeps", at_least=1)

    def width(self, dim: int) -> int:
        if self.dimensions > dim:
            raise UserError(f"--dimensions {self.dimensions} is more than the {dim} of an answer: give {dim} or less")
        return self.dimensions

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        return answers[:, : self.dimensions]
