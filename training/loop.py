"""The training loop: steps, checkpoints and resuming, in a single process or in several."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_aug.images import Batch
from files.reading import reading
from files.writing import save_checkpoint
from jobs.ending import Stopped, deferred, received
from jobs.exchange import any_of, barrier, parallel, processes, share, whole_batch
from models import read_checkpoint
from models.checkpoint import load_checked
from training.compiling import compiled, compiles
from training.lars import LARS
from training.monitor import Watch
from training.objective import Loss
from training.recipe import Recipe, learning_rate
from training.resuming import load_optimizer
from training.run import Run, relative
from utils import UserError, first_process, generator

# A batch -> its loss, and the features it is computed from.
BatchLoss = Callable[[Batch], tuple[Tensor, Tensor]]
# The batches' indices (B,) -> the batches.
Loader = Callable[[Sequence[Tensor]], Iterable[Batch]]


def without_images(batches: Sequence[Tensor]) -> Iterable[Batch]:
    """A `Loader` of batches of indices alone, for training on rows."""
    return (Batch(index, index[share(len(index))], index[:0]) for index in batches)


class Loop:
    """Trains `model`, in place, by a loss and a recipe, inside the folder of `run`.

    `companion` is trained with the model, and saved in its checkpoint under `companion.checkpoint_key`: a copy's heads
    for SimSiam's loss, a victim's watermark, or what the victim's loss trains beside it. It may have two methods:

    groups(model)                the optimizer's groups of parameters. A group's `rate`, times `decay` after each epoch,
                                 replaces the recipe's rate; with `constant` that has no schedule
    after_step(model, progress)  called after each step of the optimizer, in every process; progress is the share of the
                                 run's steps that came before

    A resumed run continues after its last finished epoch, or from the step at which a signal stopped it, with the draws
    that the uninterrupted run would have made. With several processes a batch is shared among them, and the weights are
    those of a single process up to rounding, where they can share an epoch's last batch too.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        recipe: Recipe,
        run: Run,
        companion: nn.Module | None = None,
    ):
        self.precision = run.precision
        self.device = run.precision.device
        self.model = model.to(self.device, memory_format=self.precision.memory_format)
        self.companion = companion.to(self.device, memory_format=self.precision.memory_format) if companion else None
        self.loss, self.recipe, self.run = loss, recipe, run
        self.optimizer = self._optimizer()
        self.scaler = self.precision.grad_scaler()
        self.first_epoch = 0
        self.target_spread = math.inf  # of the targets that the features have to match, if any
        self.resumed: dict = {}
        self.kept: dict = {}  # further entries of each checkpoint
        source = run.resume if isinstance(run.resume, Path) else run.checkpoint
        if isinstance(run.resume, Path) or (run.resume and source.exists()):
            self._load(read_checkpoint(source), str(source))
        self._call = None
        self._steps = 0  # of the whole run
        self._networks: dict[Callable, Callable] = {}  # those of the model, compiled or as they are
        self._clock: tuple[float, int] | None = None  # when this process began to train, and at which step

    def fit(
        self,
        count: int,
        prepare: Callable[[int], tuple[Loader, BatchLoss]],
        shuffle: bool = True,
        drop_last: bool = False,
        period: int | None = None,
    ) -> None:
        """Train on `count` images for the epochs that are left.

        `prepare(epoch)` returns what turns the epoch's batches of indices into batches of images, and the loss of such
        a batch. shuffle, drop_last: see `index_of_epoch`. period: what `learning_rate` takes as an epoch's steps.
        """
        self._call = parallel(*(module for module in (self.model, self.companion) if module))
        try:
            with deferred():
                for epoch in range(self.first_epoch, self.recipe.epochs):
                    index = index_of_epoch(self.recipe, epoch, count, shuffle, drop_last)
                    self._steps = len(index) * self.recipe.epochs
                    self._epoch(epoch, index, period or len(index), *prepare(epoch))
                if self.recipe.epochs == 0:
                    self._save(0)
            barrier()  # what comes next may read what rank 0 wrote
        finally:
            self.run.finish()

    def _epoch(self, epoch: int, index: Sequence[Tensor], period: int, load: Loader, batch_loss: BatchLoss) -> None:
        """Train for an epoch of these batches, or what is left of it, and save."""
        recipe, steps = self.recipe, len(index)
        begun = self._begun(epoch)
        lr = learning_rate(recipe, epoch, period)
        for group in self.optimizer.param_groups:
            scheduled = recipe.lr if group.get("constant") else lr
            group["lr"] = group.get("rate", scheduled) * group.get("decay", 1.0) ** epoch
        self._mode(training=True)
        sizes = [len(part) for part in index]
        batches = torch.cat([*index]).to(self.device).split(sizes)[begun["step"] :]
        started = time.perf_counter()
        self._clock = self._clock or (started, epoch * steps + begun["step"])
        progress = Watch(self.run, recipe, epoch, sizes, lr, self.target_spread, begun["seen"], self._clock)
        with progress as watch, contextlib.closing(_closable(load(batches))) as items:
            for step, batch in enumerate(items, begun["step"]):
                self._stop_if_told(epoch, step, watch)
                loss, features = batch_loss(batch)
                watch.add(loss.detach(), features.detach())
                self._step(loss, watch)
                if hasattr(self.companion, "after_step"):
                    self.companion.after_step(self.model, (epoch * steps + step) / self._steps)
            mean, spread = watch.close()
        seconds = time.perf_counter() - started
        speed = sum(sizes[begun["step"] :]) / seconds
        values = {"loss": mean, "spread": spread, "lr": lr, "images_per_second": speed}
        # Before the checkpoint: a run that resumes from an earlier one drops the line, and makes it again.
        self.run.log((epoch + 1) * steps, {"epoch": epoch, **values, "seconds": seconds})
        self._save(epoch + 1)
        self.run.say(
            f"epoch {epoch + 1}/{recipe.epochs}  loss {mean:.4f}  spread {spread:.4f}  lr {lr:.3g}  "
            f"{speed:.0f} images/s"
        )

    def _step(self, loss: Tensor, watch: Watch | None = None) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over the processes, and their sum is that of the whole batch.
        self.scaler.scale(loss * processes()).backward()
        if watch:
            watch.add_gradients(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def features(self, network: Callable[[Tensor], Tensor], inputs: Tensor, views: int = 1) -> Tensor:
        """Features of the whole batch in float32, from this process's float images or rows, `views` of each image.

        They are computed in the run's precision; other processes' rows carry no gradient.
        """
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=self.precision.memory_format)
            network = self._fast(network, inputs)
        with self.precision.autocast():
            local = self._call(network, inputs)
        return whole_batch(local.float(), views)

    def _fast(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """A method of the model, compiled where the run is long enough; other functions as they are."""
        if getattr(network, "__self__", None) is not self.model:
            return network
        if network not in self._networks:
            images = len(inputs) * self._steps
            worth = compiles(self.recipe, self.precision, images)
            if worth:
                self.run.say(f"compiling {network.__name__} for {images:,} images; the first step waits for it")
            self._networks[network] = compiled(network, inputs) if worth else network
        return self._networks[network]

    def start(self) -> bool:
        """Open the run's folder; False when a resumed run is finished already."""
        if self.first_epoch >= self.recipe.epochs > 0:
            print(f"{relative(self.run.folder)} has all {self.recipe.epochs} epochs already")
            self._forget_answers()
            return False
        self.run.start(self.first_epoch)
        if not self.run.resume:
            self._forget_answers()
        if self.resumed:
            step = self._begun(self.first_epoch)["step"]
            self.run.say(f"resumed after epoch {self.first_epoch}" + (f", step {step}" if step else ""))
            if isinstance(self.run.resume, Path):
                others = sorted(f"{name} {value}" for name, value in self.run.differences(self.resumed).items())
                self.run.say(f"{relative(self.run.resume)} is of {', '.join(others) or 'the same settings'}")
        barrier()
        return True

    # ---- its parts ----

    def _begun(self, epoch: int) -> dict:
        """Where an epoch starts: at its first step, or where a signal stopped it."""
        begun = self.resumed.get("begun") if epoch == self.resumed.get("epoch") else None
        return begun or {"step": 0, "seen": ([], [])}

    def _stop_if_told(self, epoch: int, step: int, watch: Watch) -> None:
        """Save at this step and raise Stopped, in all processes together, when a process got a signal."""
        if processes() > 1 and step % watch.interval:
            return  # asking the others takes time
        if not any_of(received() is not None):
            return
        if self.recipe.recipe == "released":  # a checkpoint has the ledger as it is after whole epochs
            saved = f"after epoch {epoch}"
        else:
            self._save(epoch, {"begun": {"step": step, "seen": watch.so_far()}})
            saved = f"at step {step + 1} of epoch {epoch + 1}"
        barrier()  # nobody leaves before rank 0 has written
        raise Stopped(f"stopped {saved} by {received() or 'a signal to another process'}: --resume goes on from there")

    def _optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        if hasattr(self.companion, "groups"):  # parts with learning rates of their own
            parameters = self.companion.groups(self.model)
        else:
            modules = [module for module in (self.model, self.companion) if module]
            parameters = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
        options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        if recipe.optimizer == "adam":
            return torch.optim.Adam(parameters, **options, fused=True)
        if recipe.optimizer == "lars":
            return LARS(parameters, **options, momentum=recipe.momentum)
        return torch.optim.SGD(parameters, **options, momentum=recipe.momentum, fused=True)

    def _mode(self, training: bool) -> None:
        self.model.train(training)
        if self.companion:
            self.companion.train(training)

    def _check_batch(self, count: int) -> None:
        size = self.recipe.batch_size
        if size > count:
            raise UserError(
                f"batch size {size} is larger than the {count} images to train on: give --batch-size {count} or less"
            )
        if size % processes():
            raise UserError(
                f"batch size {size} cannot be shared equally by {processes()} processes: "
                f"give --batch-size {-(-size // processes()) * processes()}"
            )

    def _forget_answers(self, but: Path | None = None) -> None:
        """Delete the files of queries, all of them or `but` this."""
        if first_process():
            for queries in {*self.run.folder.glob("queries-*"), *self.run.folder.glob("answers-*")} - {but}:
                queries.unlink()

    def _save(self, epochs_done: int, more: Mapping | None = None) -> None:
        content = {
            "epoch": epochs_done,
            "arch": getattr(self.model, "arch", None),
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "normalize": getattr(self.model, "normalize", None),
            "input_size": getattr(self.model, "input_size", None),
            **{name: self.run.config[name] for name in ("kind", "settings") if name in self.run.config},
            **self.run.record.state_dict(),
            **self.kept,
            **(more or {}),
        }
        if self.companion:
            content[self.companion.checkpoint_key] = self.companion.state_dict()
        save_checkpoint(content, self.run.checkpoint)

    def _load(self, checkpoint: dict[str, Any], source: str) -> None:
        missing = {"state_dict", "optimizer", "scaler", "epoch"} - checkpoint.keys()
        if missing:
            raise UserError(f"{source} is not the checkpoint of a run, it has no {', '.join(sorted(missing))}")
        with reading(source, "the checkpoint of a run"):
            load_checked(self.model, checkpoint["state_dict"], source)
            if self.companion:
                load_checked(self.companion, checkpoint.get(self.companion.checkpoint_key, {}), source)
            load_optimizer(self.optimizer, checkpoint["optimizer"], source)
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.first_epoch = checkpoint["epoch"]
        self.run.record.load_state_dict(checkpoint)
        self.resumed = checkpoint


def index_of_epoch(
    recipe: Recipe, epoch: int, count: int, shuffle: bool = True, drop_last: bool = False
) -> Sequence[Tensor]:
    """The batches of an epoch on `count` images, indices (B,) each, in an order by the seed or, unshuffled, their own.

    The images that are left over by the whole batches make a last, smaller batch, unless it is to be dropped or is of a
    single image, which neither batch norm nor a contrastive loss can use. Several processes share each batch equally:
    of the smaller batch they leave out the images beyond a multiple of their number.
    """
    order = torch.randperm(count, generator=generator(recipe.seed, "order", epoch)) if shuffle else torch.arange(count)
    rest = count % recipe.batch_size
    used = 0 if drop_last or rest == 1 else rest - rest % processes()
    return order[: count - rest + used].split(recipe.batch_size)


def _closable(items: Iterable[Batch]) -> Iterator[Batch]:
    """Yields the items. Closing the generator closes their loader, such as the workers of a DataLoader."""
    yield from items
