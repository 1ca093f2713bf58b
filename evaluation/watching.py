"""How a detector and PRADA score attackers' and users' streams, and how well the scores tell them apart."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attacks import victims
from attacks.client import Client
from attacks.elsewhere import Elsewhere
from data_aug.datasets import load_labelled, take_balanced
from defenses.detection import Detection
from defenses.prada import ENOUGH, prada
from evaluation.encoders import open_owner
from evaluation.probes import Labelled, logistic_regression
from evaluation.statistics import auc_interval, rate_interval, roc
from evaluation.streams import ATTACKERS, Seen, Sent, Streams, attackers_streams, untrained_features, users_streams
from evaluation.user import buyer
from files.address import Address, asked_elsewhere, read_place
from models import SimCLREncoder
from settings import Command, Settings, setting, settings_of
from training import finding
from training.represent import represent
from utils import Precision, UserError

FALSE_ALARMS = 0.05  # share of users' streams that may be taken for attacks

# kind -> statistic -> the score of each stream for which there is any
Scores = dict[str, dict[str, list[float]]]
# The images (N, 3, H, W) of `streams.dataset`, their labels (N,), and the images of `load_others`
Known = tuple[Tensor, Tensor, Tensor | None]
Classify = Callable[[Tensor], Tensor]  # representations (N, D) -> classes (N,)


@dataclass(frozen=True)
class Watched(Settings):
    """The owner of the API, or where the API is."""

    victim: Path | Address | None = setting(
        None,
        "the owner's checkpoint, run folder or run name; http://HOST:PORT or python:FILE.py:FUNCTION to ask",
        read=read_place,
        named=False,
        otherwise="the only victim",
    )
    title = "victim"


def open_watched(command: Command) -> victims.Opened:
    """The victim whose queries are watched."""
    if asked_elsewhere(command):
        return victims.reach(command)
    path = finding.find(command, "victim", "victim", {})
    encoder, trained = open_owner(command, path)
    return victims.Opened(finding.home_of(path, command.checkpoint_dir), path, {"settings": trained}, encoder)


@dataclass(frozen=True, eq=False)
class Watcher:
    """Who computes the statistics: the owner by representations, or an attacker by the answers that it buys.

    seen: what is known of images. features: (N, F) of the attacker who chooses by its own. classify: the owner's
    classifier for PRADA, None where there is none, and `said` in words.
    """

    seen: Seen
    features: Callable[[Tensor], Tensor]
    classify: Classify | None
    said: str


def watcher_of(
    command: Command, opened: victims.Opened, keep: Path | None, precision: Precision, known: Known
) -> Watcher:
    """The owner, or with a victim elsewhere an attacker, who keeps the answers in this file.

    The attacker asks about each of the images and of its streams' views once. Its statistics are the owner's as far as
    no defence changes the answers. UserError where its account cannot pay.
    """
    streams, seed = command[Streams], command.seed
    if opened.asked:
        return _attacker(opened.asked, keep, precision, seed, known, streams.streams * streams.stream_length)
    encoder = opened.encoder.to(precision.device, memory_format=precision.memory_format)
    owner = opened.checkpoint["settings"].get("dataset")
    try:
        if not owner:
            raise UserError(f"{opened.source} does not say what it was trained on")
        owned = load_labelled(owner, command.data, "train", command.size)
        classify, said = owner_classifier(streams, owner, owned, encoder, precision, seed)
    except UserError as error:
        classify, said = None, f"without PRADA, which needs labelled images of the owner's: {error}"
    features = partial(untrained_features, encoder.arch, encoder.dim, precision, seed)
    return Watcher(partial(represent, encoder, precision=precision), features, classify, said)


def _attacker(asked: Elsewhere, keep: Path, precision: Precision, seed: int, known: Known, views: int) -> Watcher:
    images = sum(len(each) for each in (known[0], known[2]) if each is not None)
    asked.budget = images + views
    print(f"queries: {asked.budget}, {images} images and {views} random views")
    features = partial(untrained_features, None, asked.dim, precision, seed)
    said = "by the answers, which defences may have changed; without PRADA, which needs the owner's classifier"
    return Watcher(buyer(Client(asked, keep), precision.device), features, None, said)


def owner_classifier(
    streams: Streams, owner: str, owned: Labelled, encoder: SimCLREncoder, precision: Precision, seed: int
) -> tuple[Classify, str]:
    """The owner's own classifier, by which PRADA groups queries, and a line about it.

    Logistic regression on representations of the owner's labelled images `owned`, of the data set `owner`.
    """
    images, labels = owned
    chosen = take_balanced(labels, min(streams.classifier_images, len(labels)), seed)
    train = represent(encoder, images[chosen], precision), labels[chosen].to(precision.device)
    linear = logistic_regression(train, train, seed)
    words = f"PRADA's classes: logistic regression on {len(chosen)} labelled images of {owner}, the owner's"
    return lambda rows: F.linear(rows, linear.weight, linear.bias).argmax(dim=1), words


def score_all(
    streams: Streams,
    detector: Detection,
    watcher: Watcher,
    data: Known,
    parts: tuple[Tensor, Tensor],
    seed: int,
) -> Scores:
    """The scores of all attackers' and users' streams.

    Each stream is watched by a fresh copy of the detector; `prada` is among the scores where there is a classifier,
    without those of streams that are too short for it.
    parts: the positions of the attackers' images and of the users'.
    """
    images, labels, others = data
    attackers, users = parts
    known = Sent(images, watcher.seen(images))
    others = None if others is None else Sent(others, watcher.seen(others))
    scores: Scores = {}
    sent = attackers_streams(streams, watcher.seen, watcher.features, known.at(attackers), seed)
    for kind, queries in itertools.chain(sent, users_streams(streams, known.at(users), labels[users], others, seed)):
        fresh = dataclasses.replace(detector, _streams={})
        fresh.watch(queries.representations)
        found = fresh.scores()
        if watcher.classify is not None:
            found["prada"] = prada(queries.images, watcher.classify(queries.representations).cpu())
        for name, value in found.items():
            known_scores = scores.setdefault(kind, {}).setdefault(name, [])
            known_scores += [] if value is None else [value]
    return scores


def detected(attacks: list[float], users: list[float]) -> int:
    """How many attacks are above the lowest threshold that at most FALSE_ALARMS of the users exceed."""
    allowed = int(FALSE_ALARMS * len(users))
    threshold = sorted(users, reverse=True)[allowed]
    return sum(value > threshold for value in attacks)


def settings_row(*owners: Any) -> dict[str, Any]:
    """The settings of streams and detector, for a row of results."""
    return {name: getattr(owner, name) for owner in owners for name in settings_of(owner)}


def _users(scores: Scores) -> list[str]:
    return [kind for kind in scores if kind not in ATTACKERS]


def _statistics(scores: Scores) -> list[str]:
    return list(scores["plain"])


def stream_figures(scores: Scores, prada_delta: float) -> dict[str, float]:
    """auc_USERS_ATTACKER_STATISTIC and detected_USERS_ATTACKER_STATISTIC, shares in [0, 1].

    With PRADA's scores also flagged_KIND: the share of the streams whose W fell below `prada_delta`. Each has the ends
    of its 95 % interval, `_low` and `_high`, as if streams were independent and the threshold known. There is no figure
    of streams without scores, and no interval of a single stream's AUC.
    """
    figures: dict[str, float] = {}
    for users, attacker, name in itertools.product(_users(scores), ATTACKERS, _statistics(scores)):
        both = scores[attacker][name], scores[users][name]
        if not all(both):
            continue
        key = f"{users}_{attacker}_{name}"
        figures |= _with_ends(f"auc_{key}", roc(*both)[1], auc_interval(*both) if min(map(len, both)) > 1 else ())
        figures |= _rate(f"detected_{key}", detected(*both), len(both[0]))
    for kind, of_kind in scores.items():
        values = of_kind.get("prada", [])
        if values:
            figures |= _rate(f"flagged_{kind}", sum(value > 1 - prada_delta for value in values), len(values))
    return figures


def stream_curves(scores: Scores) -> dict[str, list[list[float]]]:
    """USERS_ATTACKER_STATISTIC -> the points of its ROC: shares of the users' and of the attackers' streams flagged."""
    curves = {}
    for users, attacker, name in itertools.product(_users(scores), ATTACKERS, _statistics(scores)):
        both = scores[attacker][name], scores[users][name]
        if all(both):
            points = roc(*both)[0]
            curves[f"{users}_{attacker}_{name}"] = [[round(false, 4), round(found, 4)] for false, found in points]
    return curves


def _rate(name: str, hits: int, number: int) -> dict[str, float]:
    return _with_ends(name, hits / number, rate_interval(hits, number))


def _with_ends(name: str, value: float, interval: Sequence[float]) -> dict[str, float]:
    ends = zip((f"{name}_low", f"{name}_high"), interval, strict=False)
    return {name: round(value, 6), **{end: round(share, 6) for end, share in ends}}


def stream_table(scores: Scores, figures: Mapping[str, float]) -> str:
    """Markdown: the mean scores of each kind, then AUC and detection rate by users, statistic and attacker."""
    names = _statistics(scores)
    head = ["kind", "streams", *(f"mean {name}" for name in names), *(["flagged by PRADA"] if "prada" in names else [])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for kind, of_kind in scores.items():
        cells = [f"{statistics.fmean(values):.4g}" if values else "" for values in of_kind.values()]
        cells += [_cell(figures, f"flagged_{kind}", ".0%")] if "prada" in names else []
        lines.append(f"| {kind} | {len(of_kind['nearest'])} | {' | '.join(cells)} |")
    unjudged = {len(of_kind["nearest"]) - len(of_kind.get("prada", of_kind["nearest"])) for of_kind in scores.values()}
    if unjudged != {0}:
        lines += [
            "",
            f"PRADA says nothing of streams of {ENOUGH} distances or fewer: they are left out of its figures.",
        ]
    lines += ["", f"AUC, and share detected at {FALSE_ALARMS:.0%} false alarms, with 95 % intervals:", ""]
    lines += [f"| users | statistic | {' | '.join(ATTACKERS)} |", "|---" * (2 + len(ATTACKERS)) + "|"]
    for users, name in itertools.product(_users(scores), names):
        keys = [f"{users}_{attacker}_{name}" for attacker in ATTACKERS]
        cells = [(_cell(figures, f"auc_{key}", ".3f"), _cell(figures, f"detected_{key}", ".0%")) for key in keys]
        lines.append(f"| {users} | {name} | {' | '.join(', '.join(filter(None, pair)) for pair in cells)} |")
    return "\n".join(lines)


def _cell(figures: Mapping[str, float], name: str, form: str) -> str:
    """A figure with its interval; empty where there is no figure."""
    if name not in figures:
        return ""
    ends = [f"{figures[end]:{form}}" for end in (f"{name}_low", f"{name}_high") if end in figures]
    return f"{figures[name]:{form}}" + (f" [{', '.join(ends)}]" if ends else "")
