"""A paying user of the API, who trains and uses a downstream head on the answers: the cost of a defence."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attacks.client import Client
from data_aug.datasets import canonical_name, check_labelled, load_labelled, load_queries
from data_aug.images import Stored
from evaluation.probes import Labelled, logistic_regression, mlp_probe
from evaluation.test_images import load_test
from settings import Settings, setting
from training.record import Record
from utils import Precision, UserError
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
    name: str, victim_dataset: str, root: Path, count: int, number: int | None = None
) -> tuple[Labelled, Labelled, int]:
    """The user's `count` labelled training images, the test images, and how many were left out as training images too.

    `number`: how many test images. UserError where the data set `name` has fewer images, or images without labels.
    """
    if canonical_name(name, root) == canonical_name(victim_dataset, root):  # the victim was trained on the others
        images, labels, split = load_queries(name, victim_dataset, root)
        check_labelled(labels, name, split)
    else:
        images, labels, split = *load_labelled(name, root, "train"), "train"
    if count > len(images):
        raise UserError(f"the {split} split of {name} has {len(images)} images for a user: lower --num_queries")
    images, labels = images[:count], labels[:count]
    asked = {"dataset": name, "split": split}
    record = Record(query_set=asked, query_indices=torch.arange(count), query_digests=digest_tensor(images))
    *test, left_out = load_test(name, root, record, number=number)
    return (images, labels), tuple(test), left_out


def user_scores(
    victim: AnyVictim, train: Labelled, test: Labelled, head: UserHead, precision: Precision, seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """The scores of a user who buys a victim's answers to all of these images in the account `user`.

    Also returns the report of the victim's defences. top1 and top5 in percent, and loss, are the user's head's;
    top1_converged is that of `logistic_regression`.
    """
    client = Client(victim)
    first = 0

    def buy(images: Tensor, labels: Tensor) -> Labelled:
        nonlocal first
        sources = torch.arange(first, first + len(images))
        first += len(images)
        return client.ask(Stored(images), sources, ACCOUNT).to(precision.device), labels.to(precision.device)

    bought = [buy(*train), buy(*test)]
    settings = {"epochs": head.epochs, "batch_size": head.batch_size, "weight_decay": head.weight_decay}
    layers = mlp_probe(*bought, head.lrhead, seed, hidden=victim.dim, **settings)
    linear = logistic_regression(*bought, seed)
    scores = {name: layers.scores[name] for name in ("top1", "top5", "loss")}
    return {**scores, "top1_converged": linear.scores["top1"]}, victim.report(client.sources)


def lost_words(scores: dict[str, float], clean: dict[str, float]) -> str:
    """The cost of a defence to the user, in words; clean: the scores without a defence."""
    top1, converged = (clean[name] - scores[name] for name in ("top1", "top1_converged"))
    return f"the user loses {top1:.2f} and {converged:.2f} points"
