"""The trainer: one loop, for an encoder trained from its own views and for a copy trained from a victim's answers."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_aug.augment import random_views
from data_aug.datasets import to_float
from loss import STEAL_LOSSES, TRAIN_LOSSES
from models import SimCLREncoder, read_checkpoint
from models.checkpoint import load_checked
from utils import Precision, Run, UserError, generator, save_checkpoint
from victim import Victim, ask_once, image_digests

# The loss of the images at `index` (B,), random views drawn from the generator.
BatchLoss = Callable[[Tensor, torch.Generator], Tensor]

# Reading the loss off a GPU makes it wait, so there it is looked at once in so many steps; on a CPU in each.
STEPS_BETWEEN_LOOKS = 50


@dataclass(frozen=True)
class Training:
    """The values in force of one training run; the flags of the scripts have the same names."""

    losstype: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int = 0
    n_views: int = 2
    useaug: bool = False
    temperature: float = 0.07
    temperaturesn: float = 100.0
    flat_epochs: int = 10
    recipe: str = "standard"
    log_every_n_steps: int = 200


def learning_rate(training: Training, epoch: int, steps_per_epoch: int) -> float:
    """The learning rate of an epoch, counted from 0: the base rate through epoch `flat_epochs`, then a cosine.

    The cosine's half period is the number of epochs that are left. The released recipe takes the number of batches in
    an epoch instead, as the 2022 code did: its rate may come back up, or hardly fall.
    """
    period = steps_per_epoch if training.recipe == "released" else max(1, training.epochs - training.flat_epochs)
    since = max(0, epoch - training.flat_epochs)
    return training.lr * 0.5 * (1 + math.cos(math.pi * since / period))


class SimCLR:
    """Trains `model`, in place, by `train(images)` or `steal(queries, victim)`, inside the folder of `run`.

    `config` is what config.yml says, `extra` what every checkpoint holds besides weights and optimizer. With `resume`
    a run that was killed goes on from its last finished epoch, and draws what it would have drawn.
    """

    def __init__(
        self,
        model: SimCLREncoder,
        training: Training,
        run: Run,
        precision: Precision,
        config: Mapping | None = None,
        extra: Mapping | None = None,
        resume: bool = False,
        clear: bool = True,
    ):
        self.model = model.to(precision.device, memory_format=precision.memory_format)
        self.training, self.run, self.precision = training, run, precision
        self.config, self.extra, self.clear = dict(config or {}), dict(extra or {}), clear
        self.resume = resume
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True
        )
        self.scaler = precision.grad_scaler()
        self.first_epoch = 0
        self.resumed: dict = {}
        if resume and run.checkpoint.exists():
            self._load(read_checkpoint(run.checkpoint))

    # ---- the two jobs ----

    def train(self, images: Tensor) -> None:
        """Train on random views of uint8 images (N, 3, H, W), by a loss of `loss.TRAIN_LOSSES` on the projections."""
        self._check_batch(len(images))
        if not self._start():
            return
        images = images.to(self.precision.device)
        views, loss = self.training.n_views, self._loss(TRAIN_LOSSES)

        def batch_loss(index: Tensor, draws: torch.Generator) -> Tensor:
            return loss(
                self._run(self.model.project, random_views(images[index.repeat(views)], images.shape[-1], draws))
            )

        self._fit(len(images), lambda epoch: batch_loss)

    def steal(self, images: Tensor, victim: Victim) -> None:
        """Train on a victim's answers to uint8 images (N, 3, H, W), by a loss of `loss.STEAL_LOSSES`.

        With one view the victim is sent the images themselves, with more so many random views of each. Every query is
        made once and its answer reused in all epochs; the released recipe asks anew in every epoch.
        """
        training, device = self.training, self.precision.device
        released = training.recipe == "released"
        self._check_batch(len(images))
        if victim.dim != self.model.dim:
            raise UserError(
                f"the victim answers {victim.dim} numbers, a {self.model.arch} gives {self.model.dim}: "
                f"choose --archstolen of the same width"
            )
        if self.resumed and self.resumed["victim_version"] != victim.version:
            raise UserError(
                f"{self.run.checkpoint} was stolen from other weights: the victim has changed, drop --resume"
            )
        if not self._start():
            return
        victim.ledger.load_state_dict(self.resumed.get("ledger", {}))
        self.extra |= {"query_digests": _digest_tensor(images), "victim_version": victim.version}
        images = images.to(device)
        loss = self._loss(STEAL_LOSSES)
        once = None if released else self._ask(victim, images, self.run.folder / f"answers-{victim.version}.f32")

        def losses_of(epoch: int) -> BatchLoss:
            queries, answers = once or self._ask(victim, images, None, epoch)

            def batch_loss(index: Tensor, draws: torch.Generator) -> Tensor:
                rows = torch.cat([index + view * len(images) for view in range(training.n_views)])
                seen = queries[rows]
                seen = random_views(seen, seen.shape[-1], draws) if training.useaug else to_float(seen)
                return loss(self._run(self.model, seen), answers[rows])

            return batch_loss

        self._fit(len(images), losses_of)
        for answers_file in self.run.folder.glob("answers-*.f32"):
            answers_file.unlink()

    def _ask(self, victim: Victim, images: Tensor, keep: Path | None, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Queries, uint8 (views * N, 3, H, W), and answers (views * N, dim), view-major and on the device."""
        draws = generator(self.training.seed, "query views", epoch)
        queries = _query_views(images, self.training.n_views, draws)
        answers = ask_once(victim, queries, keep).to(images.device)
        self.extra["ledger"] = victim.ledger.state_dict()
        self.run.say(
            "queries: {queries}, of distinct images: {distinct}, calls: {calls}".format(**victim.ledger.summary())
        )
        return queries, answers

    # ---- the one loop ----

    def _fit(self, count: int, losses_of: Callable[[int], BatchLoss]) -> None:
        """Train for the epochs that are left; `losses_of(epoch)` gives what a batch's loss is in that epoch."""
        training, device = self.training, self.precision.device
        steps = count // training.batch_size
        for epoch in range(self.first_epoch, training.epochs):
            batch_loss = losses_of(epoch)
            self.model.train()
            lr = learning_rate(training, epoch, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            order = torch.randperm(count, generator=generator(training.seed, "order", epoch)).to(device)
            draws = generator(training.seed, "views", epoch)
            watch = _LossWatch(self.run, epoch, steps, training.log_every_n_steps, device)
            started = time.perf_counter()
            with tqdm(total=steps * training.batch_size, unit="img", unit_scale=True, disable=None, leave=False) as bar:
                bar.set_description(f"epoch {epoch + 1}/{training.epochs}")
                for step in range(steps):
                    index = order[step * training.batch_size : (step + 1) * training.batch_size]
                    loss = batch_loss(index, draws)
                    watch.add(loss.detach(), lr, bar)
                    self.optimizer.zero_grad(set_to_none=True)
                    self.scaler.scale(loss).backward()
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    bar.update(len(index))
            mean = watch.close(lr, bar)
            seconds = time.perf_counter() - started
            self._save(epoch + 1)
            values = {"loss": mean, "lr": lr, "images_per_second": steps * training.batch_size / seconds}
            self.run.record((epoch + 1) * steps, {"epoch": epoch, **values, "seconds": seconds})
            self.run.say(
                f"epoch {epoch + 1}/{training.epochs}  loss {mean:.4f}  lr {lr:.3g}  "
                f"{values['images_per_second']:.0f} images/s"
            )
        self.run.finish()

    # ---- its parts ----

    def _loss(self, table: Mapping) -> Callable[..., Tensor]:
        loss = table[self.training.losstype]
        options = {argument: getattr(self.training, setting) for argument, setting in loss.takes.items()}
        return lambda *features: loss(*features, **options)

    def _run(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Features in float32 of float images, computed in the precision chosen."""
        with self.precision.autocast():
            features = network(images.contiguous(memory_format=self.precision.memory_format))
        return features.float()

    def _check_batch(self, count: int) -> None:
        if self.training.batch_size > count:
            raise UserError(
                f"batch size {self.training.batch_size} is larger than the {count} images to train on: "
                f"give --batch-size {count} or less"
            )
        if count == 0 or self.training.batch_size < 1:
            raise UserError(f"batch size {self.training.batch_size} for {count} images: both must be at least 1")

    def _start(self) -> bool:
        """Open the run's folder; False when a resumed run is finished already."""
        if self.first_epoch >= self.training.epochs:
            print(f"{self.run.checkpoint} has all {self.training.epochs} epochs already")
            return False
        self.run.start(self.config, self.clear, self.first_epoch)
        if not self.resume:
            for answers_file in self.run.folder.glob("answers-*.f32"):
                answers_file.unlink()
        if self.first_epoch:
            self.run.say(f"resumed after epoch {self.first_epoch}")
        return True

    def _save(self, epochs_done: int) -> None:
        content = {
            "epoch": epochs_done,
            "arch": self.model.arch,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "normalize": self.model.normalize,
            **self.extra,
        }
        save_checkpoint(content, self.run.checkpoint)

    def _load(self, checkpoint: dict) -> None:
        load_checked(self.model, checkpoint["state_dict"], str(self.run.checkpoint))
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.first_epoch = checkpoint["epoch"]
        self.resumed = checkpoint


def _query_views(images: Tensor, views: int, draws: torch.Generator) -> Tensor:
    """What the victim is sent, uint8 (views * N, 3, H, W), view-major: an API takes images of 8 bits."""
    if views == 1:
        return images
    sent = []
    for _ in range(views):
        for part in images.split(1024):
            sent.append((random_views(part, part.shape[-1], draws) * 255).round().to(torch.uint8))
    return torch.cat(sent)


def _digest_tensor(images: Tensor) -> Tensor:
    """Digests of images as uint8 (N, 16): by them an evaluation knows which images were queried."""
    return torch.frombuffer(bytearray(b"".join(image_digests(images))), dtype=torch.uint8).view(-1, 16)


class _LossWatch:
    """Looks at the losses of one epoch without holding up the device, and stops at one that is not finite."""

    def __init__(self, run: Run, epoch: int, steps: int, log_every: int, device: torch.device):
        self.run, self.epoch, self.steps, self.log_every = run, epoch, steps, log_every
        self.interval = 1 if device.type == "cpu" else STEPS_BETWEEN_LOOKS
        self.pending: list[Tensor] = []
        self.seen: list[float] = []

    def add(self, loss: Tensor, lr: float, bar: tqdm) -> None:
        self.pending.append(loss)
        if len(self.pending) >= self.interval:
            self._look(lr, bar)

    def _look(self, lr: float, bar: tqdm) -> None:
        for value in torch.stack(self.pending).tolist():
            step = len(self.seen)
            if not math.isfinite(value):
                raise UserError(
                    f"the loss is {value} at step {step + 1} of {self.steps} in epoch {self.epoch + 1}: "
                    f"give a smaller --lr (now {lr:.3g}) or a larger --temperature; "
                    f"{self.run.folder} keeps what was finished before this epoch"
                )
            self.seen.append(value)
            if (self.epoch * self.steps + step) % self.log_every == 0:
                self.run.scalars(self.epoch * self.steps + step, {"step/loss": value, "step/lr": lr})
        self.pending.clear()
        bar.set_postfix(loss=f"{self.seen[-1]:.4f}", lr=f"{lr:.3g}")

    def close(self, lr: float, bar: tqdm) -> float:
        """The mean loss of the epoch."""
        if self.pending:
            self._look(lr, bar)
        return sum(self.seen) / len(self.seen)
