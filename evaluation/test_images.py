"""The images on which an encoder is tested: none that its attacker is known to have queried."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from data_aug.datasets import canonical_name, held_out, load_labelled
from data_aug.images import Pictures
from data_aug.sizes import SIZE
from training.record import Record
from utils import UserError
from victim import image_digests


def load_test(
    name: str,
    root: str | Path,
    *records: Record,
    number: int | None = None,
    last_thousand: bool = False,
    size: int = SIZE,
) -> tuple[Tensor, Tensor, int]:
    """Test images uint8 (N, 3, size, size), their labels (N,), and how many were left out, because they were queried.

    records: what the copies under test queried. The images are the last `number`; by default all, or those that
    `held_out` keeps, where others of this split were queried (or with `last_thousand`). An image that equals a queried
    one, both in the size that was queried, is left out. UserError where none is left, or where `number` reaches back to
    images of this split that were queried.
    """
    images, labels = load_labelled(name, root, "test", size)
    count, sizes = len(images), {record.size for record in records if record.query_digests is not None}
    seen = {side: images if side == size else load_labelled(name, root, "test", side)[0] for side in sizes}
    of_this_split = [record for record in records if _queried_of(record, name, "test", Path(root))]
    if number is None:
        last = held_out(count) if of_this_split or last_thousand else count
    elif number <= count:
        last = number
        for record in of_this_split:
            _check_reach(seen.get(record.size, images), record, number)
    else:
        raise UserError(f"--num-test {number}: the test split of {name} has {count} images")
    images, labels = images[-last:], labels[-last:]
    fresh = torch.ones(last, dtype=torch.bool)
    for side, sent in seen.items():
        fresh &= ~are_queried(sent[-last:], *(record.query_digests for record in records if record.size == side))
    if not fresh.any():
        raise UserError(f"all {last} test images of {name} were queried: test on another data set")
    return images[fresh], labels[fresh], last - int(fresh.sum())


def _queried_of(record: Record, name: str, split: str, root: Path | None = None) -> bool:
    """Whether a copy's queries are from this split of this data set, however its name is spelled."""
    queried = record.query_set or {}
    return queried.get("split") == split and canonical_name(queried["dataset"], root) == canonical_name(name, root)


def _check_reach(images: Tensor, record: Record, number: int) -> None:
    """UserError where the last `number` of a split's images have some that were queried by their position there."""
    queried = record.query_indices
    if queried is None:
        queried = are_queried(images, record.query_digests).nonzero()[:, 0]
    queried = queried[queried < len(images)]
    common = int((queried.unique() >= len(images) - number).sum())
    if common:
        free = len(images) - 1 - int(queried.max())
        remedy = f"give --num-test {free} or less" if free else "test on another data set"
        raise UserError(f"{common} of the {number} test images were queried: {remedy}")


def are_queried(images: Tensor, *digests: Tensor | None) -> Tensor:
    """Which of the images (N, 3, H, W) are, pixel for pixel, among those with digests uint8 (M, 16): bool (N,)."""
    queried = {bytes(row) for rows in digests if rows is not None for row in rows.numpy()}
    if not queried:
        return torch.zeros(len(images), dtype=torch.bool)
    return torch.tensor([digest in queried for digest in image_digests(images)], dtype=torch.bool)


def count_queried(images: Tensor, digests: Tensor) -> int:
    """How many images `are_queried`."""
    return int(are_queried(images, digests).sum())


def set_digest(images: Tensor) -> str:
    """The digest of images (N, 3, H, W) in their order: scores of the same test images can be paired."""
    return hashlib.sha256(b"".join(image_digests(images))).hexdigest()[:16]


def unqueried_positions(test: Pictures, record: Record, root: Path | None = None) -> Tensor:
    """Positions of the test images that the copy of this record did not query. UserError when there are none.

    By position, for images whose views were queried: a view's pixels match no test image.
    """
    positions = torch.arange(len(test))
    if record.query_indices is not None and _queried_of(record, test.name, test.split, root):
        positions = positions[~torch.isin(positions, record.query_indices)]
        if not len(positions):
            raise UserError(f"all {len(test)} test images of {test.name} were queried: test on another data set")
    return positions
