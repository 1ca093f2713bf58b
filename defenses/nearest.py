"""The exact distance of a query to the nearest earlier query of its account, over a memory of the last queries."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512  # vectors compared at a time: the matrix of pairs stays small, however large a call is


class Memory:
    """The last `size` vectors of an account, normalised to length 1."""

    def __init__(self, size: int):
        self.size = size
        self._rows: Tensor | None = None

    def nearest(self, vectors: Tensor) -> Tensor:
        """Add vectors (B, P) in order; returns the distance of each to the nearest of the `size` vectors before it.

        Cosine distances 1 - cos (B,), float32, from 0 for a repeated vector to 2; inf for the very first vector.
        Earlier vectors of the same call count too, so distances do not depend on how a stream is split into calls.
        """
        new = F.normalize(vectors.float(), dim=1)
        return torch.cat([self._enter(block) for block in new.split(BLOCK)]) if len(new) else new.new_empty(0)

    def _enter(self, new: Tensor) -> Tensor:
        seen = new[:0] if self._rows is None else self._rows
        rows = torch.cat([seen, new])
        # Each row is compared with the `size` rows before it: a band of the product with all rows.
        position = torch.arange(len(rows), device=new.device)
        age = position[len(seen) :, None] - position
        cosine, nearest = (new @ rows.T).masked_fill_((age < 1) | (age > self.size), -torch.inf).max(dim=1)
        self._rows = rows[-self.size :]
        # For unit vectors |u - v|^2 / 2 is 1 - cos, but exactly 0 for equal vectors, where 1 - cos is off by rounding.
        distance = (new - rows[nearest]).square().sum(dim=1) / 2
        return distance.masked_fill_(cosine == -torch.inf, torch.inf)


def nearest_distances(vectors: Tensor, size: int = 10_000) -> Tensor:
    """`Memory.nearest` of a whole stream of vectors (N, P) -> (N,); the first is inf."""
    return Memory(size).nearest(vectors)
