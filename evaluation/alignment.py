"""Turning an encoder's representations into the victim's, for thieves who turn, mirror or shuffle dimensions."""

import torch
from torch import Tensor, nn

from models import SimCLREncoder


class Alignment(nn.Module):
    """A map of representations (N, D) onto a victim's (N, E), fitted to both of the same images.

    Orthogonal Procrustes (Schoenemann, Psychometrika 31, 1966): both are centred and divided by their root mean square
    length; the turn (D, E) is U V' of the singular value decomposition U S V' of their product. Where D and E differ,
    its rows or columns are orthonormal, as if the narrower set were padded with zeros. Fewer than max(D, E) images do
    not determine it.
    """

    def __init__(self, h: Tensor, victim: Tensor):
        super().__init__()
        centre, mean = h.double().mean(dim=0), victim.double().mean(dim=0)
        a, b = h.double() - centre, victim.double() - mean
        u, _, v = torch.linalg.svd(a.T @ b, full_matrices=False)
        scale = b.norm() / a.norm().clamp_min(1e-30)
        for name, value in (("centre", centre), ("mean", mean), ("turn", scale * u @ v)):
            self.register_buffer(name, value.float())

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            return (h.float() - self.centre) @ self.turn + self.mean


class Aligned(nn.Module):
    """An encoder whose representations are mapped: a stand-in wherever only `dim` and calls are needed."""

    def __init__(self, encoder: SimCLREncoder, alignment: Alignment):
        super().__init__()
        self.encoder, self.alignment, self.dim = encoder, alignment, len(alignment.mean)

    def forward(self, images: Tensor) -> Tensor:
        return self.alignment(self.encoder(images))
