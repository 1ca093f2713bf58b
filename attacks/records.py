"""The file of a client's queries: a record for each of them, written before it is sent, its answer filled in later."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils import first_process


@dataclass(frozen=True, eq=False)
class Kept:
    """Answers that stay in a file, `answers` (R, D): those in these records (N,), none where the number is negative."""

    answers: np.ndarray
    records: Tensor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Tensor) -> Tensor:
        """The answers (K, D), float32, to the queries at this index (K,)."""
        return torch.from_numpy(self.answers[self.records[index.cpu()].numpy()].astype(np.float32))


class QueryFile:
    """Records of queries: image's digest, account, number of the call, whether it was answered, and the answer (dim,).

    `earlier` (R,) are the records of an earlier process. Without a path nothing is kept. Rank 0 writes.
    """

    def __init__(self, path: Path | None, dim: int, dtype: type[np.floating]):
        self.path = path
        self.layout = np.dtype(
            [
                ("digest", np.uint8, 16),
                ("account", "S32"),
                ("call", np.uint32),
                ("answered", np.bool_),
                ("answer", dtype, dim),
            ]
        )
        self.earlier = np.empty(0, self.layout)
        if path and path.exists():
            whole = path.stat().st_size // self.layout.itemsize
            self.withdraw(whole)  # a record cut off by a kill
            self.earlier = np.memmap(path, self.layout, "r", shape=whole) if whole else self.earlier

    def leave_out_lost(self) -> None:
        """Leave out the last of the earlier calls, unless its answers are there."""
        last = int((self.earlier["call"] == self.earlier["call"][-1:]).sum())
        if not self.earlier["answered"][len(self.earlier) - last :].all():
            self.earlier = self.earlier[:-last]

    def new(self, digests: np.ndarray, account: str, call: int) -> np.ndarray:
        """Records of queries, digests (B, 16), that are not answered."""
        records = np.zeros(len(digests), self.layout)
        records["digest"], records["account"], records["call"] = digests, account.encode(), call
        return records

    def answer(self, records: np.ndarray, answers: Tensor) -> None:
        """Fill in the answers (B, dim)."""
        limit = np.finfo(self.layout["answer"].base).max  # what a defence exaggerates may not fit float16
        records["answered"], records["answer"] = True, answers.numpy().clip(-limit, limit)

    def write(self, records: np.ndarray, first: int) -> None:
        """Write records as those from number `first` on."""
        if self.path and first_process():
            with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                file.seek(first * self.layout.itemsize)
                file.write(records.tobytes())

    def withdraw(self, first: int) -> None:
        """Remove the records from number `first` on."""
        if self.path and first_process() and self.path.exists():
            os.truncate(self.path, first * self.layout.itemsize)

    def kept(self, records: Tensor) -> Kept:
        """The answers in these records (N,), which are read when they are needed."""
        whole = np.memmap(self.path, self.layout, "r") if len(records) else np.empty(0, self.layout)
        return Kept(whole["answer"], records)
