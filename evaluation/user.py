"""A paying user of the API, who trains and uses a downstream head on the answers: the cost of a defence."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.client import Client
from attacks.elsewhere import Elsewhere
from data_aug.datasets import check_labelled, load_labelled, load_queries, same_source
from data_aug.images import Images, Stored
from data_aug.sizes import SIZE
from evaluation.probes import Labelled, logistic_regression, mlp_probe
from evaluation.rows import packed, unpacked
from evaluation.statistics import mcnemar, paired_interval
from evaluation.test_images import load_test
from settings import Settings, setting
from training.record import Record, named_size
from training.run import Run
from utils import Precision, UserError, generator
from victim import AnyVictim, digest_tensor

ACCOUNT = "user"


@dataclass(frozen=True)
class UserHead(Settings):
    """How the user's head is trained: the 2022 code's two layers, as wide as an answer."""

    epochs: int = setting(100, "epochs of the head's training", at_least=1)
    batch_size: int = setting(64, "images per batch", at_least=1, flags=("-b", "--batch-size"))
    lrhead: float = setting(1e-3, "Adam's learning rate", above=0)
    weight_decay: float = setting(1e-4, "weight decay", at_least=0, flags=("--weight-decay", "--wd"))
    title = "head"


def load_user(
    name: str,
    victim_dataset: str,
    root: Path,
    count: int,
    number: int | None = None,
    classes: int | None = None,
    seed: int = 0,
    size: int = SIZE,
) -> tuple[Labelled, Labelled, int]:
    """The user's `count` labelled training images, the test images, and how many were left out as training images too.

    number: how many test images. size: side of the images. classes: the user has a narrow task, whose classes the seed
    draws; all images are of these. UserError where the data set `name` has fewer images, or images without labels.
    """
    if same_source(name, victim_dataset, root):  # the victim was trained on the others
        images, labels, split = load_queries(name, victim_dataset, root, size=size)
        check_labelled(labels, name, split)
    else:
        images, labels, split = *load_labelled(name, root, "train", size), "train"
    task = None if classes is None else _draw_task(labels, classes, name, seed)
    chosen = torch.arange(len(labels)) if task is None else torch.isin(labels, task).nonzero()[:, 0]
    if count > len(chosen):
        narrow = f" of {classes} classes" if classes else ""
        raise UserError(f"the {split} split of {name} has {len(chosen)} images{narrow} for a user: lower --num_queries")
    chosen = chosen[:count]
    train = images[chosen], labels[chosen]
    asked = {"dataset": name, "split": split, **named_size(size)}
    record = Record(query_set=asked, query_indices=chosen, query_digests=digest_tensor(train[0]))
    *test, left_out = load_test(name, root, record, number=None if classes else number, size=size)
    if task is None:
        return train, tuple(test), left_out
    return (train[0], torch.searchsorted(task, train[1])), _test_of_task(*test, task, number), left_out


def _test_of_task(images: Tensor, labels: Tensor, task: Tensor, number: int | None) -> Labelled:
    """The last `number` test images of the task's classes, all by default, with labels counted from 0."""
    positions = torch.isin(labels, task).nonzero()[:, 0]
    number = len(positions) if number is None else number
    if not 0 < number <= len(positions):
        raise UserError(f"--num-test {number}: {len(positions)} test images are of the user's {len(task)} classes")
    positions = positions[-number:]
    return images[positions], torch.searchsorted(task, labels[positions])


def _draw_task(labels: Tensor, classes: int, name: str, seed: int) -> Tensor:
    """The classes of the user's task, sorted: so many of those in labels (N,), drawn by the seed."""
    present = labels.unique()
    if classes > len(present):
        raise UserError(f"--user-classes {classes}: {name} has {len(present)} classes, give that or less")
    return present[torch.randperm(len(present), generator=generator(seed, "user's task"))[:classes]].sort().values


def keep_answers(run: Run, asked: Elsewhere | None) -> Path | None:
    """The file in the run, which is started, for the answers of a victim that is asked elsewhere; None for another."""
    if asked is None:
        return None
    run.start()
    keep = run.folder / f"queries-{asked.version}-0"
    if not run.resume:
        keep.unlink(missing_ok=True)
    return keep


def buyer(client: Client, device: torch.device, account: str = ACCOUNT) -> Callable[[Images | Tensor], Tensor]:
    """A function that asks for images (N, 3, H, W) in this account: answers (N, D) on the device.

    The images are numbered on from call to call.
    """
    numbers = itertools.count()

    def buy(images: Images | Tensor) -> Tensor:
        images = images if isinstance(images, Images) else Stored(images)
        sources = torch.tensor([next(numbers) for _ in range(len(images))], dtype=torch.long)
        return client.ask(images, sources, account).to(device)

    return buy


def user_scores(
    victim: AnyVictim,
    train: Labelled,
    test: Labelled,
    head: UserHead,
    precision: Precision,
    seed: int = 0,
    keep: Path | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """The scores of a user who buys a victim's answers to all of these images in the account `user`.

    keep: the file in which answers are kept as they arrive. Also returns the report of the victim's defences. top1 and
    top5 in percent, and loss, are the user's head's; top1_converged, its deviation and the images that are right are
    those of `logistic_regression`.
    """
    client = Client(victim, keep)
    buy = buyer(client, precision.device)
    bought = [(buy(images), labels.to(precision.device)) for images, labels in (train, test)]
    settings = {"epochs": head.epochs, "batch_size": head.batch_size, "weight_decay": head.weight_decay}
    layers = mlp_probe(*bought, head.lrhead, seed, hidden=victim.dim, **settings)
    linear = logistic_regression(*bought, seed)
    scores: dict[str, Any] = {name: layers.scores[name] for name in ("top1", "top5", "loss")}
    scores |= {"top1_converged": linear.scores["top1"], "top1_converged_sd": linear.scores["top1_sd"]}
    return {**scores, "right": packed(linear.predictions == bought[1][1])}, victim.report(client.sources)


def lost_words(scores: dict[str, Any], clean: dict[str, Any], images: int) -> str:
    """The cost of a defence to the user on so many test images, in words; clean: the scores without a defence."""
    top1, converged = (clean[name] - scores[name] for name in ("top1", "top1_converged"))
    right = [unpacked(one["right"], images) for one in (clean, scores)]
    (low, high), (p, _) = paired_interval(*right), mcnemar(*right)
    return f"the user loses {top1:.2f} and {converged:.2f} points ({low:.2f} to {high:.2f}, McNemar's p {p:.2g})"
