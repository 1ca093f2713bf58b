"""How close a query comes to the nearest earlier one of its account: exact, over a memory of its last queries."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512  # vectors compared at a time: the table of all pairs stays small however many come in a call


class Memory:
    """The last `size` vectors of an account, brought to length 1."""

    def __init__(self, size: int):
        self.size = size
        self._rows: Tensor | None = None

    def nearest(self, vectors: Tensor) -> Tensor:
        """Enter vectors (B, P) in their order; how far each is from the nearest of the `size` before it.

        -> cosine distances 1 - cos (B,), float32, from 0 for a repeated vector to 2; inf for one that has none before
        it. A vector counts as earlier whether it came in this call or in another, so the distances do not depend on how
        a stream is cut into calls.
        """
        new = F.normalize(vectors.float(), dim=1)
        return torch.cat([self._enter(block) for block in new.split(BLOCK)]) if len(new) else new.new_empty(0)

    def _enter(self, new: Tensor) -> Tensor:
        seen = new[:0] if self._rows is None else self._rows
        rows = torch.cat([seen, new])
        # A row may look at the `size` rows before it: a band of the product with all of them.
        position = torch.arange(len(rows), device=new.device)
        age = position[len(seen) :, None] - position
        cosine, nearest = (new @ rows.T).masked_fill_((age < 1) | (age > self.size), -torch.inf).max(dim=1)
        self._rows = rows[-self.size :]
        # |u - v|^2 / 2 of unit vectors is 1 - cos, and 0 for equal ones, where 1 - cos keeps the product's rounding.
        distance = (new - rows[nearest]).square().sum(dim=1) / 2
        return distance.masked_fill_(cosine == -torch.inf, torch.inf)


def nearest_distances(vectors: Tensor, size: int = 10_000) -> Tensor:
    """`Memory.nearest` of a whole stream of vectors (N, P) -> (N,); the first is inf."""
    return Memory(size).nearest(vectors)
