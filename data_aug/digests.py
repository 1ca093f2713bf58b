"""Which image is it: a digest of the exact pixels, and a perceptual hash that near-copies mostly share."""

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_aug.datasets import to_float

SIDE = 8  # pixels of the grey thumbnail's side
LOW = 5  # lowest frequencies in each direction; the very lowest, the mean, is left out
HASH_BYTES = (LOW**2 - 1) // 8
# Whole numbers, so that sums are exact and a hash depends neither on the batch nor on the device.
_COSINES = torch.tensor(
    [[round(1024 * math.cos(math.pi * k * (2 * i + 1) / (2 * SIDE))) for i in range(SIDE)] for k in range(LOW)],
    dtype=torch.float64,
)


def image_digests(images: Tensor) -> list[bytes]:
    """A 16-byte digest for each image (N, 3, H, W): equal for equal pixels, whether uint8 or float in [0, 1]."""
    rows = to_float(images).cpu().contiguous().numpy()
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]


def digest_tensor(images: Tensor) -> Tensor:
    """`image_digests` as uint8 (N, 16), as checkpoints keep them: so an evaluation knows which images were queried."""
    return pack_digests(image_digests(images))


def perceptual_hashes(images: Tensor) -> Tensor:
    """uint8 (N, 3): for each image (N, 3, H, W), uint8 or float in [0, 1], the signs of 24 frequencies, a bit each.

    They are the lowest of the cosine transform of a grey thumbnail of 8 x 8 pixels (pHash; Zauner, 2010, compares them
    with their median). Who knows the formula can change a bit on purpose where its frequency is near 0.
    """
    levels = images if images.dtype == torch.uint8 else (images * 255).round()
    grey = levels.cpu().sum(dim=1, keepdim=True, dtype=torch.float32)
    thumbnail = (16 * F.adaptive_avg_pool2d(grey, SIDE)).round()[:, 0].double()
    frequencies = (_COSINES @ thumbnail @ _COSINES.T).flatten(1)[:, 1:]
    bits = (frequencies > 0).view(len(images), HASH_BYTES, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=2, dtype=torch.uint8)


def pack_digests(digests: Iterable[bytes], width: int = 16) -> Tensor:
    """Digests as uint8 (N, width)."""
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).copy()).view(-1, width)


def unpack_digests(digests: Tensor, width: int = 16) -> list[bytes]:
    """Digests uint8 (N, width), or as many flattened, as `image_digests` returns them."""
    return [row.tobytes() for row in digests.reshape(-1, width).numpy()]
