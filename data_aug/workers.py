"""Batches of views, made ahead by worker processes that read and resize images of any size."""

import signal
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils import STOP_SIGNALS, UserError

Item = int | tuple[int, int]  # position, or position and epoch


def stream(
    views: Dataset, batches: Iterable[Tensor | list[Item]], workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Batches of views, uint8 (B, 3, size, size) on the device, in the order of `batches`.

    views: an `images.Views`. batches: int64 tensors (B,) of positions, or lists of items of `views`. workers: how many
    processes, of one thread each, make batches ahead; with 0 this process makes them. The workers end when the iterator
    is closed or exhausted. UserError when an image can't be read or a worker dies.
    """
    items = (batch.tolist() if isinstance(batch, Tensor) else batch for batch in batches)
    loader = DataLoader(
        _Batches(views),
        batch_size=None,  # an item of _Batches is a batch already
        sampler=items,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # its workers' seeds would otherwise be drawn from the global one
    )
    iterator = _start(loader)
    try:
        while (batch := _next(iterator)) is not None:
            if isinstance(batch, UserError):
                raise batch
            # A copy also on the CPU: the shared memory that the batch came in is scarce, and free for the next one.
            yield batch.to(device, non_blocking=True, copy=True)
    finally:
        del iterator  # the last reference: the workers end here


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore a scheduler's signals, which go to all processes: the parent finishes a step first, with its workers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Batches(Dataset):
    """Batches of views, by lists of items.

    A UserError is returned instead of raised: torch would make a worker's traceback part of its message.
    """

    def __init__(self, views: Dataset):
        self.views = views

    def __getitem__(self, items: list[Item]) -> Tensor | UserError:
        batch = torch.empty(len(items), 3, self.views.size, self.views.size, dtype=torch.uint8)
        try:
            if get_worker_info() is not None:
                batch = _shared(batch)
            for row, item in zip(batch, items, strict=True):
                row.copy_(self.views[item])
        except UserError as error:
            return error
        return batch


def _shared(batch: Tensor) -> Tensor:
    # torch would do this when it sends the batch, but a failure there is never reported.
    try:
        return batch.share_memory_()
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"no shared memory for a batch of views, lower --workers or --batch-size: {_first_line(error)}"
        ) from None


def _start(loader: DataLoader) -> Iterator[Tensor | UserError]:
    """The loader's iterator, with its workers started.

    They start with STOP_SIGNALS blocked: a signal to the whole group would end a worker that does not ignore it yet.
    torch's handler for a worker's death is removed, since it raises at whatever line the main thread has reached, even
    the caller's. Without it the death is noticed, seconds later, where the next batch is awaited.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return iter(loader)  # on Windows, which has none of these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        if threading.current_thread() is not threading.main_thread():
            return iter(loader)
        handler = signal.getsignal(signal.SIGCHLD)
        iterator = iter(loader)
        signal.signal(signal.SIGCHLD, handler)
        return iterator
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _next(iterator: Iterator[Tensor | UserError]) -> Tensor | UserError | None:
    """The next batch, None after the last. An error is returned: a raised one would keep the iterator alive."""
    try:
        return next(iterator, None)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        return UserError(
            f"a process that reads images died, of too little memory? Lower --workers: {_first_line(error)}"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120]
