"""The trainer: an encoder trained from views of images, a head, a probe, or a copy trained from a victim's answers.

trainer = SimCLR(build_encoder("resnet18", 128), TRAIN_LOSSES["infonce"], Recipe(epochs=200), Run(folder, precision))
trainer.train(Stored(images))
"""

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import Attack
from attacks.answers import Answers
from attacks.buy import buy
from attacks.client import CPU, Client
from data_aug.augment import apply_views, draw_views, rows_of
from data_aug.datasets import to_float
from data_aug.images import Batch, Images, Stored
from data_aug.recipes import VIEW_RECIPES
from defenses.watermark import draw_turns
from jobs.exchange import barrier, processes, share
from training.loop import BatchLoss, Loader, Loop, without_images
from training.monitor import spread_of
from training.objective import Loss
from training.recipe import Recipe
from training.represent import represent, represent_batch
from training.run import Run
from utils import UserError, generator
from victim import AnyVictim, digest_tensor, pack_digests

SPREAD_ROWS = 8192  # answers from which the spread of the targets is estimated


class SimCLR(Loop):
    """Trains `model` in place. Each public method is a kind of training; see `Loop` for the constructor's arguments."""

    def __init__(self, model: nn.Module, loss: Loss, recipe: Recipe, run: Run, companion: nn.Module | None = None):
        # The attacker's own features come from the untrained model, even if a checkpoint is loaded below.
        self._own = copy.deepcopy(model) if run.resume else model
        super().__init__(model, loss, recipe, run, companion)
        self._sources: dict[str, Tensor] = {}  # for each account, the image index of each of its queries

    def train(self, images: Images, labels: Tensor | None = None, views: int = 2) -> None:
        """Train an encoder with a head on random views of images, by a loss of `loss.TRAIN_LOSSES`.

        Some losses need labels (N,), some the companion by `loss.make_companion`. With a watermark as companion, the
        loss of each step also has the watermark's cross-entropy for the half turn that each image was given.
        """
        watermark = None if self.loss.companion else self.companion
        if self.loss.companion and self.companion is None:
            raise UserError("this loss trains a companion too: give SimCLR what loss.make_companion makes")
        if views < self.loss.min_views:
            raise UserError(
                f"this loss compares views: --n-views {views} is too few, give {self.loss.min_views} or more"
            )
        value, count = self._loss_of(views, labels), len(images)
        self._check_batch(count)
        if not self.start():
            return
        images = images.to(self.device)
        height, width = images.size

        def prepare(epoch: int) -> tuple[Loader, BatchLoss]:
            draws = generator(self.recipe.seed, "views", epoch)
            table = draw_views(views * count, height, width, images.view_side, draws, VIEW_RECIPES[self.loss.augment])
            table = table.to(self.device)
            turns = draw_turns(count, generator(self.recipe.seed, "turns", epoch)).to(self.device)

            def batch_loss(batch: Batch) -> tuple[Tensor, Tensor]:
                shown = apply_views(batch.images.repeat(views, 1, 1, 1), table[rows_of(batch.local, views, count)])
                features, *compared = self._compared(shown, views)
                loss = value(batch.index, *compared)
                if watermark:
                    degrees = turns[rows_of(batch.local, 2, count)]
                    loss = loss + watermark.loss(self.model, batch.images, degrees, self.features)
                return loss, features

            return self._loader(images, epoch), batch_loss

        self.fit(count, prepare, drop_last=True)

    def _compared(self, shown: Tensor, views: int) -> tuple[Tensor, ...]:
        """Projections whose spread is watched, and what the loss compares: these, or what its companion makes."""
        if self.loss.companion:
            return self.companion.outputs(self.model, shown.chunk(views), self.features)
        features = self.features(self.model.project, shown, views)
        return features, features

    def mark(self, images: Images, clean: nn.Module) -> None:
        """Put SSLGuard's watermark, the companion, into an encoder that is so far the same as the `clean` one."""
        if processes() > 1:
            raise UserError("SSLGuard's alternating steps are of a single process: start run.py without a launcher")
        count = len(images)
        self._check_batch(count)
        if not self.start():
            return
        images, clean = images.to(self.device), clean.to(self.device, memory_format=self.precision.memory_format).eval()
        self.target_spread = 0.0  # the clean encoder's representations may be close to each other

        def batch_loss(batch: Batch) -> tuple[Tensor, Tensor]:
            losses = self.companion.steps(self.model, clean, to_float(batch.images), self.features)
            for loss, _ in itertools.islice(losses, 2):  # the loop makes the step of the third
                self._step(loss)
            return next(losses)

        self.fit(count, lambda epoch: (self._loader(images, epoch), batch_loss))

    def train_head(self, representations: Tensor, projections: Tensor | None = None, views: int = 2) -> None:
        """Train a head on representations (views * N, D), view-major, by a loss of `loss.HEAD_LOSSES`.

        Where the victim's own projections (views * N, out) are given, the loss compares the head's outputs with these.
        """
        count = len(representations) // views
        value = self._loss_of(views)
        self._check_batch(count)
        if not self.start():
            return
        representations = representations.to(self.device)
        targets = [] if projections is None else [projections.to(self.device)]
        if targets:
            self.target_spread = spread_of(targets[0]).item()

        def batch_loss(batch: Batch) -> tuple[Tensor, Tensor]:
            rows = representations[rows_of(batch.local, views, count)]
            features = self.features(self.model, rows, views)
            whole = rows_of(batch.index, views, count)
            return value(batch.index, features, *(target[whole] for target in targets)), features

        self.fit(count, lambda epoch: (without_images, batch_loss))

    def train_probe(
        self, inputs: Tensor | Images, labels: Tensor, encoder: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Train a classifier by cross-entropy on inputs with labels (N,): representations (N, D) of a frozen encoder.

        Of images the `encoder`, in eval mode, makes the representations anew in every epoch, from that epoch's views.
        """
        self._check_batch(len(labels))
        if not self.start():
            return
        labels = labels.to(self.device)
        self.target_spread = 0.0  # logits of few classes may be close without a collapse
        rows = inputs.to(self.device) if isinstance(inputs, Tensor) else None

        def batch_loss(batch: Batch) -> tuple[Tensor, Tensor]:
            if rows is not None:
                local = rows[batch.local].float()
            else:
                local = represent_batch(encoder, batch.images, self.precision)
            logits = self.features(self.model, local)
            return F.cross_entropy(logits, labels[batch.index]), logits

        def prepare(epoch: int) -> tuple[Loader, BatchLoss]:
            return without_images if rows is not None else self._loader(inputs, epoch), batch_loss

        self.fit(len(labels), prepare)

    def steal(
        self,
        images: Images,
        victim: AnyVictim,
        attack: Attack = Attack(),  # noqa: B008 -- frozen
        labels: Tensor | None = None,
        refine: Callable[[Tensor], Tensor] | None = None,
        own: nn.Module | None = None,
    ) -> None:
        """Train on a victim's answers to N images, by a loss of `loss.STEAL_LOSSES` or `LABEL_LOSSES`.

        Every query is made once and its answer reused in all epochs; the released recipe asks anew in every epoch.
        labels (N,): for an attacker who has them, and a loss that needs them. refine: turns the answers (V * N, D) into
        the targets (V * N, model.output_dim). own: the attacker's own encoder (default: untrained copy). Answers to
        images that are streamed stay in a file, in float16.
        """
        released = self.recipe.recipe == "released"
        count = self._check_attack(images, victim, attack, labels, refine is not None)
        self._own = self._own if own is None else own
        if not self.start():
            return
        if released:  # of the queries of earlier epochs only the record is kept
            victim.ledger.load_state_dict(self.run.record.ledger if self.resumed else {})
        self.run.record.victim_version = victim.version

        def ask(epoch: int = 0) -> Answers:
            keep = self.run.folder / f"queries-{victim.version}-{epoch}"
            self._forget_answers(keep)
            return self._buy(victim, images, attack, count, epoch, keep).to(self.device, refine)

        bought = None if released else ask()
        if bought is not None:
            count = len(bought)
            self._check_batch(count)
            labels = labels[bought.index] if labels is not None else None
        value = self._loss_of(attack.rows, labels)

        def prepare(epoch: int) -> tuple[Loader, BatchLoss]:
            answers = ask(epoch) if bought is None else bought
            self._look_at(answers)
            loader = functools.partial(answers.batches, device=self.device, share=share)
            return loader, self._stealing_loss(answers, attack, value, epoch)

        self.fit(count, prepare, **(self._batches_of_2022(count) if released else {}))
        self._forget_answers()

    def _look_at(self, answers: Answers) -> None:
        """Note the targets' spread. UserError for answers that the loss cannot use."""
        targets = answers.targets(torch.arange(min(SPREAD_ROWS, len(answers.rows))), self.device)
        if not self.companion:
            self.target_spread = spread_of(targets).item()
        if self.loss.nonnegative and (targets < 0).any():
            raise UserError("this loss compares histograms, and answers have negative numbers: give another --losstype")

    def _check_attack(
        self, images: Images, victim: AnyVictim, attack: Attack, labels: Tensor | None, refined: bool
    ) -> int:
        """How many of the images the attack asks about. UserError before any query for settings that cannot work."""
        attack.check(self.loss)
        if self.run.resume and any(self.run.folder.glob("answers-*")):
            raise UserError(f"{self.run.folder} has answers kept by an earlier version: drop --resume")
        if self.recipe.recipe == "released" and (attack.max_coverage is not None or attack.restore):
            raise UserError("--max-coverage and --restore take all answers together: leave out --recipe released")
        count = len(images)
        if attack.max_coverage is not None and victim.budget is not None:
            count = min(count, attack.images(victim.budget))
        self._check_labels(labels)
        self._check_batch(count)
        self._check_victim(victim, refined)
        return count

    def _batches_of_2022(self, count: int) -> dict[str, Any]:
        """Options of `fit`: the query set's images in their order, and of the whole set only its whole batches."""
        whole = (self.run.record.query_set or {}).get("available", count)
        return {"shuffle": False, "drop_last": count == whole, "period": whole // self.recipe.batch_size}

    def _stealing_loss(self, answers: Answers, attack: Attack, value: Callable[..., Tensor], epoch: int) -> BatchLoss:
        """The loss of a batch of an epoch: of the copy's features, or of what the companion makes of both sides."""
        table = answers.draw(generator(self.recipe.seed, "views", epoch))
        table = table.to(self.device) if table is not None else None

        def batch_loss(batch: Batch) -> tuple[Tensor, Tensor]:
            shown, targets = answers.batch(batch, table)
            if self.companion:
                local = targets[rows_of(self._positions(batch), attack.rows, len(batch.index))]
                with torch.no_grad():
                    targets = self.features(self.companion.project, local, attack.rows)
                features = self.features(lambda x: self.companion.predict(self.model.output(x)), shown, attack.rows)
            else:
                features = self.features(self.model.output, shown, attack.rows)
            return value(batch.index, features, targets), features

        return batch_loss

    def _positions(self, batch: Batch) -> Tensor:
        """Where this process's images stand in the batch."""
        return torch.arange(len(batch.index), device=self.device)[share(len(batch.index))]

    def _buy(self, victim: AnyVictim, images: Images, attack: Attack, count: int, epoch: int, keep: Path) -> Answers:
        """Buy what the attack says, enter it in the record that every checkpoint has, and say what it cost."""
        draws = generator(self.recipe.seed, "query views", epoch)
        stored = isinstance(images, Stored)
        client = Client(victim, keep, attack.repeat, np.float32 if stored else np.float16, jitter=attack.jitter)
        bought = buy(client, images.to(CPU), attack, count, draws, self._features)
        asked = torch.cat([*bought.sources.values()]).unique()  # also images whose answers were thrown away
        asked = asked[asked >= 0]
        record = self.run.record
        if record.query_indices is not None and len(asked) < len(record.query_indices):
            record.query_indices = record.query_indices[asked]
            record.query_set = {**record.query_set, "images": len(asked)}
        if stored:
            record.query_digests = digest_tensor(images.tensor[asked])
        else:  # views of them were sent, whose digests the ledger has
            record.query_digests = pack_digests(sorted(victim.ledger.images))
        record.ledger = victim.ledger.state_dict()
        summary = (
            "queries: {queries}, of distinct images: {distinct} (near-copies once: {near_distinct}), calls: {calls}"
        )
        self.run.say(summary.format(**victim.ledger.summary()))
        for words in bought.findings:
            self.run.say(f"attacker: {words}")
        for account, more in bought.sources.items():
            self._sources[account] = torch.cat([self._sources.get(account, more[:0]), more])
        record.defence_report = victim.report(self._sources)
        for name, figure in record.defence_report.items():
            self.run.say(f"{name.replace('_', ' ')} {figure:.4g}")
        barrier()
        return bought

    # ---- its parts ----

    def _features(self, images: Images) -> Tensor:
        """Representations of the images (N, D), on the CPU, by the attacker's own encoder or the untrained copy."""
        return represent(self._own.to(self.device), images, self.precision).cpu()

    def _loader(self, images: Images, epoch: int) -> Loader:
        return lambda batches: images.batches(batches, self.device, epoch, share)

    def _check_labels(self, labels: Tensor | None) -> None:
        if self.loss.needs_labels and (labels is None or (labels < 0).any()):
            raise UserError("this loss needs labels and the images have none: choose another --losstype or data set")

    def _check_victim(self, victim: AnyVictim, refined: bool) -> None:
        if self.loss.nonnegative and self.model.has_head:
            raise UserError(
                "this loss compares histograms, and what a head or a map to the victim's width gives may be negative: "
                "give another --losstype, or a copy as wide as an answer and without a head"
            )
        if not refined and victim.dim != self.model.output_dim:
            raise UserError(
                f"the victim answers {victim.dim} numbers, the copy gives {self.model.output_dim}: "
                f"models.build_copy makes copies that fit"
            )
        if self.resumed and self.resumed["victim_version"] != victim.version:
            raise UserError(
                f"{self.run.checkpoint} was stolen from other weights: the victim has changed, drop --resume"
            )
        unfinished = 0 < self.first_epoch < self.recipe.epochs
        if unfinished and self.recipe.recipe == "released" and victim.stateful:
            raise UserError("what a defence remembers of earlier epochs is lost under --recipe released: drop --resume")

    def _loss_of(self, views: int, labels: Tensor | None = None) -> Callable[..., Tensor]:
        """The loss of a batch's index (B,) and features (views * B, D)."""
        self._check_labels(labels)
        return self.loss.of_batch(views, labels.to(self.device) if self.loss.needs_labels else None)
