"""Which image is it: a digest of the exact pixels, and a perceptual hash that near-copies mostly share."""

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_aug.datasets import to_float
from utils import generator

SIDE = 8  # pixels of the grey thumbnail's side
LOW = 5  # lowest frequencies in each direction; the highest of the pairs is left out
HASH_BYTES = (LOW**2 - 1) // 8
# In grey levels of the thumbnail, sixteenths of the sum of three channels; frequencies of natural images deviate by
# 4,000 to 50,000, those of near-copies of up to 16 levels by 300.
AWAY = (500, 2000)  # how far the thresholds of frequencies are from 0
MEAN = SIDE**2 * 16 * 3 * 255  # the mean's frequency of a white image
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


def _thresholds(secret: int | None) -> Tensor:
    """What each of 24 frequencies is compared with, (24,) float64: drawn by the secret, or for None known to everybody.

    None is near 0, where many frequencies of mirrored and of constant images are; none is a whole number, so that no
    frequency is equal to its threshold. The mean's is in the middle half of its range.
    """
    draws = generator(secret or 0, "public hash" if secret is None else "hash")
    away, signs, middle = torch.rand(3, 8 * HASH_BYTES, dtype=torch.float64, generator=draws)
    thresholds = (AWAY[0] + (AWAY[1] - AWAY[0]) * away) * (signs - 0.5).sign()
    thresholds[0] = MEAN * (1 + 2 * middle[0]) / 4
    return thresholds.floor() + 0.5


def perceptual_hashes(images: Tensor, secret: int | None = None) -> Tensor:
    """uint8 (N, 3): for each image (N, 3, H, W), uint8 or float in [0, 1], which of 24 frequencies exceed thresholds.

    They are the lowest of the cosine transform of a grey thumbnail of 8 x 8 pixels (pHash; Zauner, 2010, compares them
    with their median), the mean included. Who knows the thresholds can change a bit on purpose where its frequency is
    near: those that are drawn by an owner's secret, only the owner knows.
    """
    levels = images if images.dtype == torch.uint8 else (images * 255).round()
    grey = levels.cpu().sum(dim=1, keepdim=True, dtype=torch.float32)
    thumbnail = (16 * F.adaptive_avg_pool2d(grey, SIDE)).round()[:, 0].double()
    frequencies = (_COSINES @ thumbnail @ _COSINES.T).flatten(1)[:, :-1]
    bits = (frequencies > 1024**2 * _thresholds(secret)).view(len(images), HASH_BYTES, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=2, dtype=torch.uint8)


def pack_digests(digests: Iterable[bytes], width: int = 16) -> Tensor:
    """Digests as uint8 (N, width)."""
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).copy()).view(-1, width)


def unpack_digests(digests: Tensor, width: int = 16) -> list[bytes]:
    """Digests uint8 (N, width), or as many flattened, as `image_digests` returns them."""
    return [row.tobytes() for row in digests.reshape(-1, width).numpy()]
