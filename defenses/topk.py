"""Answers reduced to their largest numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.base import Call, Defence, setting
from utils import UserError


@dataclass
class TopK(Defence):
    """Sets all but the k numbers of largest magnitude of an answer to zero (StolenEncoder, Liu et al., CCS 2022)."""

    top_k: int = setting(64, "numbers of an answer that topk keeps", at_least=1)

    def width(self, dim: int) -> int:
        if self.top_k > dim:
            raise UserError(f"--top-k {self.top_k} is more than the {dim} numbers of an answer: give {dim} or less")
        return dim

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        kept = answers.abs().topk(self.top_k, dim=1).indices
        return torch.zeros_like(answers).scatter_(1, kept, answers.gather(1, kept))
