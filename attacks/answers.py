"""The answers that an attack bought, and the copy's views and targets in each training step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks import Attack
from attacks.records import Kept
from data_aug.augment import ViewDraws, apply_views, draw_views, rows_of
from data_aug.datasets import to_float
from data_aug.images import Batch, Images, send
from data_aug.recipes import VIEW_RECIPES
from utils import UserError


@dataclass
class Answers:
    """The answers to M images.

    index (M,): positions of the images in what the attacker chose from. images: the M images. sent: what the victim was
    sent, V * M views, view-major; `images` itself where these were sent. rows (V * M, D): the answers, in memory or in
    a file. sources: for each account, the image index of each query. findings: what the attacker noticed, in words.
    """

    index: Tensor
    images: Images
    sent: Images
    rows: Tensor | Kept
    attack: Attack
    sources: dict[str, Tensor] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device, refine: Callable[[Tensor], Tensor] | None = None) -> "Answers":
        """The same on a device, refined and, where the loss wants them so, of unit length.

        With `prototype` the mean of an image's answers is its target.
        """
        if not isinstance(self.rows, Tensor):
            if refine or self.attack.prototype:
                raise ValueError("answers that stay in a file can be neither refined nor averaged")
            return self
        rows = self.rows.to(device)
        rows = refine(rows) if refine else rows
        rows = F.normalize(rows, dim=1) if self.attack.unit_answers else rows
        if self.attack.prototype:
            mean = rows.view(self.attack.n_views, len(self), -1).mean(dim=0)
            rows = mean if self.attack.useaug else mean.repeat(self.attack.n_views, 1)
        images = self.images.to(device)
        sent = images if self.sent is self.images else self.sent.to(device)
        return Answers(self.index, images, sent, rows, self.attack, self.sources, self.findings)

    def draw(self, draws: torch.Generator) -> ViewDraws | None:
        """With `useaug`: the epoch's table of draws, a row for each image and view that the copy is shown."""
        if not self.attack.useaug:
            return None
        height, width = self.images.size
        recipe = VIEW_RECIPES[self.attack.views]
        return draw_views(self.attack.copy_views * len(self), height, width, self.images.view_side, draws, recipe)

    def batches(self, index: Sequence[Tensor], device: torch.device, share: Callable[[int], slice]) -> Iterator[Batch]:
        """Batches of the images at these indices: what was sent, or with `useaug` the images, each once.

        Streamed views are those of epoch 0 in every epoch, since these were sent.
        """
        if self.attack.useaug or self.attack.n_views == 1:
            yield from (self.images if self.attack.useaug else self.sent).batches(index, device, 0, share)
            return
        for batch in index:
            local = batch[share(len(batch))]
            rows = rows_of(local, self.attack.n_views, len(self))
            yield Batch(batch, local, self.sent.tensor[rows])

    def batch(self, batch: Batch, draws: ViewDraws | None) -> tuple[Tensor, Tensor]:
        """The views of a step, float (R * b, 3, H, W), for this process's b images of the batch, and the targets
        (R * B, D) of all B images; R rows for each image, view-major.

        draws: the epoch's table of `draw`.
        """
        attack = self.attack
        targets = self.targets(rows_of(batch.index, len(self.rows) // len(self), len(self)), batch.images.device)
        if not attack.useaug:
            return to_float(batch.images), targets
        rows = rows_of(batch.local, attack.copy_views, len(self))
        shown = apply_views(batch.images.repeat(attack.copy_views, 1, 1, 1), draws[rows])
        if attack.plain_first:
            shown = torch.cat([to_float(batch.images), shown])
        return shown, targets.repeat(attack.rows * len(batch.index) // len(targets), 1)

    def targets(self, rows: Tensor, device: torch.device) -> Tensor:
        """The answers (R, D), float32 on the device, in these rows (R,)."""
        if isinstance(self.rows, Tensor):
            return self.rows[rows]
        answers = send(self.rows[rows], device)
        return F.normalize(answers, dim=1) if self.attack.unit_answers else answers

    def only(self, keep: Tensor, rows: Tensor | Kept, *findings: str) -> "Answers":
        """The answers to the images that are to be kept (M,), with the rows that these have."""
        sent_too = self.sent is self.images
        images = self.images[keep.nonzero()[:, 0]]
        sent = images if sent_too else self.sent[keep.repeat(len(self.sent) // len(self)).nonzero()[:, 0]]
        return Answers(self.index[keep], images, sent, rows, self.attack, self.sources, [*self.findings, *findings])

    def without_losses(self, lost: int) -> "Answers":
        """Without the images of which an answer is missing, after so many were `lost`: see `Client.ask`."""
        stored = isinstance(self.rows, Tensor)
        there = ~self.rows.isnan().any(dim=1) if stored else self.rows.records >= 0
        keep = there.view(-1, len(self)).all(dim=0)
        if not keep.any():
            raise UserError(f"{lost} answers were lost in a stop, and no image has all of its own: leave out --resume")
        of_these = keep.repeat(len(there) // len(self))
        rows = self.rows[of_these] if stored else Kept(self.rows.answers, self.rows.records[of_these])
        return self.only(keep, rows, f"{lost} answers were lost in a stop: {(~keep).sum()} images are left out")
