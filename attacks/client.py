"""The attacker's side of the API: asks in batches, and keeps every answer as it arrives."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_aug.images import Images
from jobs.ending import Stopped, deferred, received
from jobs.exchange import any_of, barrier, gather, share
from utils import first_process, quiet
from victim import AnyVictim, digest_tensor

CPU = torch.device("cpu")  # digests are taken there; the victim moves images to its device


class Client:
    """Asks a victim about images, `repeat` times each, and keeps every answer in the file `keep`.

    The file has a record for each query, in the order of asking: the image's digest, and the answer in `dtype`. What an
    earlier, killed attack already paid for is read back from it instead of being asked again: ask the same in the same
    order. Answers in float16, unless they are means, are not read into memory. Of a job's processes each asks about its
    share of a batch, and rank 0 writes.
    """

    def __init__(
        self,
        victim: AnyVictim,
        keep: Path | None = None,
        repeat: int = 1,
        dtype: type[np.floating] = np.float32,
        batch_size: int = 512,
    ):
        self.victim, self.keep, self.repeat, self.batch_size = victim, keep, repeat, batch_size
        self.queries = 0
        self._sources: dict[str, list[Tensor]] = {}
        self.layout = np.dtype([("digest", np.uint8, 16), ("answer", dtype, victim.dim)])
        self.mapped = keep is not None and dtype is np.float16 and repeat == 1
        self.paid = np.empty(0, self.layout)
        if keep and keep.exists():
            whole = keep.stat().st_size // self.layout.itemsize
            if first_process():
                os.truncate(keep, whole * self.layout.itemsize)  # a record cut off by a kill
            self.paid = np.memmap(keep, self.layout, "r", shape=whole) if whole else self.paid
        barrier()  # nobody adds to the file before all have seen the same

    @property
    def sources(self) -> dict[str, Tensor]:
        """For each account, the image index of each of its queries, in the order of asking."""
        return {account: torch.cat(parts) for account, parts in self._sources.items()}

    def ask(self, images: Images, sources: Tensor, account: str = "default") -> Tensor | np.memmap:
        """The mean answers (N, D) to N images, which are views of the images of these indices (N,).

        float32 on the CPU, or the mapped file's float16. Stopped when a signal came: the answers so far are kept.
        """
        total = self._ask(images, account)
        for _ in range(self.repeat - 1):
            total = total + self._ask(images, account)
        self._sources.setdefault(account, []).extend([sources] * self.repeat)
        return total / self.repeat if self.repeat > 1 else total

    def _ask(self, images: Images, account: str) -> Tensor | np.memmap:
        """The answers to each image, asked once."""
        first, count = self.queries, len(images)
        rows = None if self.mapped else torch.empty(count, self.victim.dim)
        with tqdm(total=count, unit="query", disable=quiet(), leave=False) as bar, deferred():
            for answers in self._answers(images, account):
                done = self.queries - first
                if rows is not None:
                    rows[done - len(answers) : done] = answers
                bar.update(len(answers))
        if rows is not None:
            return rows
        barrier()  # rank 0 has written all of the file
        if not count:
            return np.empty((0, self.victim.dim), np.float16)
        return np.memmap(self.keep, self.layout, "r", shape=first + count)["answer"][first:]

    def _answers(self, images: Images, account: str) -> Iterator[Tensor]:
        """The answers (B, D), float32 on the CPU, batch by batch: first those that are paid for, then the others."""
        paid = self.paid[self.queries : self.queries + len(images)]
        yield from self._replay(paid, images, account)
        for batch in images.batches(self._batches(len(paid), len(images)), CPU, share=share):
            total = len(batch.index)

            def together(rows: Tensor, total: int = total) -> Tensor:
                return gather(rows, total)

            answers = self.victim.query(batch.images, account, together).cpu()
            self._write(together(digest_tensor(batch.images)), answers)
            self.queries += total
            yield answers
            if any_of(received() is not None):
                raise Stopped(f"stopped by {received()}: {self.queries} answers are kept, --resume goes on from them")

    def _batches(self, start: int, stop: int) -> list[Tensor]:
        return [*torch.arange(start, stop).split(self.batch_size)] if start < stop else []

    def _replay(self, paid: np.ndarray, images: Images, account: str) -> Iterator[Tensor]:
        """The answers that an earlier process paid for; a stateful victim sees their images again."""
        parts = self._batches(0, len(paid))
        again = (batch.images for batch in images.batches(parts, CPU)) if self.victim.stateful else [None] * len(parts)
        for part, seen in zip(parts, again, strict=True):
            records = paid[part.numpy()]
            self.victim.replay(torch.from_numpy(records["digest"].copy()), account, seen)
            self.queries += len(part)
            yield torch.from_numpy(records["answer"].astype(np.float32))

    def _write(self, digests: Tensor, answers: Tensor) -> None:
        if self.keep and first_process():
            records = np.empty(len(answers), self.layout)
            limit = np.finfo(records["answer"].dtype).max  # what a defence exaggerates may not fit float16
            records["digest"], records["answer"] = digests.numpy(), answers.numpy().clip(-limit, limit)
            with self.keep.open("ab") as file:
                file.write(records.tobytes())
