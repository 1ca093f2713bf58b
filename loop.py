"""The one training loop: its steps, what it saves, how it goes on after an interruption, in one process or in many."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from defenses.watermark import WatermarkMLP
from distributed import any_of, barrier, parallel, processes, whole_batch
from lars import LARS
from loss import Loss
from models import SimSiamHeads, read_checkpoint
from models.checkpoint import load_checked
from monitor import Watch
from stopping import Stopped, deferred, received
from training import Training, learning_rate
from utils import Precision, Run, UserError, first_process, generator, quiet, save_checkpoint


class Draws:
    """An epoch's random draws: a CPU generator for each purpose, made when first asked for."""

    def __init__(self, seed: int, epoch: int, states: Mapping[str, Tensor] | None = None):
        self.seed, self.epoch = seed, epoch
        self.generators = {purpose: generator(seed, purpose, epoch) for purpose in states or {}}
        for purpose, state in (states or {}).items():
            self.generators[purpose].set_state(state)

    def __getitem__(self, purpose: str) -> torch.Generator:
        if purpose not in self.generators:
            self.generators[purpose] = generator(self.seed, purpose, self.epoch)
        return self.generators[purpose]

    def states(self) -> dict[str, Tensor]:
        """What `states` takes to go on from here."""
        return {purpose: one.get_state() for purpose, one in self.generators.items()}


# What `load` gives for a batch (by default its index (B,)) and the epoch's draws -> the loss, and features it is of.
BatchLoss = Callable[[Any, Draws], tuple[Tensor, Tensor]]


class Loop:
    """Trains `model`, in place, by a loss, inside the folder of `run`.

    `config` is what config.yml says, `extra` what every checkpoint holds besides weights and optimizer. `companion` is
    what is trained with the model: a copy's heads for SimSiam's loss, or a victim's watermark. With `resume` a run that
    was killed (or the one of the file that it names) goes on from its last finished epoch, one that was told to stop
    from the step where it stopped, and draws what it would have drawn. In a job of several processes a batch is the
    job's, and the weights are, but for rounding, those of one process.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        training: Training,
        run: Run,
        precision: Precision,
        config: Mapping | None = None,
        extra: Mapping | None = None,
        resume: bool | Path = False,
        clear: bool = True,
        companion: SimSiamHeads | WatermarkMLP | None = None,
    ):
        self.model = model.to(precision.device, memory_format=precision.memory_format)
        self.companion = companion.to(precision.device) if companion else None
        self.loss, self.training, self.run, self.precision = loss, training, run, precision
        self.config, self.extra, self.clear = dict(config or {}), dict(extra or {}), clear
        self.resume = resume
        self.optimizer = self._optimizer()
        self.scaler = precision.grad_scaler()
        self.first_epoch = 0
        self.matched = math.inf  # the spread of what the features have to match, if anything
        self.resumed: dict = {}
        source = resume if isinstance(resume, Path) else run.checkpoint
        if isinstance(resume, Path) or (resume and source.exists()):
            self._load(read_checkpoint(source), str(source))
        self._call = None

    def fit(
        self,
        count: int,
        losses_of: Callable[[int], BatchLoss],
        load: Callable[[Sequence[Tensor], int], Iterable[Any]] = lambda batches, epoch: batches,
    ) -> None:
        """Train for the epochs that are left on `count` images.

        `losses_of(epoch)` gives what a batch's loss is in that epoch; `load` takes the indices (B,) of an epoch's
        batches and gives one after the other what that loss takes.
        """
        self._call = parallel(*(one for one in (self.model, self.companion) if one))
        try:
            with deferred():
                for epoch in range(self.first_epoch, self.training.epochs):
                    self._epoch(epoch, count, losses_of(epoch), load)
            barrier()  # what comes next may read what the first process wrote
        finally:
            self.run.finish()

    def _epoch(self, epoch: int, count: int, batch_loss: BatchLoss, load: Callable) -> None:
        """Train for one epoch, or what is left of it, and save."""
        training, device = self.training, self.precision.device
        steps = count // training.batch_size
        begun = self._begun(epoch)
        lr = learning_rate(training, epoch, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._mode(training=True)
        order = torch.randperm(count, generator=generator(training.seed, "order", epoch)).to(device)
        batches = order[: steps * training.batch_size].split(training.batch_size)[begun["step"] :]
        draws = Draws(training.seed, epoch, begun["draws"])
        looks = (training.log_every_n_steps, device, self.matched, begun["seen"], training.print_freq)
        watch = Watch(self.run, epoch, steps, *looks)
        started = time.perf_counter()
        with self._bar(epoch, steps) as bar, contextlib.closing(_closable(load(batches, epoch))) as items:
            bar.update(begun["step"] * training.batch_size)
            for step, item in enumerate(items, begun["step"]):
                self._stop_if_told(epoch, step, draws, watch, lr, bar)
                loss, features = batch_loss(item, draws)
                watch.add(loss.detach(), features.detach(), lr, bar)
                self.optimizer.zero_grad(set_to_none=True)
                # Gradients are averaged over the processes, and their sum is that of the whole batch.
                self.scaler.scale(loss * processes()).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                bar.update(training.batch_size)
            mean, spread = watch.close(lr, bar)
        seconds = time.perf_counter() - started
        self._save(epoch + 1)
        speed = len(batches) * training.batch_size / seconds
        values = {"loss": mean, "spread": spread, "lr": lr, "images_per_second": speed}
        self.run.record((epoch + 1) * steps, {"epoch": epoch, **values, "seconds": seconds})
        self.run.say(
            f"epoch {epoch + 1}/{training.epochs}  loss {mean:.4f}  spread {spread:.4f}  lr {lr:.3g}  "
            f"{speed:.0f} images/s"
        )

    def features(self, network: Callable[[Tensor], Tensor], inputs: Tensor, views: int = 1) -> Tensor:
        """Features of the whole batch in float32, from this process's float images or rows, `views` of each image.

        They are computed in the precision chosen; other processes' rows carry no gradient.
        """
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=self.precision.memory_format)
        with self.precision.autocast():
            own = self._call(network, inputs)
        return whole_batch(own.float(), views)

    # ---- its parts ----

    def _bar(self, epoch: int, steps: int) -> tqdm:
        total, name = steps * self.training.batch_size, f"epoch {epoch + 1}/{self.training.epochs}"
        return tqdm(total=total, desc=name, unit="img", unit_scale=True, disable=quiet(), leave=False)

    def _begun(self, epoch: int) -> dict:
        """Where an epoch starts: at its first step, unless a run that was told to stop had begun it."""
        begun = self.resumed.get("begun") if epoch == self.resumed.get("epoch") else None
        return begun or {"step": 0, "draws": {}, "seen": ([], [])}

    def _stop_if_told(self, epoch: int, step: int, draws: Draws, watch: Watch, lr: float, bar: tqdm) -> None:
        """Save at this step and raise Stopped, in all processes together, when one of them got a signal."""
        if processes() > 1 and step % watch.interval:
            return  # asking the others takes time
        if not any_of(received() is not None):
            return
        if self.training.recipe == "released":  # it asks anew in each epoch: one that is cut would be paid for twice
            saved = f"after epoch {epoch}"
        else:
            seen = watch.so_far(lr, bar)
            self._save(epoch, {"begun": {"step": step, "draws": draws.states(), "seen": seen}})
            saved = f"at step {step + 1} of epoch {epoch + 1}"
        barrier()  # nobody leaves before the first process has written
        raise Stopped(f"stopped {saved} by {received() or 'a signal to another process'}: --resume goes on from there")

    def _optimizer(self) -> torch.optim.Optimizer:
        training = self.training
        parameters = [*self.model.parameters(), *(self.companion.parameters() if self.companion else ())]
        options = {"lr": training.lr, "weight_decay": training.weight_decay}
        if training.optimizer == "adam":
            return torch.optim.Adam(parameters, **options, fused=True)
        if training.optimizer == "lars":
            return LARS(parameters, **options, momentum=training.momentum)
        return torch.optim.SGD(parameters, **options, momentum=training.momentum, fused=True)

    def _mode(self, training: bool) -> None:
        self.model.train(training)
        if self.companion:
            self.companion.train(training)

    def _check_batch(self, count: int) -> None:
        size = self.training.batch_size
        if size > count:
            raise UserError(
                f"batch size {size} is larger than the {count} images to train on: give --batch-size {count} or less"
            )
        if count == 0 or size < 1:
            raise UserError(f"batch size {size} for {count} images: both must be at least 1")
        if size % processes():
            raise UserError(
                f"batch size {size} cannot be shared equally by {processes()} processes: "
                f"give --batch-size {-(-size // processes()) * processes()}"
            )

    def start(self) -> bool:
        """Open the run's folder; False when a resumed run is finished already."""
        if self.first_epoch >= self.training.epochs:
            print(f"{self.run.checkpoint} has all {self.training.epochs} epochs already")
            return False
        self.run.start(self.config, self.clear, self.first_epoch)
        if not self.resume:
            self._forget_answers()
        if self.resumed:
            step = self._begun(self.first_epoch)["step"]
            self.run.say(f"resumed after epoch {self.first_epoch}" + (f", step {step}" if step else ""))
        barrier()
        return True

    def _forget_answers(self) -> None:
        if first_process():
            for answers_file in self.run.folder.glob("answers-*"):
                answers_file.unlink()

    def _save(self, epochs_done: int, more: Mapping | None = None) -> None:
        content = {
            "epoch": epochs_done,
            "arch": getattr(self.model, "arch", None),
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "normalize": getattr(self.model, "normalize", None),
            "input_size": getattr(self.model, "input_size", None),
            **self.extra,
            **(more or {}),
        }
        if self.companion:
            content[self.companion.kept_as] = self.companion.state_dict()
        save_checkpoint(content, self.run.checkpoint)

    def _load(self, checkpoint: dict, source: str) -> None:
        missing = {"state_dict", "optimizer", "scaler", "epoch"} - checkpoint.keys()
        if missing:
            raise UserError(f"{source} is not the checkpoint of a run, it has no {', '.join(sorted(missing))}")
        load_checked(self.model, checkpoint["state_dict"], source)
        if self.companion:
            load_checked(self.companion, checkpoint[self.companion.kept_as], source)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.first_epoch = checkpoint["epoch"]
        self.resumed = checkpoint


def _closable(items: Iterable[Any]) -> Iterator[Any]:
    """The items one after the other; closing it closes what loads them, such as the workers of a DataLoader."""
    yield from items
