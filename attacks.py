"""What an attacker sends, what the copy is shown and what it has to match; published attacks as presets of these.

An attack asks about N images, with V queries for each: the image itself, or V random views of it (`queryaug`). What the
copy is shown in a step is what was sent, or with `useaug` fresh random views of its own (`copy_views` of them), which
cost nothing. Its target is the answer to the same query or, where one answer stands for the image, that answer: with
one query an image, or with `prototype`, the mean of the V answers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_aug.augment import random_views, send
from data_aug.datasets import load_queries, to_float
from data_aug.pictures import Views, stream
from distributed import Part, share
from utils import UserError, generator

# Values of steal.py's flags where the command line gives none; a loss's own presets come after these.
ATTACKS: dict[str, Mapping[str, object]] = {
    # Dziedzic et al., ICML 2022: train on the answers by any loss.
    "direct": {},
    # Sha et al., CVPR 2023, the baseline: match the answers by their squared error.
    "conventional": {"losstype": "mse", "lr": 3e-4, "archstolen": "resnet18"},
    # Sha et al., CVPR 2023: one random view to the victim, another to the copy.
    "cont-steal": {
        "losstype": "contsteal",
        "queryaug": True,
        "useaug": True,
        "temperature": 0.5,
        "archstolen": "resnet18",
    },
    # Liu et al., CCS 2022: one query an image; the copy's features of it and of its augmentations match the answer.
    "stolenencoder": {"losstype": "stolenencoder", "useaug": True, "copy_views": 9, "archstolen": "resnet34"},
    # Wu et al., ECCV 2024: the mean answer to ten views of an image is what five views of it have to match.
    "rda": {
        "losstype": "rda",
        "n_views": 10,
        "queryaug": True,
        "prototype": True,
        "useaug": True,
        "copy_views": 5,
        "num_queries": 25000,
        "archstolen": "resnet18",
    },
}


@dataclass(frozen=True)
class Plan:
    """How an attack asks and shows; the fields are those of `simclr.Training`, `plain_first` is the loss's."""

    n_views: int = 1
    queryaug: bool = False
    useaug: bool = False
    copy_views: int = 1
    prototype: bool = False
    plain_first: bool = False
    # Attackers who adapt (adaptive.py): ask each query so many times, undo what answers show, ask at most `budget`
    # images in few buckets, or as so many accounts which share so many queries.
    repeat: int = 1
    restore: bool = False
    max_coverage: float | None = None
    budget: int = 0
    sybils: int = 1
    shared: int = 0

    @property
    def views(self) -> int:
        """Rows of one image in a batch."""
        return self.copy_views + self.plain_first if self.useaug else self.n_views

    @property
    def mismatch(self) -> str | None:
        """What is wrong where rows and answers cannot be paired; None where they can."""
        one_answer = self.n_views == 1 or (self.prototype and self.useaug)
        if self.plain_first and not one_answer:
            return f"this loss has one answer for an image and its augmentations, not {self.n_views}: give --n-views 1"
        if self.useaug and not one_answer and self.copy_views != self.n_views:
            return (
                f"{self.copy_views} views for the copy cannot be paired with {self.n_views} answers: give --copy-views "
                f"{self.n_views}, or --prototype for the mean answer"
            )
        return None


@dataclass(frozen=True)
class QuerySet:
    """An attacker's images, uint8 (N, 3, H, W) or streamed, their labels and indices (N,) in the split they are of."""

    images: "Tensor | Streamed"
    labels: Tensor
    indices: Tensor
    dataset: str
    split: str

    def record(self) -> dict:
        """What a checkpoint says of it."""
        query_set = {"dataset": self.dataset, "split": self.split, "images": len(self.images)}
        return {"query_set": query_set, "query_indices": self.indices}


def choose_queries(
    dataset: str,
    victim_dataset: str,
    root: Path,
    count: int,
    order: str = "first",
    seed: int = 0,
    force: bool = False,
    choice: bool = False,
) -> QuerySet:
    """So many images to query: the `first`, or `random` ones drawn by the seed. UserError when there are not as many.

    An attacker with a `choice` gets all images that there are, if there are as many. The split is that of
    `data_aug.datasets.load_queries`.
    """
    images, labels, split = load_queries(dataset, victim_dataset, root, force)
    if count > len(images):
        raise UserError(
            f"this budget takes {count} images, the {split} split of {dataset} has {len(images)} to query: "
            f"lower --num_queries"
        )
    count = len(images) if choice else count
    indices = torch.arange(count)
    if order == "random":
        indices = torch.randperm(len(images), generator=generator(seed, "query order"))[:count]
    return QuerySet(images[indices], labels[indices], indices, dataset, split)


def queries_of(images: Tensor, plan: Plan, draws: torch.Generator) -> Tensor:
    """What the victim is sent, uint8 (n_views * N, 3, H, W), view-major: an API takes images of 8 bits."""
    if not plan.queryaug:
        return images.repeat(plan.n_views, 1, 1, 1) if plan.n_views > 1 else images
    sent = []
    for _ in range(plan.n_views):
        for part in images.split(1024):
            sent.append((random_views(part, part.shape[-1], draws) * 255).round().to(torch.uint8))
    return torch.cat(sent)


@dataclass
class Answered:
    """What an attacker holds: images (N, 3, H, W) and what was sent (V * N, 3, H, W), uint8; the answers (V * N, D).

    `index` (N,) are the images' positions in what the attacker had to choose from, if it chose.
    """

    images: Tensor
    sent: Tensor
    answers: Tensor
    plan: Plan
    index: Tensor | None = None

    def __post_init__(self):
        if self.plan.prototype:
            mean = self.answers.view(self.plan.n_views, len(self.images), -1).mean(dim=0)
            # One answer for each image from here on, whichever of its views is shown.
            self.answers = mean if self.plan.useaug else mean.repeat(self.plan.n_views, 1)

    def load(self, batches: Sequence[Tensor], epoch: int) -> Iterable[Tensor]:
        """What `batch` takes for each of the batches of indices (B,)."""
        return batches

    def batch(self, index: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A step's data for the images at `index` (B,), a job's whole batch.

        -> the index, what the copy is shown, float, this process's part of (R * B, 3, H, W), and the targets of all
        rows (R * B, D).
        """
        count = len(self.images)
        rows = torch.cat([index + view * count for view in range(len(self.answers) // count)])
        targets = self.answers[rows]
        if not self.plan.useaug:
            part = Part.of(len(index), self.plan.n_views, index.device)
            return index, to_float(self.sent[rows[part.own]]), targets
        own = self.images[index[share(len(index))]]
        return index, *augmented(own, targets, len(index), self.plan, draws)


def augmented(own: Tensor, targets: Tensor, count: int, plan: Plan, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random views of this process's uint8 images (b, 3, H, W) of a batch of `count`, and the targets of all rows."""
    part = Part.of(count, plan.copy_views, own.device)
    shown = random_views(own.repeat(plan.copy_views, 1, 1, 1), own.shape[-1], draws, part)
    if plan.plain_first:
        shown = torch.cat([to_float(own), shown])
    return shown, targets.repeat(plan.views * count // len(targets), 1)


@dataclass
class Streamed:
    """Images that are read when they are needed: a view of each of those at `positions` (N,) of a set of pictures."""

    views: Views
    positions: Tensor
    workers: int

    def __len__(self) -> int:
        return len(self.positions)

    def parts(self, parts: Sequence[slice | Tensor], device: torch.device, epoch: int = 0) -> Iterator[Tensor]:
        """uint8 (B, 3, S, S) on the device for each of the parts of what there is; views may differ between epochs."""
        positions = (self.positions[part].tolist() for part in parts)
        items = [[(position, epoch) for position in batch] for batch in positions]
        return stream(self.views, items, self.workers, device)

    def shares(
        self, batches: Sequence[Tensor], device: torch.device, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of indices (B,), on the CPU, each with this process's share of their images."""
        batches = [batch.cpu() for batch in batches]  # all at once: the steps need not wait for the device
        own = [batch[share(len(batch))] for batch in batches]
        return zip(batches, self.parts(own, device, epoch), strict=True)


@dataclass
class StreamedAnswers:
    """As `Answered` for images that are streamed: one query each, whose answers (N, D) lie in a file."""

    queries: Streamed
    answers: np.ndarray
    plan: Plan
    index: Tensor
    device: torch.device

    def load(self, batches: Sequence[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What `batch` takes for each of the batches of indices (B,): that, and this process's images of it.

        The victim was sent one view, so the views are those of epoch 0 in all epochs.
        """
        return self.queries.shares(batches, self.device)

    def batch(self, item: tuple[Tensor, Tensor], draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """As `Answered.batch`."""
        index, own = item
        rows = self.answers[index.numpy()].astype(np.float32)
        targets = send(torch.from_numpy(rows), self.device)
        if not self.plan.useaug:
            return index, to_float(own), targets
        return index, *augmented(own, targets, len(index), self.plan, draws)
