"""A different secret coordinate system for each account, so that accounts cannot pool the answers they bought."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from defenses.base import Call, Defence, setting
from utils import generator

Map = Callable[[Tensor], Tensor]
PADDING = 0.25  # share of an answer's width that `pad-shuffle` adds


def _orthogonal(dim: int, draws: torch.Generator) -> Map:
    """A random rotation or reflection: it preserves distances and angles."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=draws))
    turn = q * r.diagonal().sign()  # uniform over the orthogonal group (Mezzadri 2007)
    return lambda answers: answers @ turn.to(answers)


def _shuffle(dim: int, draws: torch.Generator) -> Map:
    order = torch.randperm(dim, generator=draws)
    return lambda answers: answers[:, order.to(answers.device)]


def _scale_shuffle(dim: int, draws: torch.Generator) -> Map:
    """Scales each dimension by a factor in [0.5, 2], adds an offset in [-1, 1], and shuffles the dimensions."""
    scale = 2 ** (2 * torch.rand(dim, generator=draws) - 1)
    shift = 2 * torch.rand(dim, generator=draws) - 1
    shuffle = _shuffle(dim, draws)
    return lambda answers: shuffle(answers * scale.to(answers) + shift.to(answers))


def _padding(dim: int) -> int:
    return max(1, int(PADDING * dim))


def _pad_shuffle(dim: int, draws: torch.Generator) -> Map:
    """Appends constants between 0 and 1 as further dimensions, and shuffles all dimensions."""
    constants = torch.rand(_padding(dim), generator=draws)
    shuffle = _shuffle(dim + len(constants), draws)
    return lambda answers: shuffle(torch.cat([answers, constants.to(answers).expand(len(answers), -1)], dim=1))


def _binary(dim: int, draws: torch.Generator) -> Map:
    """On which side of each of `dim` random hyperplanes an answer lies, as 0 and 1."""
    normals = torch.randn(dim, dim, generator=draws)
    return lambda answers: (answers @ normals.to(answers) > 0).to(answers)


KINDS = {
    "orthogonal": _orthogonal,
    "shuffle": _shuffle,
    "scale-shuffle": _scale_shuffle,
    "pad-shuffle": _pad_shuffle,
    "binary": _binary,
}


@dataclass
class Transform(Defence):
    """Maps each account's answers by a different secret function (B4B, Dubinski et al., NeurIPS 2023, against sybils).

    orthogonal and shuffle preserve distances and angles, so a user's task does not suffer; scale-shuffle, pad-shuffle
    and binary are B4B's. `--defence buckets,transform` is B4B's complete defence.
    """

    transform: str = setting("orthogonal", "kind of secret map that transform draws for each account", choices=KINDS)
    _maps: dict[str, Map] = field(default_factory=dict, repr=False)

    def width(self, dim: int) -> int:
        return dim + _padding(dim) if self.transform == "pad-shuffle" else dim

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        if call.account not in self._maps:
            draws = generator(self.secret, f"transform/{call.account}")
            self._maps[call.account] = KINDS[self.transform](answers.shape[1], draws)
        return self._maps[call.account](answers)
