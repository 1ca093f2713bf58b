"""Attacks: what is asked of the victim, and what the copy is shown; published attacks are presets of these settings.

    client = Client(Victim(encoder, budget=9000), keep=Path("answers"))
    answers = buy(client, Stored(images), Attack(n_views=2), count=4500, draws=generator(0, "query views"))
    shown, targets = answers.batch(batch, draws)

An attack asks about N images, with V queries for each: the image itself, or V random views of it (`queryaug`). In a
step the copy is shown what was sent, or with `useaug` fresh random views of the image (`copy_views` of them), which
cost no queries. Its target is the answer to the same query. With one query per image, or with `prototype` (the mean of
the V answers), a single answer is the target of all views of the image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from settings import Command, Settings, setting
from training.objective import Loss
from utils import UserError

# Values of steal.py's settings where the command line has none; those of the loss come after these.
ATTACKS: dict[str, Mapping[str, Any]] = {
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
    # Liu et al., CCS 2022: one query per image; the copy's features of it and of its augmentations match the answer.
    "stolenencoder": {"losstype": "stolenencoder", "useaug": True, "copy_views": 9, "archstolen": "resnet34"},
    # Wu et al., ECCV 2024: five views of an image have to match the mean answer to ten views of it.
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


def _without_views(command: Command) -> str | None:
    return None if command.useaug else "without --useaug: the copy sees what the victim saw"


@dataclass(frozen=True)
class Attack(Settings):
    """What is asked and what the copy is shown.

    plain_first: set by the loss, if the first of an image's views is the image itself. queryaug: None sends random
    views if there are several queries per image.
    """

    attack: str = setting("direct", "published attack: its settings are the defaults", choices=ATTACKS)
    n_views: int = setting(
        1, "queries per image", at_least=1, at_most=1000, otherwise="the attack's, or what the loss needs"
    )
    queryaug: bool | None = setting(None, "send random views (default: with several queries per image)")
    useaug: bool = setting(False, "show the copy fresh random views instead of what the victim saw")
    copy_views: int = setting(
        1, "fresh views of an image per step", at_least=1, acts=_without_views, otherwise="--n-views"
    )
    prototype: bool = setting(
        False,
        "the mean answer to an image's queries is the target of all its views",
        acts=lambda command: None if command.n_views > 1 else "with one query per image",
    )
    repeat: int = setting(1, "repeat each query N times and average the answers", at_least=1)
    restore: bool = setting(False, "estimate and undo poisoning, rounding, top-k and noise in the answers")
    max_coverage: float | None = setting(
        None,
        "query images that fall into few buckets; stop when X percent of the attacker's buckets are occupied",
        above=0,
    )
    sybils: int = setting(1, "spread the queries over N accounts and align their answers", at_least=1)
    shared: int = setting(
        0,
        "queries that every account repeats, for the alignment",
        at_least=0,
        otherwise="a twentieth of the budget",
        acts=lambda command: None if command.sybils > 1 else "without --sybils",
    )
    plain_first: bool = False
    title = "attack"

    @property
    def sends_views(self) -> bool:
        """Whether the victim is sent random views instead of the images."""
        return self.n_views > 1 if self.queryaug is None else self.queryaug

    @property
    def views(self) -> int:
        """Rows per image that the copy sees in a step."""
        return self.copy_views + self.plain_first if self.useaug else self.n_views

    @property
    def one_answer(self) -> bool:
        """Whether a single answer is the target of all views of an image."""
        return self.n_views == 1 or (self.prototype and self.useaug)

    def images(self, num_queries: int) -> int:
        """How many images a budget of queries covers. UserError when that is none."""
        if self.sybils > 1 and self.shared < 2:
            raise UserError(f"--shared {self.shared} is too few to align accounts by: give 2 or more, better 100")
        overhead = (self.sybils - 1) * self.shared
        count = (num_queries // self.repeat - overhead) // self.n_views
        if count < 1 or self.shared >= count * self.n_views:
            raise UserError(
                f"--num_queries {num_queries} are too few for {self.repeat} askings of {self.n_views} views and "
                f"{overhead} shared queries: give more, or lower --repeat, --sybils or --shared"
            )
        return count

    def check(self, loss: Loss) -> None:
        """UserError where answers cannot be paired with the copy's views, or the loss cannot use these views."""
        if self.max_coverage is not None and (self.n_views > 1 or self.sybils > 1 or self.sends_views):
            raise UserError(
                "--max-coverage chooses plain images for one account: leave out --n-views, --queryaug, --sybils"
            )
        if loss.plain_first and not self.one_answer:
            raise UserError(f"this loss takes a single answer per image, not {self.n_views}: give --n-views 1")
        if self.useaug and not self.one_answer and self.copy_views != self.n_views:
            raise UserError(
                f"{self.copy_views} views for the copy cannot be paired with {self.n_views} answers: give --copy-views "
                f"{self.n_views}, or --prototype for the mean answer"
            )
        if self.views < loss.min_views:
            flag = "--copy-views" if self.useaug else "--n-views"
            raise UserError(f"this loss compares views: {flag} {self.views} is too few, give {loss.min_views} or more")


@dataclass(frozen=True)
class Heads(Settings):
    """SimSiam's two heads, for the loss that compares their outputs."""

    out_dim: int = setting(
        512,
        "width of symmetrized's heads",
        at_least=1,
        flags=("--out_dim",),
        acts=lambda command: (
            None if command[Loss].predictor else f"with the loss {command.losstype}: heads are as wide as an answer"
        ),
    )
    title = "training"


# Settings that only steal.py offers; other scripts leave them at their defaults.
ADAPTIVE = ("attack", "queryaug", "prototype", "repeat", "restore", "max_coverage", "sybils", "shared")


def use_attack(command: Command, loss: Loss, preset: Mapping[str, Any], num_queries: int) -> Attack:
    """Put the attack into force. Settings not given come from the preset, then from the loss and from each other."""
    layers: list[Mapping[str, Any]] = [preset, {"n_views": loss.min_views}]

    def value(name: str) -> Any:
        found = (layer[name] for layer in (command.given, *layers) if name in layer)
        return next(found, getattr(command, name))

    n_views, useaug = value("n_views"), value("useaug")
    paired = n_views if useaug and not value("prototype") else loss.min_views
    shared = max(2, num_queries // 20) if value("sybils") > 1 else 0
    layers.append({"queryaug": n_views > 1, "copy_views": paired, "shared": shared})
    attack = command.use(Attack, *layers, plain_first=loss.plain_first)
    attack.check(loss)
    return attack
