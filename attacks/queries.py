"""Which images an attacker queries, and which views of them it sends."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attacks import CSE, Attack
from data_aug.augment import random_views
from data_aug.datasets import DATASET_NAMES, check_name, load_queries, same_source, unlabelled_split
from data_aug.images import VIEWS, Stored, Streamed, Views, open_pictures
from data_aug.recipes import VIEW_RECIPES
from data_aug.sizes import SIZE, source_size
from settings import Command, Settings, setting
from training.record import Record, named_size
from utils import UserError, generator


def _on_another_data_set(command: Command) -> str | None:
    # Which data set the victim is of may only be known when its file has been read.
    if "dataset" not in command.settled or same_source(command.dataset, command.datasetsteal):
        return None
    return f"on another data set than {command.dataset}"


def _without_own_space(command: Command) -> str | None:
    # Not every script has all of these flags.
    compares = getattr(command, "max_coverage", None) is not None or getattr(command, "restore", None) == CSE
    if compares or command.query_order == "k-centre":
        return None
    return f"without --query-order k-centre, --max-coverage and --restore {CSE}"


@dataclass(frozen=True)
class QueryChoice(Settings):
    """Which images are queried, and the budget."""

    datasetsteal: str = setting(
        "cifar10",
        f"data set that the queries are from: {DATASET_NAMES}",
        read=check_name,
        flags=("-datasetsteal", "--datasetsteal"),
        title="data",
    )
    num_queries: int = setting(
        9000, "budget of the whole attack, in queries", at_least=1, flags=("--num_queries",), title="attack"
    )
    query_order: str = setting(
        "first",
        "query the first images, random images (by the seed), or k centres, far from each other in --query-space",
        choices=("first", "random", "k-centre"),
        title="attack",
    )
    query_space: Path | None = setting(
        None,
        "the attacker's own encoder, by which k-centre and --max-coverage choose and --restore cse compares: "
        "checkpoint, run folder or run name (default: the untrained copy)",
        title="attack",
        acts=_without_own_space,
    )
    force: bool = setting(
        False,
        "query the train split of the victim's training data too",
        title="attack",
        acts=_on_another_data_set,
    )
    title = "attack"


def choose_queries(
    choice: QueryChoice,
    victim_dataset: str,
    root: Path,
    count: int,
    seed: int = 0,
    everything: bool = False,
    features: Callable[[Tensor], Tensor] | None = None,
    size: int = SIZE,
    wide: bool = False,
) -> tuple[Stored, Tensor, Record]:
    """The attacker's images (N), their labels (N,), and the record of where they are from.

    The images come from `data_aug.datasets.load_queries`: `count` of them, in the order chosen. With `everything` they
    are all images, for an attacker who chooses among them. features: uint8 images (M, 3, H, W) -> (M, D), the space of
    k-centre. size: side of the images, and of their views. wide: as in `source_size`. UserError for fewer than `count`
    images.
    """
    source = source_size(choice.datasetsteal, size, wide)
    images, labels, split = load_queries(choice.datasetsteal, victim_dataset, root, choice.force, source)
    if count > len(images):
        raise UserError(
            f"this budget takes {count} images, the {split} split of {choice.datasetsteal} has {len(images)} to query: "
            f"lower --num_queries"
        )
    count = len(images) if everything else count
    if choice.query_order == "k-centre":
        indices = k_centres(features(images), count, seed)
    else:
        indices = query_order(choice.query_order, len(images), count, seed)
    asked = {"dataset": choice.datasetsteal, "split": split, "images": count, "available": len(images)}
    record = Record(query_set={**asked, **named_size(size)}, query_indices=indices)
    return Stored(images[indices], size), labels[indices], record


@dataclass(frozen=True)
class PictureChoice(Settings):
    """For images of any size: which split is queried, and which view of each image."""

    useval: bool = setting(False, "query the validation (or test) split instead of the training split")
    query_view: str = setting(
        "crop",
        "view that is sent: a random resized crop with a random flip, or the centre",
        choices=VIEWS,
    )
    title = "attack"


def choose_pictures(
    choice: QueryChoice, which: PictureChoice, root: Path, size: int, workers: int, seed: int
) -> tuple[Streamed, Tensor, Record]:
    """As `choose_queries` for images of any size: views of size x size pixels, read when they are needed."""
    split = "test" if which.useval else unlabelled_split(choice.datasetsteal)
    pictures = open_pictures(choice.datasetsteal, root, split)
    count = choice.num_queries
    if count > len(pictures):
        raise UserError(
            f"this budget takes {count} images, the {split} split of {choice.datasetsteal} has {len(pictures)}: "
            f"lower --num_queries"
        )
    # Sorted, so that the files are read in their order.
    positions = query_order(choice.query_order, len(pictures), count, seed).sort().values
    record = Record(
        query_set={"dataset": choice.datasetsteal, "split": split, "images": count}, query_indices=positions
    )
    return (
        Streamed(Views(pictures, which.query_view, size, seed), positions, workers),
        pictures.labels[positions],
        record,
    )


def query_order(order: str, total: int, count: int, seed: int) -> Tensor:
    """Indices (count,) of the `first` images, or of `random` images, among `total`."""
    if order == "random":
        return torch.randperm(total, generator=generator(seed, "query order"))[:count]
    return torch.arange(count)


def k_centres(features: Tensor, count: int, seed: int = 0) -> Tensor:
    """Indices (count,) of k centres of features (N, D), in the order in which they are chosen.

    The greedy algorithm (Gonzalez, 1985; Sener & Savarese, ICLR 2018): the seed draws the first centre, and each next
    centre is the point that is farthest, by Euclidean distance, from all centres so far.
    """
    centre = torch.randint(len(features), (1,), generator=generator(seed, "query order")).to(features.device)
    norms = features.square().sum(dim=1)
    nearest = torch.full_like(norms, torch.inf)
    centres = torch.empty(count, dtype=torch.int64, device=features.device)
    for place in range(count):
        centres[place] = centre[0]
        distance = norms + norms[centre] - 2 * (features @ features[centre[0]])
        nearest = torch.minimum(nearest, distance)
        nearest[centre] = -torch.inf  # nor is a copy of a centre, at distance 0, taken for that centre again
        centre = nearest.argmax(keepdim=True)
    return centres.cpu()


def queries_sent(images: Stored, attack: Attack, draws: torch.Generator) -> Stored:
    """The n_views * N images that are sent, view-major, in 8 bits as an API takes them."""
    if not attack.sends_views:
        return Stored(images.tensor.repeat(attack.n_views, 1, 1, 1)) if attack.n_views > 1 else images
    sent, recipe = [], VIEW_RECIPES[attack.query_views]
    for _ in range(attack.n_views):
        for part in images.tensor.split(1024):
            sent.append((random_views(part, images.view_side, draws, recipe) * 255).round().to(torch.uint8))
    return Stored(torch.cat(sent))
