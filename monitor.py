"""Watching a training run without holding up the device: its loss, and whether the features collapse."""

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from utils import Run, UserError

# Reading the loss off a GPU makes it wait, so there it is looked at once in so many steps; on a CPU in each.
STEPS_BETWEEN_LOOKS = 50
# Unit rows spread evenly over the sphere have a standard deviation of 1 / sqrt(D) in each dimension. Features with less
# than this part of it, on average over an epoch, have collapsed to nearly one point; or, where what they have to match
# is less spread than that, with less than this part of its spread.
COLLAPSED = 0.01


def spread_of(features: Tensor) -> Tensor:
    """Mean standard deviation per dimension () of features (R, D), brought to length 1."""
    return F.normalize(features, dim=1).std(dim=0, correction=0).mean()


class Watch:
    """Looks at one epoch's losses and features without holding up the device; stops at what cannot go on.

    That is a loss that is not finite, at its step, and features that have collapsed, at the end of the epoch.
    `matched` is the spread of what the features have to match, if anything; `seen` what `so_far` gave when an epoch was
    interrupted. Every `print_every` steps a line says the seconds a step takes, the loss, and its mean so far.
    """

    def __init__(
        self,
        run: Run,
        epoch: int,
        steps: int,
        log_every: int,
        device: torch.device,
        matched: float = math.inf,
        seen: tuple[list[float], list[float]] = ((), ()),
        print_every: int | None = None,
    ):
        self.print_every, self.started, self.begun = print_every, time.perf_counter(), len(seen[0])
        self.matched = matched
        self.run, self.epoch, self.steps, self.log_every = run, epoch, steps, log_every
        self.interval = 1 if device.type == "cpu" else min(STEPS_BETWEEN_LOOKS, print_every or STEPS_BETWEEN_LOOKS)
        self.pending: list[Tensor] = []
        self.losses, self.spreads = map(list, seen)
        self.even = 0.0  # the spread of rows that are evenly spread

    def add(self, loss: Tensor, features: Tensor, lr: float, bar: tqdm) -> None:
        """Take a step's loss () and features (R, D)."""
        self.even = features.shape[1] ** -0.5 if len(features) > 1 else 0.0
        self.pending.append(torch.stack([loss, spread_of(features)]))
        if len(self.pending) >= self.interval:
            self._look(lr, bar)

    def _look(self, lr: float, bar: tqdm) -> None:
        for loss, spread in torch.stack(self.pending).tolist():
            step = len(self.losses)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {step + 1} of {self.steps} in epoch {self.epoch + 1}: "
                    f"give a smaller --lr (now {lr:.3g}) or a larger --temperature; {self._kept()}"
                )
            self.losses.append(loss)
            self.spreads.append(spread)
            if (self.epoch * self.steps + step) % self.log_every == 0:
                values = {"step/loss": loss, "step/spread": spread, "step/lr": lr}
                self.run.scalars(self.epoch * self.steps + step, values)
        if self.print_every and (len(self.losses) - 1) % self.print_every < len(self.pending):
            each = (time.perf_counter() - self.started) / (len(self.losses) - self.begun)
            mean = sum(self.losses) / len(self.losses)
            self.run.say(
                f"Epoch: [{self.epoch}][{len(self.losses) - 1}/{self.steps}]  Time {each:.3f}  "
                f"Loss {self.losses[-1]:.4f} ({mean:.4f})"
            )
        self.pending.clear()
        bar.set_postfix(loss=f"{self.losses[-1]:.4f}", spread=f"{self.spreads[-1]:.4f}", lr=f"{lr:.3g}")

    def so_far(self, lr: float, bar: tqdm) -> tuple[list[float], list[float]]:
        """The losses and spreads of the epoch's steps until now."""
        if self.pending:
            self._look(lr, bar)
        return self.losses, self.spreads

    def close(self, lr: float, bar: tqdm) -> tuple[float, float]:
        """The epoch's mean loss, and mean spread: the features' standard deviation per dimension, rows of length 1."""
        loss, spread = (sum(values) / len(values) for values in self.so_far(lr, bar))
        expected = min(self.even, self.matched)
        if spread < COLLAPSED * expected:
            raise UserError(
                f"the features have collapsed to nearly one point in epoch {self.epoch + 1}: their spread is "
                f"{spread:.2g}, {expected:.2g} is to be expected; give another --losstype or a smaller --lr "
                f"(now {lr:.3g}); {self._kept()}"
            )
        return loss, spread

    def _kept(self) -> str:
        return f"{self.run.folder} keeps what was finished before this epoch"
