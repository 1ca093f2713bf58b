"""A different secret coordinate system for each account, so that accounts cannot pool the answers they bought."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from defenses.base import Call, Defence, setting
from utils import UserError, generator

Map = Callable[[Tensor], Tensor]
Draw = Callable[[int, torch.Generator], Map]  # from the width of the answers that a map takes

# By how many numbers the kinds widen answers of `dim` numbers.
WIDENING: dict[str, Callable[[int], int]] = {
    **dict.fromkeys(("pad", "add", "affine-pad-shuffle", "binary"), lambda dim: dim),
    "quarter-pad-shuffle": lambda dim: max(1, dim // 4),
}
CORRELATED = 25  # numbers of an answer of which WET makes one


def _orthogonal(dim: int, draws: torch.Generator) -> Map:
    """A random rotation or reflection: it preserves distances and angles."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=draws))
    turn = q * r.diagonal().sign()  # uniform over the orthogonal group (Mezzadri 2007)
    return lambda answers: answers @ turn.to(answers)


def _shuffle(dim: int, draws: torch.Generator) -> Map:
    order = torch.randperm(dim, generator=draws)
    return lambda answers: answers[:, order.to(answers.device)]


def _uniform(count: int, draws: torch.Generator) -> Tensor:
    """Draws (count,) from U(-1, 1)."""
    return 2 * torch.rand(count, generator=draws) - 1


def _affine(dim: int, draws: torch.Generator) -> Map:
    """A factor and an offset for each dimension, both from U(-1, 1)."""
    scale, shift = _uniform(dim, draws), _uniform(dim, draws)
    return lambda answers: answers * scale.to(answers) + shift.to(answers)


def _append(answers: Tensor, constants: Tensor) -> Tensor:
    return torch.cat([answers, constants.to(answers).expand(len(answers), -1)], dim=1)


def _pad(dim: int, draws: torch.Generator) -> Map:
    """Appends as many constants from N(0, 1) as there are dimensions, and shuffles all of them."""
    constants, shuffle = torch.randn(dim, generator=draws), _shuffle(2 * dim, draws)
    return lambda answers: shuffle(_append(answers, constants))


def _add(dim: int, draws: torch.Generator) -> Map:
    """Inserts as many constants from N(0, 1) at random places; the numbers of the answer keep their order."""
    constants = torch.randn(dim, generator=draws)
    ours = torch.randperm(2 * dim, generator=draws)[:dim].sort().values  # the places of the answer's numbers
    theirs = torch.ones(2 * dim, dtype=torch.bool)
    theirs[ours] = False
    order = torch.cat([ours, theirs.nonzero()[:, 0]]).argsort()
    return lambda answers: _append(answers, constants)[:, order.to(answers.device)]


def _affine_pad_shuffle(dim: int, draws: torch.Generator) -> Map:
    affine, pad = _affine(dim, draws), _pad(dim, draws)
    return lambda answers: pad(affine(answers))


def _binary(dim: int, draws: torch.Generator) -> Map:
    """On which side of 2 * dim random planes an answer lies, as 0 and 1. Planes go through points from N(0, 1)."""
    normals, points = torch.randn(2, dim, 2 * dim, generator=draws)
    offset = (normals * points).sum(dim=0)
    return lambda answers: (answers @ normals.to(answers) > offset.to(answers)).to(answers)


def _wet(dim: int, draws: torch.Generator) -> Map:
    """WET's circulant matrix of full rank (Shetty et al., ACL 2025): each number is a mean of some of the answer's.

    The first row has numbers from U(0, 1) at random places, divided by their sum. Its discrete Fourier transform is the
    matrix's eigenvalues; a row with a zero among them is drawn again. Answers keep the length that the map gives them.
    """
    row = torch.zeros(dim)
    while torch.fft.fft(row.double()).abs().min() < 1e-6:
        places = torch.randperm(dim, generator=draws)[:CORRELATED]
        row = torch.zeros(dim).index_copy(0, places, torch.rand(len(places), generator=draws))
        row = row / row.sum()
    matrix = torch.stack([row.roll(shift) for shift in range(dim)])
    return lambda answers: answers @ matrix.to(answers).T


# ---- variants of this project ----------------------------------------------------------------------------------------


def _mild_scale_shuffle(dim: int, draws: torch.Generator) -> Map:
    """A factor in [0.5, 2] and an offset in [-1, 1] for each dimension, and a shuffle."""
    scale, shift = 2 ** _uniform(dim, draws), _uniform(dim, draws)
    shuffle = _shuffle(dim, draws)
    return lambda answers: shuffle(answers * scale.to(answers) + shift.to(answers))


def _quarter_pad_shuffle(dim: int, draws: torch.Generator) -> Map:
    """Appends a quarter as many constants from U(0, 1), and shuffles all dimensions."""
    constants = torch.rand(WIDENING["quarter-pad-shuffle"](dim), generator=draws)
    shuffle = _shuffle(dim + len(constants), draws)
    return lambda answers: shuffle(_append(answers, constants))


def _binary_origin(dim: int, draws: torch.Generator) -> Map:
    """On which side of each of `dim` random planes through the origin an answer lies, as 0 and 1."""
    normals = torch.randn(dim, dim, generator=draws)
    return lambda answers: (answers @ normals.to(answers) > 0).to(answers)


KINDS: dict[str, Draw] = {
    "orthogonal": _orthogonal,
    "shuffle": _shuffle,
    "affine": _affine,
    "pad": _pad,
    "add": _add,
    "affine-pad-shuffle": _affine_pad_shuffle,
    "binary": _binary,
    "wet": _wet,
    "mild-scale-shuffle": _mild_scale_shuffle,
    "quarter-pad-shuffle": _quarter_pad_shuffle,
    "binary-origin": _binary_origin,
}
AFFINE = [kind for kind in KINDS if "binary" not in kind]  # the kinds that can be undone


@dataclass
class Transform(Defence):
    """Maps each account's answers by a different secret function (B4B, Dubinski et al., NeurIPS 2023, against sybils).

    affine, pad, add, affine-pad-shuffle and binary are B4B's, as its code has them. orthogonal and shuffle preserve
    distances and angles, so a user's task does not suffer; mild-scale-shuffle, quarter-pad-shuffle and binary-origin
    are variants of this project. `--defence buckets,transform` is B4B's complete defence. wet is WET's, whose map is
    evidence: `verify.py --method transform` undoes the map of an account on a suspect's representations.
    """

    transform: str = setting("orthogonal", "kind of secret map that transform draws for each account", choices=KINDS)
    _maps: dict[str, Map] = field(default_factory=dict, repr=False)

    def width(self, dim: int) -> int:
        return dim + WIDENING.get(self.transform, lambda dim: 0)(dim)

    def map_of(self, account: str, dim: int) -> Map:
        """The map of an account's answers (B, dim)."""
        return KINDS[self.transform](dim, generator(self.secret, f"transform/{account}"))

    def inverse(self, account: str, dim: int) -> Map:
        """What undoes the map of an account, by the pseudoinverse of its matrix: rows (B, width(dim)) -> (B, dim).

        UserError for a map that is not affine.
        """
        if self.transform not in AFFINE:
            raise UserError(f"--transform {self.transform} cannot be undone: choose from {', '.join(AFFINE)}")
        here = self.map_of(account, dim)
        shift = here(torch.zeros(1, dim, dtype=torch.float64))
        matrix = here(torch.eye(dim, dtype=torch.float64)) - shift
        undo = matrix.T @ torch.linalg.inv(matrix @ matrix.T)  # its rows are independent, and this needs no SVD
        return lambda rows: ((rows.cpu().double() - shift) @ undo).to(rows)

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        if call.account not in self._maps:
            self._maps[call.account] = self.map_of(call.account, answers.shape[1])
        return self._maps[call.account](answers)
