"""The values in force of a training run, what follows from them, and whether they go together."""

import math
from dataclasses import dataclass, fields

from attacks import Plan
from loss import Loss
from utils import UserError


@dataclass(frozen=True)
class Training:
    """The values in force of one training run; the flags of the scripts have the same names."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    optimizer: str = "adam"
    momentum: float = 0.9
    seed: int = 0
    n_views: int = 1
    queryaug: bool | None = None  # None: views are sent if there are several
    useaug: bool = False
    copy_views: int = 1
    prototype: bool = False
    repeat: int = 1
    restore: bool = False
    max_coverage: float | None = None
    sybils: int = 1
    shared: int = 0
    temperature: float = 0.07
    temperaturesn: float = 100.0
    lambda_aug: float = 9.0
    distance: str = "l2"
    flat_epochs: int = 10
    recipe: str = "standard"
    log_every_n_steps: int = 200
    print_freq: int | None = None  # steps between lines on a step's loss

    def plan(self, loss: Loss, budget: int = 0) -> Plan:
        """How an attack by this loss asks and shows; `budget` is the number of images that it may ask about."""
        queryaug = self.n_views > 1 if self.queryaug is None else self.queryaug
        own = {one.name: getattr(self, one.name) for one in fields(Plan) if hasattr(self, one.name)}
        return Plan(**{**own, "queryaug": queryaug, "plain_first": loss.plain_first, "budget": budget})


def check_plan(plan: Plan, loss: Loss) -> None:
    """UserError when the loss cannot work on what the plan shows it."""
    if plan.mismatch:
        raise UserError(plan.mismatch)
    if plan.views < loss.min_views:
        flag = "--copy-views" if plan.useaug else "--n-views"
        raise UserError(f"this loss compares views: {flag} {plan.views} is too few, give {loss.min_views} or more")


def learning_rate(training: Training, epoch: int, steps_per_epoch: int) -> float:
    """The learning rate of an epoch, counted from 0: the base rate through epoch `flat_epochs`, then a cosine.

    The cosine's half period is the number of epochs that are left. The released recipe takes the number of batches in
    an epoch instead, as the 2022 code did: its rate may come back up, or hardly fall.
    """
    period = steps_per_epoch if training.recipe == "released" else max(1, training.epochs - training.flat_epochs)
    since = max(0, epoch - training.flat_epochs)
    return training.lr * 0.5 * (1 + math.cos(math.pi * since / period))
