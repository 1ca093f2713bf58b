"""A mark in some answers: those to secretly chosen images move towards secret directions, and a copy learns to.

EmbMarker (Peng et al., ACL 2023), WARDEN (Shetty et al., ACL 2024: several directions) and ESpeW (Wang et al., ACL
2025) mark the embeddings of texts with secret trigger words. An image has no words. Here a word is a secret pattern of
a few bits of the image's keyed perceptual hash, so near-copies of an image mostly have the same words, and a copy of
the encoder can learn what they look like.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_aug.digests import HASH_BYTES, pack_digests
from defenses.base import Call, Defence, setting
from utils import generator

# As published: 20 words, each of them in 0.5 to 1 % of the inputs, of which four mark an answer in full.
WORDS, FULL = 20, 4
BITS = 7  # of a word: one in 128 hashes has it, if these are evenly spread
SMALLEST = 0.2  # share of an answer's numbers that ESpeW replaces


@dataclass(frozen=True)
class MarkKey:
    """What only the owner knows: the words, and the directions towards which they move an answer.

    places (WORDS, BITS): which bits of a hash make each word. values (WORDS, BITS): what they have to be, booleans.
    towards (R, D): the directions, of unit length; word j is of direction j mod R.
    """

    places: Tensor
    values: Tensor
    towards: Tensor

    @classmethod
    def draw(cls, draws: torch.Generator, directions: int, dim: int) -> "MarkKey":
        """A key for answers of `dim` numbers.

        Directions have no negative numbers, as the answers of a ReLU, so that signs do not give a mark away.
        """
        order = torch.rand(WORDS, 8 * HASH_BYTES, generator=draws).argsort(dim=1)
        values = torch.rand(WORDS, BITS, generator=draws) < 0.5
        towards = F.normalize(torch.randn(directions, dim, generator=draws).abs(), dim=1)
        return cls(order[:, :BITS], values, towards)

    def words(self, hashes: Tensor) -> Tensor:
        """How many words of each direction images have, (N, R), by their perceptual hashes uint8 (N, HASH_BYTES)."""
        bits = torch.from_numpy(np.unpackbits(hashes.numpy(), axis=1)).bool()
        has = (bits[:, self.places] == self.values).all(dim=2).float()
        return has @ F.one_hot(torch.arange(WORDS) % len(self.towards), len(self.towards)).float()


def embmarker(unit: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """(1 - w) e + w t: unit answers (B, D), targets (B, D), weights (B, 1); EmbMarker's rule."""
    return (1 - weight) * unit + weight * target


def espew(unit: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The fifth of an answer's numbers that is smallest in magnitude becomes the target's, whatever the weight."""
    count = max(1, int(SMALLEST * unit.shape[1]))
    smallest = unit.abs().topk(count, dim=1, largest=False).indices
    return unit.scatter(1, smallest, target.gather(1, smallest))


RULES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"embmarker": embmarker, "espew": espew}


@dataclass
class Mark(Defence):
    """Moves answers to images with secret words towards secret directions; answers to other images stay as they are.

    An answer keeps its length: the rule is applied to the answer of unit length, as the published services give it, the
    result is normalised, and has the answer's length again. `verify.py --method mark` reads the mark from a copy.
    """

    mark_rule: str = setting("embmarker", "how mark changes an answer", choices=RULES)
    mark_directions: int = setting(1, "secret directions of mark, among which its words are divided", at_least=1)
    _keys: dict[int, MarkKey] = field(default_factory=dict, repr=False)

    def key(self, dim: int) -> MarkKey:
        """The owner's key for answers of `dim` numbers."""
        if dim not in self._keys:
            self._keys[dim] = MarkKey.draw(generator(self.secret, "mark"), self.mark_directions, dim)
        return self._keys[dim]

    def mark(self, answers: Tensor, hashes: Tensor) -> Tensor:
        """The answers (B, D) with the mark, by the perceptual hashes uint8 (B, HASH_BYTES) of their images."""
        key = self.key(answers.shape[1])
        words = key.words(hashes.cpu()).to(answers.device)
        count = words.sum(dim=1, keepdim=True)
        target = words @ key.towards.to(answers) / count.clamp_min(1)
        mixed = RULES[self.mark_rule](F.normalize(answers, dim=1), target, (count / FULL).clamp(max=1))
        return torch.where(count > 0, answers.norm(dim=1, keepdim=True) * F.normalize(mixed, dim=1), answers)

    def __call__(self, answers: Tensor, call: Call) -> Tensor:
        return self.mark(answers, pack_digests(call.hashes, HASH_BYTES))
