"""The trainer: one loop, for an encoder trained from its own views and for a copy trained from a victim's answers."""

import copy
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from adaptive import Bought, buy
from attacks import Answered, Plan
from data_aug.augment import crop_and_flip, random_views
from defenses.watermark import WatermarkMLP, half_turns
from evaluation import represent
from loss import Loss
from models import SimSiamHeads, read_checkpoint
from models.checkpoint import load_checked
from monitor import Watch, spread_of
from training import Training, check_plan, learning_rate
from utils import Precision, Run, UserError, generator, save_checkpoint
from victim import Purchases, Victim, digest_tensor

# The loss of the images at `index` (B,), random views drawn from the generator, and the features (R, D) it is of.
BatchLoss = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


class SimCLR:
    """Trains `model`, in place, by `train`, `train_head` or `steal` and a loss, inside the folder of `run`.

    `config` is what config.yml says, `extra` what every checkpoint holds besides weights and optimizer. `companion` is
    what is trained with the model: a copy's heads for SimSiam's loss, or a victim's watermark. With `resume` a run that
    was killed goes on from its last finished epoch, and draws what it would have drawn.
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
        resume: bool = False,
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
        # Features that cost an attacker nothing, and are the same when a run is resumed.
        self.untrained = copy.deepcopy(model) if training.max_coverage is not None else None
        self.first_epoch = 0
        self.matched = math.inf  # the spread of what the features have to match, if anything
        self.sources: dict[str, Tensor] = {}  # for each account, the image that each of its queries was of
        self.resumed: dict = {}
        if resume and run.checkpoint.exists():
            self._load(read_checkpoint(run.checkpoint))

    # ---- the three jobs ----

    def train(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Train an encoder with a head on random views of uint8 images (N, 3, H, W), by a loss of `loss.TRAIN_LOSSES`.

        Some losses need the images' labels (N,). With a watermark as companion each step's loss also has the
        cross-entropy of its reading which half turn each image of the batch was given.
        """
        views = self.training.n_views
        if views < self.loss.min_views:
            raise UserError(
                f"this loss compares views: --n-views {views} is too few, give {self.loss.min_views} or more"
            )
        value = self._loss_of(views, labels)
        self._check_batch(len(images))
        if not self._start():
            return
        images = images.to(self.precision.device)

        def losses_of(epoch: int) -> BatchLoss:
            turns = generator(self.training.seed, "turns", epoch)

            def batch_loss(index: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
                chosen = images[index.repeat(views)]
                simple = self.loss.augment == "crop and flip"
                shown = crop_and_flip(chosen, draws) if simple else random_views(chosen, chosen.shape[-1], draws)
                features = self._run(self.model.project, shown)
                loss = value(index, features)
                if self.companion:
                    turned, half = half_turns(images[index], turns)
                    loss = loss + F.cross_entropy(self._run(lambda x: self.companion(self.model(x)), turned), half)
                return loss, features

            return batch_loss

        self._fit(len(images), losses_of)

    def train_head(self, representations: Tensor, projections: Tensor | None = None) -> None:
        """Train a head on representations (V * N, D), view-major, by a loss of `loss.HEAD_LOSSES`.

        Where the victim's own projections (V * N, out) are given, they are what the loss compares the outputs with.
        """
        views, device = self.training.n_views, self.precision.device
        count = len(representations) // views
        value = self._loss_of(views)
        self._check_batch(count)
        if not self._start():
            return
        given = [rows.to(device) for rows in (representations, projections) if rows is not None]
        if projections is not None:
            self.matched = spread_of(given[1]).item()

        def batch_loss(index: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
            rows = torch.cat([index + view * count for view in range(views)])
            h, *targets = (tensor[rows] for tensor in given)
            features = self._run(self.model, h)
            return value(index, features, *targets), features

        self._fit(count, lambda epoch: batch_loss)

    def steal(
        self,
        images: Tensor,
        victim: Victim,
        labels: Tensor | None = None,
        refine: Callable[[Tensor], Tensor] | None = None,
        budget: int | None = None,
    ) -> None:
        """Train on a victim's answers to uint8 images (N, 3, H, W), by a loss of `loss.STEAL_LOSSES` or `LABEL_LOSSES`.

        How it asks is said in `attacks` and `adaptive`. Every query is made once and its answer reused in all epochs;
        the released recipe asks anew in every epoch. `labels` (N,) are for an attacker who has them and a loss that
        needs them. `refine` turns the answers (V * N, D) into the targets (V * N, model.output_dim). An attacker who
        avoids buckets asks about `budget` of the images.
        """
        budget = budget or len(images)
        plan = self.training.plan(self.loss, budget)
        check_plan(plan, self.loss)
        self._check_labels(labels)
        self._check_batch(budget)
        self._check_victim(victim, refine is not None)
        if not self._start():
            return
        released = self.training.recipe == "released"
        if released:  # answers of earlier epochs are not asked again, nor kept: what is known of them is their record
            victim.ledger.load_state_dict(self.resumed.get("ledger", {}))
        self.extra["victim_version"] = victim.version
        images = images.to(self.precision.device)
        ask = functools.partial(self._ask, victim, images, plan, refine)
        once = None if released else ask(self.run.folder / f"answers-{victim.version}.f32")
        index = once.index if once else torch.arange(len(images))
        self._check_batch(len(index))
        value = self._loss_of(plan.views, labels[index] if labels is not None else None)

        def losses_of(epoch: int) -> BatchLoss:
            held = once or ask(epoch=epoch)

            def batch_loss(index: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
                shown, targets = held.batch(index, draws)
                if self.companion:
                    features = self._run(lambda x: self.companion.predict(self.model.output(x)), shown)
                    with torch.no_grad():
                        targets = self._run(self.companion.project, targets)
                else:
                    features = self._run(self.model.output, shown)
                return value(index, features, targets), features

            return batch_loss

        self._fit(len(index), losses_of)
        for answers_file in self.run.folder.glob("answers-*.f32"):
            answers_file.unlink()

    def _ask(
        self,
        victim: Victim,
        images: Tensor,
        plan: Plan,
        refine: Callable[[Tensor], Tensor] | None,
        keep: Path | None = None,
        epoch: int = 0,
    ) -> Answered:
        """Buy what the plan says, enter it in what every checkpoint holds, and say what it cost and met."""
        draws = generator(self.training.seed, "query views", epoch)
        bought = buy(Purchases(victim, keep), images.cpu(), plan, draws, lambda: self._features(images))
        self._enter(victim, images, bought)
        answers = bought.answers.to(self.precision.device)
        answers = refine(answers) if refine else answers
        if not self.companion:
            self.matched = spread_of(answers).item()
        index = bought.index.to(images.device)
        return Answered(images[index], bought.sent.to(images.device), answers, plan, bought.index)

    def _features(self, images: Tensor) -> Tensor:
        """What the copy made of the images before it was trained (N, D), on the CPU: features that cost no query."""
        return represent(self.untrained, images, self.precision).cpu()

    def _enter(self, victim: Victim, images: Tensor, bought: Bought) -> None:
        asked = torch.cat([*bought.sources.values()]).unique()  # also images whose answers were thrown away
        self.extra |= {"ledger": victim.ledger.state_dict(), "query_digests": digest_tensor(images[asked])}
        if "query_indices" in self.extra and len(asked) < len(self.extra["query_indices"]):
            self.extra["query_indices"] = self.extra["query_indices"][asked]
            self.extra["query_set"] = {**self.extra["query_set"], "images": len(asked)}
        summary = "queries: {queries}, of distinct images: {distinct}, calls: {calls}"
        self.run.say(summary.format(**victim.ledger.summary()))
        for words in bought.found:
            self.run.say(f"attacker: {words}")
        for account, more in bought.sources.items():
            self.sources[account] = torch.cat([self.sources.get(account, more[:0]), more])
        self.extra["met"] = victim.met(self.sources)
        for name, figure in self.extra["met"].items():
            self.run.say(f"{name.replace('_', ' ')} {figure:.4g}")

    # ---- the one loop ----

    def _fit(self, count: int, losses_of: Callable[[int], BatchLoss]) -> None:
        """Train for the epochs that are left; `losses_of(epoch)` gives what a batch's loss is in that epoch."""
        training, device = self.training, self.precision.device
        steps = count // training.batch_size
        for epoch in range(self.first_epoch, training.epochs):
            batch_loss = losses_of(epoch)
            self._mode(training=True)
            lr = learning_rate(training, epoch, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            order = torch.randperm(count, generator=generator(training.seed, "order", epoch)).to(device)
            draws = generator(training.seed, "views", epoch)
            watch = Watch(self.run, epoch, steps, training.log_every_n_steps, device, self.matched)
            started = time.perf_counter()
            with tqdm(total=steps * training.batch_size, unit="img", unit_scale=True, disable=None, leave=False) as bar:
                bar.set_description(f"epoch {epoch + 1}/{training.epochs}")
                for step in range(steps):
                    index = order[step * training.batch_size : (step + 1) * training.batch_size]
                    loss, features = batch_loss(index, draws)
                    watch.add(loss.detach(), features.detach(), lr, bar)
                    self.optimizer.zero_grad(set_to_none=True)
                    self.scaler.scale(loss).backward()
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    bar.update(len(index))
            mean, spread = watch.close(lr, bar)
            seconds = time.perf_counter() - started
            self._save(epoch + 1)
            speed = steps * training.batch_size / seconds
            values = {"loss": mean, "spread": spread, "lr": lr, "images_per_second": speed}
            self.run.record((epoch + 1) * steps, {"epoch": epoch, **values, "seconds": seconds})
            self.run.say(
                f"epoch {epoch + 1}/{training.epochs}  loss {mean:.4f}  spread {spread:.4f}  lr {lr:.3g}  "
                f"{speed:.0f} images/s"
            )
        self.run.finish()

    # ---- its parts ----

    def _optimizer(self) -> torch.optim.Optimizer:
        training = self.training
        parameters = [*self.model.parameters(), *(self.companion.parameters() if self.companion else ())]
        options = {"lr": training.lr, "weight_decay": training.weight_decay, "fused": True}
        if training.optimizer == "sgd":
            return torch.optim.SGD(parameters, momentum=training.momentum, **options)
        return torch.optim.Adam(parameters, **options)

    def _check_labels(self, labels: Tensor | None) -> None:
        if self.loss.needs_labels and (labels is None or (labels < 0).any()):
            raise UserError("this loss needs labels and the images have none: choose another --losstype or data set")

    def _check_victim(self, victim: Victim, refined: bool) -> None:
        if not refined and victim.dim != self.model.output_dim:
            raise UserError(
                f"the victim answers {victim.dim} numbers, the copy gives {self.model.output_dim}: "
                f"models.build_copy makes copies that fit"
            )
        if self.resumed and self.resumed["victim_version"] != victim.version:
            raise UserError(
                f"{self.run.checkpoint} was stolen from other weights: the victim has changed, drop --resume"
            )
        unfinished = 0 < self.first_epoch < self.training.epochs
        if unfinished and self.training.recipe == "released" and any(one.remembers for one in victim.defences):
            raise UserError("what a defence remembers of earlier epochs is lost under --recipe released: drop --resume")

    def _loss_of(self, views: int, labels: Tensor | None = None) -> Callable[..., Tensor]:
        """The loss with the settings in force: of the batch's index (B,) and features, `views` rows for each image."""
        self._check_labels(labels)
        if self.loss.needs_labels:
            labels = labels.to(self.precision.device)
        settings = {**vars(self.training), "views": views}
        fixed = {argument: settings[name] for argument, name in self.loss.takes.items() if name != "labels"}

        def value(index: Tensor, *features: Tensor) -> Tensor:
            of_batch = {"labels": labels[index]} if self.loss.needs_labels else {}
            return self.loss(*features, **fixed, **of_batch)

        return value

    def _mode(self, training: bool) -> None:
        self.model.train(training)
        if self.companion:
            self.companion.train(training)

    def _run(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Features in float32 of float images or rows, computed in the precision chosen."""
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=self.precision.memory_format)
        with self.precision.autocast():
            features = network(inputs)
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
            "arch": getattr(self.model, "arch", None),
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "normalize": getattr(self.model, "normalize", None),
            **self.extra,
        }
        if self.companion:
            content[self.companion.kept_as] = self.companion.state_dict()
        save_checkpoint(content, self.run.checkpoint)

    def _load(self, checkpoint: dict) -> None:
        load_checked(self.model, checkpoint["state_dict"], str(self.run.checkpoint))
        if self.companion:
            load_checked(self.companion, checkpoint[self.companion.kept_as], str(self.run.checkpoint))
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.first_epoch = checkpoint["epoch"]
        self.resumed = checkpoint
