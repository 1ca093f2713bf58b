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

from data_aug.recipes import VIEW_RECIPES
from loss import STEAL_LOSSES, TRAIN_LOSSES
from settings import Command, Settings, read_switch, setting
from training.objective import Loss
from utils import UserError

OWN = "own-simclr"
CSE = "cse"  # how --restore spells the removal of a mark
# Values of steal.py's settings where the command line has none; those of the loss come after these.
ATTACKS: dict[str, Mapping[str, Any]] = {
    # Dziedzic et al., ICML 2022: train on the answers by any loss.
    "direct": {},
    # Sha et al., CVPR 2023, the baseline: match the answers by their squared error.
    "conventional": {
        "losstype": "mse",
        "batch_size": 32,
        "lr": 3e-4,
        "weight_decay": 0.0,
        "copy_normalize": "none",
        "schedule": "constant",
        "archstolen": "resnet18",
    },
    # Sha et al., CVPR 2023: one random view of each image, the same to both encoders.
    "cont-steal": {
        "losstype": "contsteal",
        "queryaug": True,
        "query_views": "contsteal",
        "schedule": "constant",
        "copy_normalize": "none",
        "archstolen": "resnet18",
    },
    # Liu et al., CCS 2022: one query per image; the copy's features of it and of its augmentations match the answer.
    "stolenencoder": {
        "losstype": "stolenencoder",
        "useaug": True,
        "views": "stolenencoder",
        "copy_views": 9,
        "schedule": "constant",
        "copy_normalize": "none",
        "archstolen": "resnet34",
    },
    # Wu et al., ECCV 2024: five views of an image have to match the mean answer to ten views of it.
    "rda": {
        "losstype": "rda",
        "n_views": 10,
        "queryaug": True,
        "query_views": "rda-query",
        "prototype": True,
        "useaug": True,
        "views": "rda-copy",
        "copy_views": 5,
        "num_queries": 25000,
        "schedule": "constant",
        "archstolen": "resnet18",
    },
    # A control, which asks nothing: the attacker's own SimCLR on the images that it would query.
    OWN: {"losstype": "infonce"},
}


def read_restore(text: str) -> str | bool:
    """Parses --restore: True, False or `cse`."""
    if text.lower() == CSE:
        return CSE
    try:
        return read_switch(text)
    except UserError:
        raise UserError(f"{text!r} is neither True, False nor {CSE}") from None


def _unasked(command: Command) -> str | None:
    return None if command[Attack].asks else f"with --attack {OWN}: the victim is not asked"


def _without_views(command: Command) -> str | None:
    return None if command.useaug else "without --useaug: the copy sees what the victim saw"


def _without_queryaug(command: Command) -> str | None:
    if not command[Attack].asks:
        return _unasked(command)
    sent = command.n_views > 1 if command.queryaug is None else command.queryaug
    return None if sent else "without --queryaug: the images themselves are sent"


_THE_ATTACKS = "the attack's, else simclr"


@dataclass(frozen=True)
class Attack(Settings):
    """What is asked and what the copy is shown.

    queryaug: None sends random views if there are several queries per image. plain_first and unit_answers are set by
    the loss (see `training.objective.Loss`).
    """

    attack: str = setting("direct", "published attack: its settings are the defaults", choices=ATTACKS)
    n_views: int = setting(
        1,
        "queries per image",
        at_least=1,
        at_most=1000,
        acts=_unasked,
        otherwise="the attack's, or what the loss needs",
    )
    queryaug: bool | None = setting(None, "send random views (default: with several queries per image)", acts=_unasked)
    query_views: str = setting(
        "simclr",
        "recipe of the random views sent",
        choices=VIEW_RECIPES,
        acts=_without_queryaug,
        otherwise=_THE_ATTACKS,
    )
    useaug: bool = setting(False, "show the copy fresh random views instead of what the victim saw", acts=_unasked)
    views: str = setting(
        "simclr",
        "recipe of the random views that the copy sees",
        choices=VIEW_RECIPES,
        acts=_without_views,
        otherwise=_THE_ATTACKS,
    )
    copy_views: int = setting(
        1, "fresh views of an image per step", at_least=1, acts=_without_views, otherwise="--n-views"
    )
    prototype: bool = setting(
        False,
        "the mean answer to an image's queries is the target of all its views",
        acts=lambda command: None if command.n_views > 1 else "with one query per image",
    )
    repeat: int = setting(1, "repeat each query N times and average the answers", at_least=1, acts=_unasked)
    jitter: int = setting(
        0,
        "change pixels by up to N levels of 255 in each further asking",
        at_least=0,
        at_most=255,
        acts=lambda command: None if command.repeat > 1 else "without --repeat",
    )
    restore: str | bool = setting(
        False,
        f"estimate and undo poisoning, rounding, top-k and noise in the answers; {CSE}: project a mark out of them",
        read=read_restore,
        optional_value=True,
        acts=_unasked,
    )
    cse_components: int = setting(
        50,
        f"directions that --restore {CSE} projects out of the answers",
        at_least=1,
        acts=lambda command: None if command.restore == CSE else f"without --restore {CSE}",
    )
    max_coverage: float | None = setting(
        None,
        "query images that fall into few buckets; stop when X percent of the attacker's buckets are occupied",
        above=0,
        acts=_unasked,
    )
    sybils: int = setting(1, "spread the queries over N accounts and align their answers", at_least=1, acts=_unasked)
    shared: int = setting(
        0,
        "queries that every account repeats, for the alignment",
        at_least=0,
        otherwise="a twentieth of the budget",
        acts=lambda command: None if command.sybils > 1 else "without --sybils",
    )
    plain_first: bool = False
    unit_answers: bool = False
    title = "attack"

    @property
    def sends_views(self) -> bool:
        """Whether the victim is sent random views instead of the images."""
        return self.n_views > 1 if self.queryaug is None else self.queryaug

    @property
    def asks(self) -> bool:
        """Whether the victim is asked at all."""
        return self.attack != OWN

    @property
    def idle(self) -> dict[str, str]:
        """Why settings of a copy have no effect with this attack, by their names."""
        names = () if self.asks else ("victimhead", "stolenhead")
        return dict.fromkeys(names, f"with --attack {OWN}: the victim is not asked")

    @property
    def rows(self) -> int:
        """Rows per image that the copy sees in a step."""
        return self.copy_views + self.plain_first if self.useaug else self.n_views

    @property
    def one_answer(self) -> bool:
        """Whether a single answer is the target of all views of an image."""
        return self.n_views == 1 or (self.prototype and self.useaug)

    def images(self, num_queries: int) -> int:
        """How many images a budget of queries covers; without queries as many images. UserError when that is none."""
        if not self.asks:
            return num_queries
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
        if self.rows < loss.min_views:
            flag = "--copy-views" if self.useaug else "--n-views"
            raise UserError(f"this loss compares views: {flag} {self.rows} is too few, give {loss.min_views} or more")


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
ADAPTIVE = ("attack", "queryaug", "query_views", "prototype")
ADAPTIVE = (*ADAPTIVE, "repeat", "jitter", "restore", "cse_components", "max_coverage", "sybils", "shared")


def loss_of(attack: str, losstype: str) -> Loss:
    """The loss of that name for an attack. UserError where an attacker's own encoder is not trained by it."""
    losses = TRAIN_LOSSES if attack == OWN else STEAL_LOSSES
    if losstype not in losses:
        names = ", ".join(name for name in TRAIN_LOSSES if name in STEAL_LOSSES)
        raise UserError(f"--attack {OWN} has no victim for the loss {losstype}: give --losstype {names}")
    return losses[losstype]


def of_loss(loss: Loss) -> dict[str, bool]:
    """What the loss says of the attack."""
    return {"plain_first": loss.plain_first, "unit_answers": loss.unit_answers}


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
    attack = command.use(Attack, *layers, **of_loss(loss))
    attack.check(loss)
    return attack
