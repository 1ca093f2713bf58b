"""The attacker's side of the API: asks in batches, and keeps a record of every query from before it is sent."""

import hashlib
import itertools
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attacks.elsewhere import BATCH, Elsewhere
from attacks.records import Kept, QueryFile
from data_aug.digests import HASH_BYTES, perceptual_hashes
from data_aug.images import Images
from jobs.ending import Stopped, deferred, received
from jobs.exchange import any_of, barrier, gather, share
from utils import UserError, quiet
from victim import AnyVictim, digest_tensor, pack_digests, unpack_digests

CPU = torch.device("cpu")  # digests are taken there; the victim moves images to its device


def jitter(images: Tensor, levels: int, number: int) -> Tensor:
    """uint8 images (N, 3, H, W) of which every number is changed by up to `levels`, at random, and kept in 0 to 255.

    The changes follow from the pixels and from `number`: made again they are the same, whatever the batch.
    """
    changed = []
    for image in images.cpu().numpy():
        key = hashlib.blake2b(image.tobytes(), digest_size=16, salt=number.to_bytes(8, "little")).digest()
        draws = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        change = draws.integers(-levels, levels, image.shape, np.int16, endpoint=True)
        changed.append((image + change).clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.stack(changed)).to(images.device) if changed else images


@dataclass(frozen=True, eq=False)
class Jittered(Images):
    """Images as `jitter` changes them."""

    images: Images
    levels: int
    number: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        return self.images.size

    def __getitem__(self, index: slice | Tensor) -> "Jittered":
        return Jittered(self.images[index], self.levels, self.number)

    def to(self, device: torch.device | str) -> "Jittered":
        return Jittered(self.images.to(device), self.levels, self.number)

    def _read(self, parts: Sequence[Tensor], device: torch.device, epoch: int) -> Iterator[Tensor]:
        for images in self.images._read(parts, device, epoch):
            yield jitter(images, self.levels, self.number)


class Client:
    """Asks a victim about images, `repeat` times each, and keeps every query in the file `keep`.

    With `jitter` each further asking changes the pixels by up to so many levels, so that a defence does not see the
    same image again.

    A record of the file has the image's digest, the account, the number of the call, and the answer in `dtype`. It is
    written before the victim is asked, and the answer is filled in afterwards. When a killed attack goes on, the
    ledger has all that was asked, and answers are found by the digests of the images: what was answered is not asked
    again. An answer that was lost in the kill is asked for again as far as the victim's budget allows; `lost` counts
    them. A victim that `repeats` gives the lost answers again without counting them again. Answers in float16, unless
    they are means, are not read into memory. Of a job's processes each asks about its share of a batch, and rank 0
    writes. batch_size: images of a call, by default what the victim takes.
    """

    def __init__(
        self,
        victim: AnyVictim,
        keep: Path | None = None,
        repeat: int = 1,
        dtype: type[np.floating] = np.float32,
        batch_size: int | None = None,
        jitter: int = 0,
    ):
        self.victim, self.repeat, self.jitter = victim, repeat, jitter
        self.batch_size = batch_size or getattr(victim, "batch_size", BATCH)
        self.file = QueryFile(keep, victim.dim, dtype)
        if isinstance(victim, Elsewhere):
            victim.begin(keep)
            if victim.repeats:
                self.file.leave_out_lost()
        self.mapped = keep is not None and dtype is np.float16 and repeat == 1
        earlier = self.file.earlier
        self.queries, self.lost = len(earlier), int((~earlier["answered"]).sum())
        self._answered = earlier["answered"]
        # Until a record's image comes again, its query is of no known image: it has a negative number.
        self._source = -1 - torch.arange(self.queries)
        self._new: dict[str, list[Tensor]] = defaultdict(list)  # the sources of this process's queries
        self._accounts = [name.decode() for name in earlier["account"].tolist()]
        digests = unpack_digests(torch.from_numpy(earlier["digest"].copy()))
        self._left: dict[tuple[str, bytes], deque[int]] = defaultdict(deque)
        for record, key in enumerate(zip(self._accounts, digests, strict=True)):
            self._left[key].append(record)
        calls = earlier["call"].tolist()
        groups = (list(group) for _, group in itertools.groupby(range(self.queries), calls.__getitem__))
        self._calls = deque((self._accounts[rows[0]], [digests[row] for row in rows]) for rows in groups)
        self._next_call = calls[-1] + 1 if calls else 0
        while self._calls and not victim.stateful:
            account, asked = self._calls.popleft()
            victim.replay(pack_digests(asked), account)
        barrier()  # nobody adds to the file before all have seen the same
        self.file.withdraw(self.queries)

    @property
    def sources(self) -> dict[str, Tensor]:
        """For each account, the image index of each of its queries, in the order of asking.

        A query of an earlier process about an image that was not asked about again has a negative number.
        """
        earlier = np.array(self._accounts)
        names = dict.fromkeys([*self._accounts, *self._new])
        return {name: torch.cat([self._source[torch.from_numpy(earlier == name)], *self._new[name]]) for name in names}

    def ask(self, images: Images, sources: Tensor, account: str = "default") -> Tensor | Kept:
        """The mean answers (N, D) to N images, which are views of the images of these indices (N,).

        float32 on the CPU, or `Kept` in the file. After a loss the last answers may be missing, because the budget does
        not cover them: these rows are NaN. Stopped when a signal came: the answers so far are kept.
        """
        if self.repeat == 1:
            return self._ask(images, sources, account)
        total, count = torch.zeros(len(images), self.victim.dim), torch.zeros(len(images), 1)
        for number in range(self.repeat):
            sent = Jittered(images, self.jitter, number) if self.jitter and number else images
            rows = self._ask(sent, sources, account)
            there = ~rows.isnan().any(dim=1, keepdim=True)
            total, count = total + torch.where(there, rows, 0.0), count + there
        return total / count

    def _ask(self, images: Images, sources: Tensor, account: str) -> Tensor | Kept:
        """The answers to each image, asked once."""
        records = self._find(images, sources, account)
        found = (records >= 0).nonzero()[:, 0]
        missing = self._affordable((records < 0).nonzero()[:, 0])
        rows = None if self.mapped else torch.full((len(images), self.victim.dim), torch.nan)
        if rows is not None and len(found):
            rows[found] = self.file.kept(records)[found]
        batches = missing.split(self.batch_size) if len(missing) else []
        with tqdm(total=len(missing), unit="query", disable=quiet(), leave=False) as bar, deferred():
            for batch in images.batches(batches, CPU, share=share):
                first = self.queries
                answers = self._query(batch.images, len(batch.index), account)
                self._new[account].append(sources[batch.index])
                records[batch.index] = torch.arange(first, self.queries)
                if rows is not None:
                    rows[batch.index] = answers
                bar.update(len(answers))
                if any_of(received() is not None):
                    raise Stopped(
                        f"stopped by {received()}: {self.queries} answers are kept, --resume goes on from them"
                    )
        if rows is not None:
            return rows
        barrier()  # rank 0 has written all of the file
        return self.file.kept(records)

    def _affordable(self, missing: Tensor) -> Tensor:
        """Of the images whose answers are missing, those to ask about. UserError where these are other images."""
        if not self._answered.size:
            return missing
        if len(missing) and self._calls:
            raise UserError(
                "the images have changed since the attack was stopped, and a defence that remembers queries cannot be "
                "brought back to where it was: restore the images, or leave out --resume to pay anew"
            )
        budget = self.victim.budget
        room = len(missing) if budget is None else max(0, budget - self.victim.ledger.queries)
        if len(missing) - room > self.lost:
            raise UserError(
                f"{len(missing)} of the images were not asked about before the attack was stopped, and its budget has "
                f"{room} queries left: restore the images, or leave out --resume to pay anew"
            )
        return missing[:room]

    # ---- queries of an earlier process ----

    def _find(self, images: Images, sources: Tensor, account: str) -> Tensor:
        """The records (N,) that have the answers to these images; -1 where there is none."""
        records = torch.full((len(images),), -1)
        if not self._left:
            return records
        digests: list[bytes] = []
        hashes: list[bytes] = []
        for batch in images.batches(torch.arange(len(images)).split(self.batch_size), CPU, share=share):
            digests += unpack_digests(gather(digest_tensor(batch.images), len(batch.index)))
            hashes += unpack_digests(gather(perceptual_hashes(batch.images), len(batch.index)), HASH_BYTES)
        self._replay(images, digests, account)
        for row, digest in enumerate(digests):
            queue = self._left.get((account, digest), deque())
            if queue:
                self.victim.ledger.note([hashes[row]], account)
            while queue and records[row] < 0:
                record = queue.popleft()
                self._source[record] = sources[row]
                records[row] = record if self._answered[record] else -1
            if not queue:
                self._left.pop((account, digest), None)
        return records

    def _replay(self, images: Images, digests: Sequence[bytes], account: str) -> None:
        """Show a victim that remembers its next calls again, as far as they were about these images."""
        row_of = {digest: row for row, digest in enumerate(digests)}
        while self._calls and self._calls[0][0] == account and row_of.keys() >= set(self._calls[0][1]):
            _, asked = self._calls.popleft()
            again = next(iter(images.batches([torch.tensor([row_of[digest] for digest in asked])], CPU)))
            self.victim.replay(pack_digests(asked), account, again.images)

    # ---- a query ----

    def _query(self, local: Tensor, total: int, account: str) -> Tensor:
        """The answers (B, D), float32 on the CPU, to a batch of which this process has the images `local`."""

        def together(rows: Tensor) -> Tensor:
            return gather(rows, total)

        records = self.file.new(together(digest_tensor(local)).numpy(), account, self._next_call)
        asked = self.victim.ledger.queries
        try:
            self.file.write(records, self.queries)
            answers = self.victim.query(local, account, together).cpu()
        except BaseException:
            if self.victim.ledger.queries == asked:  # it was not answered, and not counted
                self.file.withdraw(self.queries)
            raise
        self.file.answer(records, answers)
        self.file.write(records, self.queries)
        self.queries += total
        self._next_call += 1
        return answers
