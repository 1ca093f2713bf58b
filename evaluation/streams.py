"""Attackers' and users' streams of queries: who sends which images."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attacks import Attack
from attacks.adaptive import ask_within
from attacks.queries import queries_sent
from data_aug.datasets import DATASET_NAMES, check_name, load_dataset
from data_aug.images import Images, Stored
from data_aug.sizes import SIZE
from models import ARCHITECTURES, build_copy
from settings import Settings, setting
from training.represent import represent
from utils import Precision, UserError, generator, seeded

ATTACKERS = {
    "plain": "random images, each once",
    "views": "two random views of each image",
    "repeat": "each image several times",
    "sybils": "random images, spread over several accounts that share some",
    "few-buckets": "images that are predicted to fall into few buckets",
}
CHOICE = 4  # images, for each query, that attackers who stay in few buckets choose among
USERS_SHARES = (0.5, 0.75)  # of each class's images that users may get; the smallest sufficient share is taken
SHORTEST = 10  # queries of a stream: some statistics say nothing about fewer


@dataclass(frozen=True)
class Streams(Settings):
    """The streams of queries by which a detector is judged."""

    dataset: str = setting(
        "cifar10",
        f"data set whose test split attackers and users query: {DATASET_NAMES}",
        read=check_name,
        flags=("-dataset", "--dataset"),
        title="data",
    )
    streams: int = setting(50, "streams of each kind", at_least=1)
    stream_length: int = setting(500, "queries of a stream", at_least=SHORTEST)
    user_classes: int = setting(2, "classes in a user's task", at_least=1)
    dataset_users: str | None = setting(
        None, "data set whose test split further users query (default: no such users)", read=check_name
    )
    repeat: int = setting(2, "times that the attacker `repeat` sends each image", at_least=1)
    sybils: int = setting(4, "accounts of each attack by `sybils`, which share a stream's queries", at_least=2)
    prada_delta: float = setting(0.9, "W below which PRADA flags a stream", above=0, below=1)
    classifier_images: int = setting(5000, "labelled images of the owner for PRADA's classifier", at_least=1)
    title = "streams"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_users == self.dataset:
            raise UserError(f"--dataset-users {self.dataset} is the attackers' data set: give another, or leave it out")


# ---- who sends which images ------------------------------------------------------------------------------------------


def load_others(streams: Streams, root: Path, size: int = SIZE) -> Tensor | None:
    """Images (N, 3, size, size) for users of another data set, None without such users. UserError for too few."""
    if not streams.dataset_users:
        return None
    images, _ = load_dataset(streams.dataset_users, root, "test", size)
    if len(images) < streams.stream_length:
        raise UserError(
            f"the test split of {streams.dataset_users} has {len(images)} images and a user sends no image twice: "
            f"{_shorter(streams.stream_length, len(images), '--dataset-users')}"
        )
    return images


def _shorter(length: int, images: int, flag: str) -> str:
    """What to do about streams that are longer than there are images."""
    return f"lower --stream-length {length}" if images >= SHORTEST else f"choose another {flag}"


def part_images(labels: Tensor, length: int, classes: int, seed: int) -> tuple[Tensor, Tensor, str]:
    """Positions in labels (N,) of the attackers' images and of the users', and in words how they were divided.

    Users get the smallest of USERS_SHARES of each class with which any `classes` classes have `length` images, if that
    leaves the attackers as many; else both draw from all images. UserError when even all images are too few.
    """
    present = labels.unique()
    if classes > len(present):
        raise UserError(f"--user-classes {classes}: the test split has {len(present)} classes, give that or less")
    draws = generator(seed, "parts")
    members = [(labels == label).nonzero()[:, 0] for label in present]
    members = [positions[torch.randperm(len(positions), generator=draws)] for positions in members]
    for share in USERS_SHARES:
        users = [positions[: int(share * len(positions))] for positions in members]
        attackers = torch.cat([positions[int(share * len(positions)) :] for positions in members])
        if _fewest(users, classes) >= length <= len(attackers):
            return attackers, torch.cat(users), f"users draw from {share:.0%} of each class, attackers from the others"
    everything, most = torch.arange(len(labels)), _fewest(members, classes)
    if most < length:
        raise UserError(
            f"{classes} classes of the test split may have {most} images and a user sends no image twice: "
            f"{_shorter(length, most, '--dataset')}, or raise --user-classes"
        )
    return everything, everything, "users and attackers draw from the same images, which are too few to divide"


def _fewest(groups: list[Tensor], count: int) -> int:
    """The number of images in the `count` smallest groups."""
    return sum(sorted(map(len, groups))[:count])


def draw_plain(images: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """`count` different positions of `images` (N,), in random order."""
    return images[torch.randperm(len(images), generator=draws)[:count]]


def draw_task(images: Tensor, labels: Tensor, count: int, classes: int, draws: torch.Generator) -> Tensor:
    """`draw_plain` from the positions (N,) whose labels (N,) are in a random choice of `classes` classes."""
    task = draw_plain(labels.unique(), classes, draws)
    return draw_plain(images[torch.isin(labels, task)], count, draws)


# ---- what they send --------------------------------------------------------------------------------------------------


Seen = Callable[[Images | Tensor], Tensor]  # images (N, 3, H, W) -> their representations (N, D), or the answers


@dataclass(frozen=True, eq=False)
class Sent:
    """Images uint8 (N, 3, H, W), and their representations (N, D)."""

    images: Tensor
    representations: Tensor

    def at(self, index: Tensor) -> "Sent":
        return Sent(self.images[index.to(self.images.device)], self.representations[index])


@dataclass
class _Known:
    """A client whose answers are known already: for an attacker who chooses by the answers so far."""

    representations: Tensor

    def ask(self, images: Images, sources: Tensor, account: str = "default") -> Tensor:
        return self.representations[sources].cpu()


def sybil_accounts(asked: Tensor, accounts: int, length: int) -> list[Tensor]:
    """The stream of each account of an attack that spends `length` queries on the images `asked`, in their order.

    As `attacks.adaptive.ask_as_sybils`: every account begins with the same twentieth of the budget, at least two
    queries, and they share out the rest. So an account's stream is shorter than a user's.
    """
    shared = max(2, length // 20)
    rest = asked[shared : length - (accounts - 1) * shared].chunk(accounts)
    return [torch.cat([asked[:shared], part]) for part in rest]


def few_buckets(pool: Sent, features: Tensor, length: int, draws: torch.Generator) -> Tensor:
    """The order in which an attacker who stays in few buckets queries a pool's images; features (N, F) are its own."""
    index, _, _ = ask_within(_Known(pool.representations), Stored(pool.images), features, length, 100.0, draws)
    return index


def attackers_streams(
    streams: Streams, seen: Seen, features: Callable[[Tensor], Tensor], pool: Sent, seed: int
) -> Iterator[tuple[str, Sent]]:
    """Yields the kind of each attacker's stream, and what it sends; each account of sybils has a stream of its own.

    The attackers choose from the pool, by `features` (N, F) of their own; views of its images are `seen` here.
    """
    length, everything = streams.stream_length, torch.arange(len(pool.images))
    choice = pool.at(draw_plain(everything, CHOICE * length, generator(seed, "few-buckets")))
    own = features(choice.images)
    for number in range(streams.streams):
        draws = {kind: generator(seed, kind, number) for kind in ATTACKERS}
        yield "plain", pool.at(draw_plain(everything, length, draws["plain"]))
        asked = draw_plain(everything, math.ceil(length / 2), draws["views"])
        sent = queries_sent(Stored(pool.images[asked]), Attack(n_views=2), draws["views"])[:length]
        yield "views", Sent(sent.tensor, seen(sent))
        asked = draw_plain(everything, math.ceil(length / streams.repeat), draws["repeat"])
        yield "repeat", pool.at(asked.repeat(streams.repeat)[:length])
        for stream in sybil_accounts(draw_plain(everything, length, draws["sybils"]), streams.sybils, length):
            yield "sybils", pool.at(stream)
        order = torch.randperm(len(own), generator=draws["few-buckets"])
        chosen = few_buckets(choice.at(order), own[order], length, draws["few-buckets"])
        yield "few-buckets", choice.at(order[chosen])


def untrained_features(arch: str | None, dim: int, precision: Precision, seed: int, images: Tensor) -> Tensor:
    """Features (N, F) of an attacker's untrained copy for answers of width `dim`, on the CPU."""
    with seeded(seed):
        copy = build_copy(arch if arch in ARCHITECTURES else "resnet18", dim, input_size=images.shape[-1])
    return represent(copy.to(precision.device), images, precision).cpu()


def users_streams(
    streams: Streams, pool: Sent, labels: Tensor, others: Sent | None, seed: int
) -> Iterator[tuple[str, Sent]]:
    """As `attackers_streams`, for users with a task, who choose from the pool by labels (N,).

    Then those of users who choose at random among all images of another data set.
    """
    length, everything = streams.stream_length, torch.arange(len(labels))
    for number in range(streams.streams):
        draws = generator(seed, "task", number)
        yield "task", pool.at(draw_task(everything, labels, length, streams.user_classes, draws))
    for number in range(0 if others is None else streams.streams):
        everybody = torch.arange(len(others.images))
        yield "other", others.at(draw_plain(everybody, length, generator(seed, "other", number)))
