"""A convolution that is fast on small maps too.

A CPU with AMX multiplies bf16 matrices in tiles of 16 rows, and a row of outputs of a 3x3 convolution fills such rows.
Maps 4 pixels wide leave three quarters of a tile empty. Here several images stand side by side in a wide map, with
columns of zeros between them, as the convolution's own padding would have it. docs/speed.md has what that gains. CPUs
without AMX have no tiles to fill: there it would cost a quarter more.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import cpu_units

SMALL = 8  # widest rows of outputs, of a single image, that are worth it
WIDE = 128  # outputs in a row of several images


class Conv2d(nn.Conv2d):
    """nn.Conv2d: images (B, C, H, W) -> maps (B, out_channels, H', W'). Its results differ in rounding only."""

    def forward(self, x: Tensor) -> Tensor:
        count = self._images_in_a_row(x)
        return convolve_side_by_side(x, self.weight, self.stride[0], count) if count > 1 else super().forward(x)

    def _images_in_a_row(self, x: Tensor) -> int:
        """How many images stand side by side: 1 where that would not be faster, or is another kind of convolution."""
        width = -(-x.shape[3] // self.stride[1])
        known = self.kernel_size == (3, 3) and self.padding == (1, 1) and "amx_bf16" in cpu_units()
        if not known or width > SMALL or x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return 1
        return math.gcd(len(x), WIDE // width)


def convolve_side_by_side(x: Tensor, weight: Tensor, stride: int, count: int) -> Tensor:
    """A 3x3 convolution with padding 1 of images (B, C, H, W), `count` of them side by side; count divides B.

    weight (D, C, 3, 3) -> (B, D, H', W').
    """
    width = x.shape[3]
    gap = stride - width % stride  # so that the next image begins where an output begins
    rows = x.permute(0, 2, 3, 1).unflatten(0, (-1, count)).transpose(1, 2)  # (B / count, H, count, W, C)
    wide = F.pad(rows, (0, 0, 0, gap)).flatten(2, 3).permute(0, 3, 1, 2)
    out = F.conv2d(wide, weight, stride=stride, padding=1).permute(0, 2, 3, 1)
    out = out.unflatten(2, (count, -1))[:, :, :, : -(-width // stride)]  # without the outputs between two images
    return out.transpose(1, 2).flatten(0, 1).contiguous().permute(0, 3, 1, 2)
