"""Pictures that compare encoders: their accuracies, and which images are neighbours in their representations."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_aug.datasets import load_dataset
from evaluation.statistics import rate_interval
from files.writing import atomic_path
from models import build_encoder, load_encoder
from training.represent import represent
from utils import seeded

COLOURS = ("tab:blue", "tab:orange", "tab:red", "tab:gray")
FRAME = 1  # white pixels around each image


def nearest_images(encoder: nn.Module, images: Tensor, queries: int = 5, shown: int = 6) -> Tensor:
    """Indices (queries, shown) of the images nearest by cosine to each of the first `queries`, which comes first."""
    h = F.normalize(represent(encoder, images), dim=1)
    return (h[:queries] @ h.T).topk(shown, dim=1).indices


def neighbour_picture(rows: Sequence[Mapping], arch: str, path: Path) -> None:
    """A bar chart of the accuracies in `rows`, and for each encoder five test images of shapes with their nearest five.

    A row without a checkpoint stands for an untrained encoder of this architecture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    images = load_dataset("shapes", split="test")[0][-1000:]
    figure, axes = pyplot.subplots(1, 1 + len(rows), figsize=(16, 4), layout="constrained")
    values = [row["top1_converged"] for row in rows]
    ends = 100 * np.array([rate_interval(round(value / 100 * len(images)), len(images)) for value in values])
    bars = axes[0].barh(range(len(rows)), values, xerr=abs(ends.T - values), color=COLOURS[: len(rows)])
    axes[0].bar_label(bars, fmt="%.1f", padding=3)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 1.2 * max(values))
    axes[0].set_xlabel(f"accuracy (%), converged linear probe\n{len(images):,} test images, 95 % intervals")
    for axis, row in zip(axes[1:], rows, strict=True):
        with seeded(0):
            encoder = load_encoder(row["checkpoint"]) if row["checkpoint"] else build_encoder(arch)
        strip = images[nearest_images(encoder, images)]  # (queries, shown, 3, 32, 32)
        strip = F.pad(strip, [FRAME] * 4, value=255).permute(0, 3, 1, 4, 2)
        side = images.shape[-1] + 2 * FRAME
        axis.imshow(strip.reshape(strip.shape[0] * side, -1, 3).numpy())
        axis.axvline(side - 0.5, color="black", linewidth=2)
        axis.set_title(f"{row['name']}\nimage | its nearest five", fontsize=10)
        axis.axis("off")
    with torch.no_grad(), atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
