"""Attackers' and users' streams of queries: who sends which images, and how a detector scores them."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attacks import Attack
from attacks.queries import queries_sent
from data_aug.datasets import DATASET_NAMES, check_name, load_dataset
from data_aug.images import Stored
from defenses.detection import SCORES, Detection
from evaluation.statistics import roc
from models import SimCLREncoder
from settings import Settings, setting
from training.represent import represent
from utils import Precision, UserError, generator

ATTACKERS = {
    "plain": "random images, each once",
    "views": "two random views of each image",
    "repeat": "each image several times",
}
FALSE_ALARMS = 0.05  # share of users' streams that may be taken for attacks
USERS_SHARES = (0.5, 0.75)  # of each class's images that users may get; the smallest sufficient share is taken
SHORTEST = 10  # queries of a stream: some statistics say nothing about fewer

Scores = dict[str, dict[str, list[float]]]  # kind -> statistic -> the score of each stream


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
    title = "streams"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_users == self.dataset:
            raise UserError(f"--dataset-users {self.dataset} is the attackers' data set: give another, or leave it out")


# ---- who sends which images ------------------------------------------------------------------------------------------


def load_others(streams: Streams, root: Path) -> Tensor | None:
    """Images (N, 3, H, W) for users of another data set; None without such users. UserError where they are too few."""
    if not streams.dataset_users:
        return None
    images, _ = load_dataset(streams.dataset_users, root, "test")
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


# ---- their representations -------------------------------------------------------------------------------------------


def attackers_streams(
    streams: Streams,
    encoder: SimCLREncoder,
    precision: Precision,
    images: Tensor,
    known: Tensor,
    chosen: Tensor,
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """Yields the kind and representations (length, D) of each attacker's stream.

    The attackers choose from the `chosen` positions of images (N, 3, H, W), whose representations (N, D) are `known`;
    views of them are encoded here.
    """
    length = streams.stream_length
    for number in range(streams.streams):
        draws = {kind: generator(seed, kind, number) for kind in ATTACKERS}
        yield "plain", known[draw_plain(chosen, length, draws["plain"])]
        asked = Stored(images[draw_plain(chosen, math.ceil(length / 2), draws["views"])])
        sent = queries_sent(asked, Attack(n_views=2), draws["views"])
        yield "views", represent(encoder, sent[:length], precision)
        asked = draw_plain(chosen, math.ceil(length / streams.repeat), draws["repeat"])
        yield "repeat", known[asked.repeat(streams.repeat)[:length]]


def users_streams(
    streams: Streams, known: Tensor, labels: Tensor, chosen: Tensor, others: Tensor | None, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """As `attackers_streams`, for users with a task, who choose by labels (N,).

    Then those of users who choose at random among all images of another data set, with representations `others`.
    """
    length = streams.stream_length
    for number in range(streams.streams):
        draws = generator(seed, "task", number)
        yield "task", known[draw_task(chosen, labels[chosen], length, streams.user_classes, draws)]
    for number in range(0 if others is None else streams.streams):
        yield "other", others[draw_plain(torch.arange(len(others)), length, generator(seed, "other", number))]


# ---- a detector's scores ---------------------------------------------------------------------------------------------


def score_all(
    streams: Streams,
    detector: Detection,
    encoder: SimCLREncoder,
    precision: Precision,
    data: tuple[Tensor, Tensor, Tensor | None],
    seed: int,
) -> tuple[Scores, str]:
    """The scores of all attackers' and users' streams, and in words how they share the images.

    Each stream is watched by a fresh copy of the detector. data: the images (N, 3, H, W) of `streams.dataset`, their
    labels (N,), and the images of `load_others`.
    """
    images, labels, others = data
    attackers, users, parting = part_images(labels, streams.stream_length, streams.user_classes, seed)
    known = represent(encoder, images, precision)
    others = None if others is None else represent(encoder, others, precision)
    scores: Scores = {}
    sent = attackers_streams(streams, encoder, precision, images, known, attackers, seed)
    for kind, representations in itertools.chain(sent, users_streams(streams, known, labels, users, others, seed)):
        fresh = dataclasses.replace(detector, _streams={})
        fresh.watch(representations)
        for name, value in fresh.scores().items():
            scores.setdefault(kind, {}).setdefault(name, []).append(value)
    return scores, parting


def detected(attacks: list[float], users: list[float]) -> float:
    """The share of attacks above the lowest threshold that at most FALSE_ALARMS of the users exceed."""
    allowed = int(FALSE_ALARMS * len(users))
    threshold = sorted(users, reverse=True)[allowed]
    return sum(value > threshold for value in attacks) / len(attacks)


def _users(scores: Scores) -> list[str]:
    return [kind for kind in scores if kind not in ATTACKERS]


def stream_figures(scores: Scores) -> dict[str, float]:
    """auc_USERS_ATTACKER_STATISTIC and detected_USERS_ATTACKER_STATISTIC, shares in [0, 1]."""
    figures = {}
    for users, attacker, name in itertools.product(_users(scores), ATTACKERS, SCORES):
        both = scores[attacker][name], scores[users][name]
        figures[f"auc_{users}_{attacker}_{name}"] = round(roc(*both)[1], 6)
        figures[f"detected_{users}_{attacker}_{name}"] = round(detected(*both), 6)
    return figures


def stream_table(scores: Scores, figures: Mapping[str, float]) -> str:
    """Markdown: the mean scores of each kind, then AUC and detection rate by users, statistic and attacker."""
    lines = ["| kind | streams | " + " | ".join(f"mean {name}" for name in SCORES) + " |", "|---" * 5 + "|"]
    for kind, of_kind in scores.items():
        means = [f"{sum(values) / len(values):.4g}" for values in of_kind.values()]
        lines.append(f"| {kind} | {len(of_kind['nearest'])} | {' | '.join(means)} |")
    lines += ["", f"AUC, and share detected at {FALSE_ALARMS:.0%} false alarms:", ""]
    lines += [f"| users | statistic | {' | '.join(ATTACKERS)} |", "|---" * (2 + len(ATTACKERS)) + "|"]
    for users, name in itertools.product(_users(scores), SCORES):
        keys = [f"{users}_{attacker}_{name}" for attacker in ATTACKERS]
        cells = [f"{figures[f'auc_{key}']:.3f}, {figures[f'detected_{key}']:.0%}" for key in keys]
        lines.append(f"| {users} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
