"""B4B: noise that grows with the share of the representation space that an account has explored."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from defenses.base import Call, Defence, setting
from utils import UserError, derive_seed, generator

LARGEST = 1e6  # standard deviation: far beyond beta the formula overflows
FAR = 10.0  # times alpha, from which an even sigma is said to be too much
PER_CELL = 4  # images of the owner for each k-means cell
MEAN_OF = 10_000  # images of the owner whose mean representation hyperplanes go through


# ---- cells of the representation space -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Hyperplanes:
    """2^bits cells: the sides of hyperplanes with these normals (bits, D) through a centre (D,), by default the origin.

    Called with representations (B, D) it returns the number (B,) of each one's cell.
    """

    normals: Tensor
    centre: Tensor | None = None

    @classmethod
    def draw(cls, bits: int, dim: int, draws: torch.Generator, centre: Tensor | None = None) -> "Hyperplanes":
        """Random hyperplanes."""
        return cls(torch.randn(bits, dim, generator=draws), centre)

    @property
    def count(self) -> int:
        return 2 ** len(self.normals)

    def __call__(self, representations: Tensor) -> Tensor:
        rows = representations.float()
        rows = rows if self.centre is None else rows - self.centre.to(rows)
        bits = (rows @ self.normals.to(rows).T > 0).long()
        return (bits << torch.arange(len(self.normals), device=bits.device)).sum(dim=1)


@dataclass(frozen=True, eq=False)
class Centroids:
    """A cell for each centroid (K, D): the representations that are nearer to it than to any other, by L2 distance."""

    centroids: Tensor

    @classmethod
    def fit(cls, representations: Tensor, count: int, seed: int = 0) -> "Centroids":
        """k-means of representations (M, D). UserError for fewer than `count` of them."""
        from sklearn.cluster import MiniBatchKMeans  # here: it takes a second, and few runs need it

        if len(representations) < count:
            raise UserError(
                f"--bucket-cells kmeans makes {count} centroids, and the owner has {len(representations)} images: "
                f"lower --bucket-bits to {int(math.log2(max(len(representations), 2)))}"
            )
        options = {"batch_size": max(1024, count), "init": "random", "n_init": 1, "random_state": seed % 2**32}
        fitted = MiniBatchKMeans(count, **options).fit(representations.float().cpu().numpy())
        return cls(torch.from_numpy(fitted.cluster_centers_).float())

    @property
    def count(self) -> int:
        return len(self.centroids)

    def __call__(self, representations: Tensor) -> Tensor:
        centroids = self.centroids.to(representations.device)
        # |x - c|^2 / 2 without |x|^2 / 2, which is the same for all centroids.
        return (centroids.square().sum(dim=1) / 2 - representations.float() @ centroids.T).argmin(dim=1)


class Coverage:
    """The cells that an account's representations (B, D) have fallen into."""

    def __init__(self, cells: Hyperplanes | Centroids):
        self.cells = cells
        self.occupied = torch.zeros(cells.count, dtype=torch.bool)

    def add(self, representations: Tensor) -> Tensor:
        """Add rows in order; returns the percentage of cells occupied after each row (B,), float32."""
        cell = self.cells(representations)
        self.occupied = self.occupied.to(cell.device)
        row = torch.arange(len(cell), device=cell.device)
        first = torch.full_like(self.occupied, len(row), dtype=torch.long).scatter_reduce(0, cell, row, "amin")
        new = ~self.occupied[cell] & (first[cell] == row)
        count = self.occupied.sum() + new.cumsum(0)
        self.occupied[cell] = True
        return 100.0 * count / len(self.occupied)

    @property
    def percent(self) -> float:
        return 100.0 * self.occupied.float().mean().item()


def even_coverage(queries: int, cells: int) -> float:
    """Percentage of the cells that so many queries occupy on average if all are equally likely: 1 - (1 - 1/K)^N.

    Where some cells are likelier than others it is less.
    """
    return -100.0 * math.expm1(queries * math.log1p(-1 / cells)) if cells > 1 else 100.0 * (queries > 0)


def queries_for(percent: float, cells: int) -> float:
    """How many queries occupy a percentage of the cells on average if all are equally likely; inf for 100 percent."""
    return math.log1p(-percent / 100) / math.log1p(-1 / cells) if percent < 100 else math.inf


# ---- the defence -----------------------------------------------------------------------------------------------------

# How many of the owner's own images each kind of cells is made from.
CELLS: dict[str, Callable[[int], int]] = {
    "hyperplanes": lambda cells: 0,
    "centred": lambda cells: MEAN_OF,
    "kmeans": lambda cells: PER_CELL * cells,
}


@dataclass
class Buckets(Defence):
    """Bucks for Buckets (B4B; Dubinski et al., NeurIPS 2023): adds N(0, sigma(o)^2), o the account's coverage in %.

    sigma(o) = lambda (exp(ln(alpha / lambda) o / beta) - 1): almost 0 while an account has visited few of the 2^bits
    buckets, about alpha once it has visited beta percent of them. Coverage is updated after each query, so answers do
    not depend on how a stream is split into calls. Buckets are those of hyperplanes through the origin (B4B), through
    the mean representation of the owner's images, or k-means cells of these images (after ADAGE, 2025).
    """

    bucket_bits: int = setting(12, "2^N buckets: of N hyperplanes, or of 2^N centroids", at_least=1, at_most=24)
    bucket_cells: str = setting(
        "hyperplanes",
        "buckets: random hyperplanes through the origin, or centred on the mean of the owner's own images, or k-means "
        "cells of these",
        choices=CELLS,
    )
    bucket_lambda: float = setting(1e-6, "lambda in B4B's formula: scale of buckets' noise at low coverage", above=0)
    bucket_alpha: float = setting(0.8, "standard deviation of buckets' noise at a coverage of beta", above=0)
    bucket_beta: float = setting(80.0, "coverage in percent at which buckets' noise is alpha", above=0, at_most=100)
    remembers = True
    _cells: Hyperplanes | Centroids | None = field(default=None, repr=False)
    _coverage: dict[str, Coverage] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        super().__post_init__()
        if self.bucket_alpha <= self.bucket_lambda:
            raise UserError(
                f"--bucket-alpha {self.bucket_alpha} is not above --bucket-lambda {self.bucket_lambda}: raise it"
            )

    @property
    def count(self) -> int:
        """The number of buckets."""
        return 2**self.bucket_bits

    @property
    def owner_images(self) -> int:
        return CELLS[self.bucket_cells](self.count)

    def prepare(self, representations: Tensor) -> None:
        if self.bucket_cells == "kmeans":
            self._cells = Centroids.fit(representations, self.count, derive_seed(self.secret, "buckets"))
        if self.bucket_cells == "centred":
            self._cells = self._hyperplanes(representations.shape[1], representations.float().mean(dim=0))

    def _hyperplanes(self, dim: int, centre: Tensor | None = None) -> Hyperplanes:
        return Hyperplanes.draw(self.bucket_bits, dim, generator(self.secret, "buckets"), centre)

    def sigma(self, coverage: Tensor) -> Tensor:
        """Standard deviation of the noise at a coverage in percent."""
        growth = math.log(self.bucket_alpha / self.bucket_lambda) / self.bucket_beta
        return (self.bucket_lambda * torch.expm1(growth * coverage)).clamp_max(LARGEST)

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        if self._cells is None:
            if self.owner_images:
                raise UserError(
                    f"--bucket-cells {self.bucket_cells} are made from the owner's images: call the victim's prepare()"
                )
            self._cells = self._hyperplanes(call.representations.shape[1])
        if call.account not in self._coverage:
            self._coverage[call.account] = Coverage(self._cells)
        sigma = self.sigma(self._coverage[call.account].add(call.representations))
        return answers + sigma[:, None] * self.normal(call, answers.shape[1])

    def coverage(self, account: str = "default") -> float:
        """Percentage of the buckets that the account has visited."""
        return self._coverage[account].percent if account in self._coverage else 0.0

    def _even(self, queries: int) -> tuple[float, float]:
        """`even_coverage` of so many queries, and the standard deviation of the noise there."""
        even = even_coverage(queries, self.count)
        return even, self.sigma(torch.tensor(even)).item()

    def outlook(self, queries: int) -> str:
        even, sigma = self._even(queries)
        needed = queries_for(self.bucket_beta, self.count)
        too_much = (
            ", far above alpha: answers may drown in it; raise --bucket-beta" if sigma > FAR * self.bucket_alpha else ""
        )
        takes = f"takes {math.ceil(needed):,} queries" if math.isfinite(needed) else "is never reached on average"
        return (
            f"buckets: an account with {queries:,} queries occupies {even:.1f} % of {self.count:,} buckets if all are "
            f"equally likely, less otherwise: sigma {sigma:.3g} at most (alpha {self.bucket_alpha:g} at "
            f"{self.bucket_beta:g} % {takes}){too_much}"
        )

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """Largest coverage of any account in percent, and the standard deviation of its noise.

        even_coverage and even_sigma are those that the account with the most queries would have reached on average if
        all buckets were equally likely.
        """
        coverage = max(map(self.coverage, sources), default=0.0)
        even, even_sigma = self._even(max(map(len, sources.values()), default=0))
        found = {"coverage": coverage, "sigma": self.sigma(torch.tensor(coverage)).item()}
        return {**found, "even_coverage": even, "even_sigma": even_sigma}
