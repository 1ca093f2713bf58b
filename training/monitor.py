"""Monitoring training without synchronising with the device: loss, collapse of the features, and time left."""

import math
import time
from collections.abc import Sequence
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from training.recipe import Recipe
from training.run import Run
from utils import UserError, quiet

# Reading the loss from a GPU makes the host wait, so it is read once in so many steps; on a CPU in each.
STEPS_BETWEEN_READS = 50
# Unit rows that are uniform on the sphere have a standard deviation of 1 / sqrt(D) per dimension. Features have
# collapsed if their spread, averaged over an epoch, is below this fraction of it, or of the targets' spread if that is
# smaller.
COLLAPSED = 0.01


def spread_of(features: Tensor) -> Tensor:
    """Mean standard deviation per dimension () of features (R, D), brought to length 1."""
    return F.normalize(features, dim=1).std(dim=0, correction=0).mean()


class Watch:
    """Watches an epoch of a run; a context manager that shows the progress.

    UserError for a loss that is not finite, and at the end of an epoch whose features have collapsed, or whose loss had
    no gradient.

    sizes: of the epoch's batches. target_spread: spread of the targets that the features have to match, if any. seen:
    what `so_far` returned when the epoch was interrupted. clock: the time and the step of the whole run at which this
    process began.
    """

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        epoch: int,
        sizes: Sequence[int],
        lr: float,
        target_spread: float = math.inf,
        seen: tuple[list[float], list[float]] = ((), ()),
        clock: tuple[float, int] | None = None,
    ):
        self.run, self.recipe, self.epoch, self.lr = run, recipe, epoch, lr
        self.sizes, self.steps = sizes, len(sizes)
        self.target_spread = target_spread
        self.losses, self.spreads = map(list, seen)
        self.begun, self.started = len(self.losses), time.perf_counter()
        self.clock = clock or (self.started, epoch * self.steps + self.begun)
        on_cpu = run.precision.device.type == "cpu"
        self.interval = 1 if on_cpu else min(STEPS_BETWEEN_READS, recipe.print_freq or STEPS_BETWEEN_READS)
        self.pending: list[Tensor] = []
        self.even = 0.0  # the spread of rows that are evenly spread
        self.gradient: Tensor | None = None  # the largest entry of the first step's gradients

    def __enter__(self) -> "Watch":
        # Shown at once, before the first step.
        self.bar = tqdm(
            total=sum(self.sizes),
            initial=sum(self.sizes[: self.begun]),
            desc=f"epoch {self.epoch + 1}/{self.recipe.epochs}",
            unit="img",
            unit_scale=True,
            disable=quiet(),
            leave=False,
        )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def add(self, loss: Tensor, features: Tensor) -> None:
        """Take a step's loss () and features (R, D)."""
        self.even = features.shape[1] ** -0.5 if len(features) > 1 else 0.0
        self.pending.append(torch.stack([loss, spread_of(features)]))
        if len(self.pending) >= self.interval:
            self._read()
        self.bar.update(self.sizes[len(self.losses) + len(self.pending) - 1])

    def add_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients of the first step; those of later steps are not looked at."""
        if self.gradient is None:
            groups = optimizer.param_groups
            there = [weight.grad for group in groups for weight in group["params"] if weight.grad is not None]
            self.gradient = torch.nn.utils.get_total_norm(there, math.inf)

    def _read(self) -> None:
        for loss, spread in torch.stack(self.pending).tolist():
            step = len(self.losses)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {step + 1} of {self.steps} in epoch {self.epoch + 1}: "
                    f"give a smaller --lr (now {self.lr:.3g}) or a larger --temperature; {self._kept()}"
                )
            self.losses.append(loss)
            self.spreads.append(spread)
            overall = self.epoch * self.steps + step
            if overall % self.recipe.log_every_n_steps == 0:
                self.run.scalars(overall, {"step/loss": loss, "step/spread": spread, "step/lr": self.lr})
        self._print()
        self.pending.clear()
        shown = {"loss": f"{self.losses[-1]:.4f}", "spread": f"{self.spreads[-1]:.4f}", "lr": f"{self.lr:.3g}"}
        self.bar.set_postfix(**shown, all_epochs=f"{self.time_left()} left")

    def _print(self) -> None:
        """The line of --print-freq: the seconds a step takes, the loss, and its mean so far."""
        every = self.recipe.print_freq
        if every and (len(self.losses) - 1) % every < len(self.pending):
            each = (time.perf_counter() - self.started) / (len(self.losses) - self.begun)
            mean = sum(self.losses) / len(self.losses)
            self.run.say(
                f"Epoch: [{self.epoch}][{len(self.losses) - 1}/{self.steps}]  Time {each:.3f}  "
                f"Loss {self.losses[-1]:.4f} ({mean:.4f})"
            )

    def time_left(self) -> str:
        """The time that the run's other steps will take, at the pace so far, as [h:]mm:ss."""
        since, first = self.clock
        done = self.epoch * self.steps + len(self.losses)
        pace = (time.perf_counter() - since) / max(1, done - first)
        return tqdm.format_interval(pace * (self.recipe.epochs * self.steps - done))

    def so_far(self) -> tuple[list[float], list[float]]:
        """The losses and spreads of the epoch's steps until now."""
        if self.pending:
            self._read()
        return self.losses, self.spreads

    def close(self) -> tuple[float, float]:
        """The epoch's mean loss, and mean spread: the features' standard deviation per dimension, rows of length 1."""
        loss, spread = (sum(values) / len(values) for values in self.so_far())
        if self.gradient is not None and self.gradient == 0:
            raise UserError(
                f"the loss is {loss:.4g} and its gradient is 0 for every weight, so that nothing is learnt: "
                f"give another --losstype, or a larger temperature; {self._kept()}"
            )
        expected = min(self.even, self.target_spread)
        if spread < COLLAPSED * expected:
            raise UserError(
                f"the features have collapsed to nearly a point in epoch {self.epoch + 1}: their spread is "
                f"{spread:.2g}, {expected:.2g} is to be expected; give another --losstype or a smaller --lr "
                f"(now {self.lr:.3g}); {self._kept()}"
            )
        return loss, spread

    def _kept(self) -> str:
        return f"{self.run.folder} keeps what was finished before this epoch"
