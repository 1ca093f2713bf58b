"""The images on which an encoder is tested: none that its attacker is known to have queried."""

from pathlib import Path

import torch
from torch import Tensor

from data_aug.datasets import HELD_OUT, load_labelled
from data_aug.images import Pictures
from training.record import Record
from utils import UserError
from victim import image_digests


def load_test(
    name: str, root: Path, record: Record, number: int | None = None, last_thousand: bool = False
) -> tuple[Tensor, Tensor, int]:
    """Test images uint8 (N, 3, H, W), their labels (N,), and how many of the images the copy of this record queried.

    These are the last `number` images; by default all, or the last 1,000 where the others may have been queried (or
    `last_thousand`). UserError when images were queried whose use could have been avoided.
    """
    images, labels = load_labelled(name, root, "test")
    queried = record.query_set or {}
    from_test = (queried.get("dataset"), queried.get("split")) == (name, "test")
    if number is None:
        number = HELD_OUT if from_test or last_thousand else len(images)
    if number > len(images):
        raise UserError(f"--num-test {number}: the test split of {name} has {len(images)} images")
    images, labels = images[-number:], labels[-number:]
    common = count_queried(images, record.query_digests) if queried else 0
    # Some data sets have an image in both splits, which no choice here can avoid: such images are counted, not refused.
    if common and (from_test or queried["dataset"] != name):
        raise UserError(f"{common} of the {len(images)} test images were queried: lower --num-test, or test on others")
    return images, labels, common


def count_queried(images: Tensor, digests: Tensor) -> int:
    """How many of the images (N, 3, H, W) are, pixel for pixel, among those with digests uint8 (M, 16)."""
    queried = {bytes(row) for row in digests.numpy()}
    return sum(digest in queried for digest in image_digests(images))


def unqueried_positions(test: Pictures, record: Record) -> Tensor:
    """Positions of the test images that the copy of this record did not query. UserError when there are none.

    By position, for images whose views were queried: a view's pixels match no test image.
    """
    positions = torch.arange(len(test))
    queried = record.query_set or {}
    if (queried.get("dataset"), queried.get("split")) == (test.name, test.split):
        positions = positions[~torch.isin(positions, record.query_indices)]
        if not len(positions):
            raise UserError(f"all {len(test)} test images of {test.name} were queried: judge on another data set")
    return positions
