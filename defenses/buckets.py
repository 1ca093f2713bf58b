"""B4B: noise that grows with the share of the representation space that an account has explored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from defenses.base import Call, Defence, setting
from utils import UserError, generator

LARGEST = 1e6  # standard deviation: far beyond beta the formula overflows


class Coverage:
    """The buckets of a hash by random hyperplanes that an account's representations (B, D) have fallen into."""

    def __init__(self, normals: Tensor):
        self.normals = normals  # (bits, D)
        self.occupied = torch.zeros(2 ** len(normals), dtype=torch.bool, device=normals.device)

    def bucket(self, representations: Tensor) -> Tensor:
        """Returns the index (B,) of each row's bucket."""
        bits = (representations.float() @ self.normals.T > 0).long()
        return (bits << torch.arange(len(self.normals), device=bits.device)).sum(dim=1)

    def add(self, representations: Tensor) -> Tensor:
        """Add rows in order; returns the percentage of buckets occupied after each row (B,), float32."""
        bucket = self.bucket(representations)
        row = torch.arange(len(bucket), device=bucket.device)
        first = torch.full_like(self.occupied, len(row), dtype=torch.long).scatter_reduce(0, bucket, row, "amin")
        new = ~self.occupied[bucket] & (first[bucket] == row)
        count = self.occupied.sum() + new.cumsum(0)
        self.occupied[bucket] = True
        return 100.0 * count / len(self.occupied)

    @property
    def percent(self) -> float:
        return 100.0 * self.occupied.float().mean().item()


def hyperplanes(bits: int, dim: int, draws: torch.Generator) -> Tensor:
    """Normals (bits, dim) of random hyperplanes through the origin."""
    return torch.randn(bits, dim, generator=draws)


@dataclass
class Buckets(Defence):
    """Bucks for Buckets (B4B; Dubinski et al., NeurIPS 2023): adds N(0, sigma(o)^2), o the account's coverage in %.

    sigma(o) = lambda (exp(ln(alpha / lambda) o / beta) - 1): almost 0 while an account has visited few of the 2^bits
    buckets, about alpha once it has visited beta percent of them. Coverage is updated after each query, so answers do
    not depend on how a stream is split into calls.
    """

    bucket_bits: int = setting(12, "hyperplanes that hash representations into 2^N buckets", at_least=1, at_most=24)
    bucket_lambda: float = setting(1e-6, "lambda in B4B's formula: scale of buckets' noise at low coverage", above=0)
    bucket_alpha: float = setting(0.8, "standard deviation of buckets' noise at a coverage of beta", above=0)
    bucket_beta: float = setting(80.0, "coverage in percent at which buckets' noise is alpha", above=0, at_most=100)
    remembers = True
    _coverage: dict[str, Coverage] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        super().__post_init__()
        if self.bucket_alpha <= self.bucket_lambda:
            raise UserError(
                f"--bucket-alpha {self.bucket_alpha} is not above --bucket-lambda {self.bucket_lambda}: raise it"
            )

    def sigma(self, coverage: Tensor) -> Tensor:
        """Standard deviation of the noise at a coverage in percent."""
        growth = math.log(self.bucket_alpha / self.bucket_lambda) / self.bucket_beta
        return (self.bucket_lambda * torch.expm1(growth * coverage)).clamp_max(LARGEST)

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        h = call.representations
        if call.account not in self._coverage:
            normals = hyperplanes(self.bucket_bits, h.shape[1], generator(self.secret, "buckets"))
            self._coverage[call.account] = Coverage(normals.to(h.device))
        sigma = self.sigma(self._coverage[call.account].add(h))
        return answers + sigma[:, None] * self.normal(call, answers.shape[1])

    def coverage(self, account: str = "default") -> float:
        """Percentage of the buckets that the account has visited."""
        return self._coverage[account].percent if account in self._coverage else 0.0

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """Largest coverage of any account in percent, and the current standard deviation of its noise."""
        coverage = max(map(self.coverage, sources), default=0.0)
        return {"coverage": coverage, "sigma": self.sigma(torch.tensor(coverage)).item()}
