"""The trainer: an encoder trained from its own views, a head, or a copy trained from a victim's answers."""

import copy
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive import Bought, buy
from attacks import Answered, Plan, Streamed, StreamedAnswers
from data_aug.augment import crop_and_flip, random_views
from defenses.watermark import half_turns
from distributed import Part, barrier
from evaluation import represent, represent_batch
from loop import BatchLoss, Draws, Loop
from monitor import spread_of
from training import check_plan
from utils import UserError, generator
from victim import Purchases, Victim, as_tensor, digest_tensor


class SimCLR(Loop):
    """Trains `model`, in place, by `train`, `train_head`, `steal` or `read_out`; `loop.Loop` says by what."""

    def __init__(self, model: torch.nn.Module, *args, **options):
        super().__init__(model, *args, **options)
        # Features that cost an attacker nothing, and are the same when a run is resumed.
        self.untrained = copy.deepcopy(model) if self.training.max_coverage is not None else None
        self.sources: dict[str, Tensor] = {}  # for each account, the image that each of its queries was of

    # ---- its jobs ----

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
        if not self.start():
            return
        images = images.to(self.precision.device)
        simple = self.loss.augment == "crop and flip"

        def batch_loss(index: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
            part = Part.of(len(index), views, index.device)
            chosen, views_of = images[index.repeat(views)[part.own]], draws["views"]
            if simple:
                shown = crop_and_flip(chosen, views_of, part=part)
            else:
                shown = random_views(chosen, chosen.shape[-1], views_of, part)
            features = self.features(self.model.project, shown, views)
            loss = value(index, features)
            if self.companion:
                loss = loss + self._mark(images[index], draws["turns"])
            return loss, features

        self.fit(len(images), lambda epoch: batch_loss)

    def _mark(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """The watermark's loss () on a batch of images (B, 3, H, W)."""
        turned, half = half_turns(images, draws, Part.of(len(images), 2, images.device))
        return F.cross_entropy(self.features(lambda x: self.companion(self.model(x)), turned, 2), half)

    def train_head(self, representations: Tensor, projections: Tensor | None = None) -> None:
        """Train a head on representations (V * N, D), view-major, by a loss of `loss.HEAD_LOSSES`.

        Where the victim's own projections (V * N, out) are given, they are what the loss compares the outputs with.
        """
        views, device = self.training.n_views, self.precision.device
        count = len(representations) // views
        value = self._loss_of(views)
        self._check_batch(count)
        if not self.start():
            return
        representations = representations.to(device)
        targets = [] if projections is None else [projections.to(device)]
        if targets:
            self.matched = spread_of(targets[0]).item()

        def batch_loss(index: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
            rows = torch.cat([index + view * count for view in range(views)])
            own = rows[Part.of(len(index), views, device).own]
            features = self.features(self.model, representations[own], views)
            return value(index, features, *(target[rows] for target in targets)), features

        self.fit(count, lambda epoch: batch_loss)

    def steal(
        self,
        images: Tensor | Streamed,
        victim: Victim,
        labels: Tensor | None = None,
        refine: Callable[[Tensor], Tensor] | None = None,
        budget: int | None = None,
    ) -> None:
        """Train on a victim's answers to uint8 images (N, 3, H, W), by a loss of `loss.STEAL_LOSSES` or `LABEL_LOSSES`.

        How it asks is said in `attacks` and `adaptive`. Every query is made once and its answer reused in all epochs;
        the released recipe asks anew in every epoch. `labels` (N,) are for an attacker who has them and a loss that
        needs them. `refine` turns the answers (V * N, D) into the targets (V * N, model.output_dim). An attacker who
        avoids buckets asks about `budget` of the images. Images that are streamed are asked about once each, and their
        answers stay in a file.
        """
        budget = budget or len(images)
        plan = self.training.plan(self.loss, budget)
        check_plan(plan, self.loss)
        self._check_labels(labels)
        self._check_batch(budget)
        self._check_victim(victim, refine is not None)
        if not self.start():
            return
        released = self.training.recipe == "released"
        if released:  # answers of earlier epochs are not asked again, nor kept: what is known of them is their record
            victim.ledger.load_state_dict(self.resumed.get("ledger", {}))
        self.extra["victim_version"] = victim.version
        keep = self.run.folder / f"answers-{victim.version}"
        if isinstance(images, Streamed):
            once = self._ask_streamed(victim, images, plan, keep)
        else:
            images = images.to(self.precision.device)
            ask = functools.partial(self._ask, victim, images, plan, refine)
            once = None if released else ask(keep)
        index = once.index if once else torch.arange(len(images))
        self._check_batch(len(index))
        value = self._loss_of(plan.views, labels[index] if labels is not None else None)

        def losses_of(epoch: int) -> BatchLoss:
            held = once or ask(epoch=epoch)

            def batch_loss(item: Tensor | tuple[Tensor, Tensor], draws: Draws) -> tuple[Tensor, Tensor]:
                index, shown, targets = held.batch(item, draws["views"])
                if self.companion:
                    own = targets[Part.of(len(index), plan.views, targets.device).own]
                    with torch.no_grad():
                        targets = self.features(self.companion.project, own, plan.views)
                    features = self.features(lambda x: self.companion.predict(self.model.output(x)), shown, plan.views)
                else:
                    features = self.features(self.model.output, shown, plan.views)
                return value(index, features, targets), features

            return batch_loss

        self.fit(len(index), losses_of, *([once.load] if once else []))
        self._forget_answers()

    def read_out(
        self,
        images: Tensor | Streamed,
        labels: Tensor,
        encoder: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Train a classifier by cross-entropy on rows (N, D) with labels (N,): representations of a frozen encoder.

        Of images that are streamed the `encoder` in eval mode makes them anew in every epoch, from the views of it.
        """
        device = self.precision.device
        self._check_batch(len(labels))
        if not self.start():
            return
        labels = labels.to(device)
        self.matched = 0.0  # scores of few classes may be alike without having collapsed
        held = images if isinstance(images, Streamed) else images.to(device)

        def batch_loss(item: Tensor | tuple[Tensor, Tensor], draws: Draws) -> tuple[Tensor, Tensor]:
            if isinstance(item, Tensor):
                index, own = item, held[item[Part.of(len(item), 1, device).own]].float()
            else:
                index, own = item[0], represent_batch(encoder, item[1], self.precision)
            logits = self.features(self.model, own)
            return F.cross_entropy(logits, labels[index]), logits

        def load(batches: list[Tensor], epoch: int) -> Iterable:
            return images.shares(batches, device, epoch) if isinstance(images, Streamed) else batches

        self.fit(len(labels), lambda epoch: batch_loss, load)

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

    def _ask_streamed(self, victim: Victim, queries: Streamed, plan: Plan, keep: Path) -> StreamedAnswers:
        """Buy the answers to images that don't fit in memory; they stay in the file that keeps them, as float16."""
        purchases = Purchases(victim, keep, dtype=np.float16)
        spreads = []
        # On the CPU, where the ledger takes their digests; the victim sends them on to its device.
        parts = functools.partial(queries.parts, device=torch.device("cpu"))
        for answers in purchases.ask_each(len(queries), parts):
            spreads.append(spread_of(answers).item())
        if not self.companion:
            self.matched = max(spreads)
        number = torch.arange(len(queries))
        self._record(victim, {"default": number}, as_tensor(sorted(victim.ledger.accounts["default"].images)))
        barrier()  # the first process has written all of the file
        return StreamedAnswers(queries, purchases.answers(len(queries)), plan, number, self.precision.device)

    def _features(self, images: Tensor) -> Tensor:
        """What the copy made of the images before it was trained (N, D), on the CPU: features that cost no query."""
        return represent(self.untrained, images, self.precision).cpu()

    def _enter(self, victim: Victim, images: Tensor, bought: Bought) -> None:
        asked = torch.cat([*bought.sources.values()]).unique()  # also images whose answers were thrown away
        if "query_indices" in self.extra and len(asked) < len(self.extra["query_indices"]):
            self.extra["query_indices"] = self.extra["query_indices"][asked]
            self.extra["query_set"] = {**self.extra["query_set"], "images": len(asked)}
        self._record(victim, bought.sources, digest_tensor(images[asked]), bought.found)

    def _record(self, victim: Victim, sources: dict[str, Tensor], digests: Tensor, found: list[str] = ()) -> None:
        """Enter and say what was asked: `sources` are as in `adaptive.Bought`, digests (N, 16) of all images asked."""
        self.extra |= {"ledger": victim.ledger.state_dict(), "query_digests": digests}
        summary = "queries: {queries}, of distinct images: {distinct}, calls: {calls}"
        self.run.say(summary.format(**victim.ledger.summary()))
        for words in found:
            self.run.say(f"attacker: {words}")
        for account, more in sources.items():
            self.sources[account] = torch.cat([self.sources.get(account, more[:0]), more])
        self.extra["met"] = victim.met(self.sources)
        for name, figure in self.extra["met"].items():
            self.run.say(f"{name.replace('_', ' ')} {figure:.4g}")

    # ---- its parts ----

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
