"""What the processes of a job exchange: shares of a batch, features of the whole batch, gradients.

A batch is the job's. Each process takes its share of the images, and computes the loss on the features of the whole
batch, of which only its local rows carry a gradient. The sum of the parameters' gradients over the processes is then
that of a single process with the whole batch, whatever the loss. In a single process nothing here has an effect.
"""

import inspect
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.batchnorm import synchronised

# ---- who and how many ------------------------------------------------------------------------------------------------


def processes() -> int:
    """How many processes the job has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(total: int, rank: int | None = None) -> slice:
    """The rows of `total` that belong to this process, or to `rank`: as equal parts as possible, in order of rank."""
    if rank is None:
        rank = dist.get_rank() if dist.is_initialized() else 0
    part, more = divmod(total, processes())
    start = rank * part + min(rank, more)
    return slice(start, start + part + (rank < more))


def barrier() -> None:
    """Wait until all processes are here."""
    any_of(False)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; every process has to call it."""
    if processes() == 1:
        return flag
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


# ---- rows ------------------------------------------------------------------------------------------------------------


def gather(rows: Tensor, total: int) -> Tensor:
    """All `total` rows (total, ...), in every process, from each process's `share` (b, ...); without gradient.

    ValueError for rows that are not this process's share.
    """
    if processes() == 1:
        return rows
    sizes = [part.stop - part.start for part in (share(total, rank) for rank in range(processes()))]
    if len(rows) != sizes[dist.get_rank()]:
        raise ValueError(f"{len(rows)} rows are not this process's share of {total}, {sizes[dist.get_rank()]}")
    padded = rows.new_zeros(sizes[0], *rows.shape[1:])  # rank 0 has the most rows
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def from_first(rows: Tensor) -> Tensor:
    """Rank 0's rows, in every process; the others give room for them, of the same shape and type."""
    if processes() > 1:
        dist.broadcast(rows, 0)
    return rows


def whole_batch(rows: Tensor, views: int = 1) -> Tensor:
    """Features of the whole batch (views * B, D), view-major, from this process's (views * B / processes, D).

    Each process has equally many. Only local rows carry a gradient: see the module's first lines.
    """
    if processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(processes())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[dist.get_rank()] = rows
    # (processes, views, b, D) -> (views, processes, b, D)
    return torch.stack(parts).unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 2)


# ---- gradients -------------------------------------------------------------------------------------------------------


class _Calls(nn.Module):
    """Several modules as a single one, as DistributedDataParallel needs: it acts on calls of `forward` only."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.members = nn.ModuleList(modules)

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return call(x)


def parallel(*modules: nn.Module) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    """Returns `call(function, x)`, which calls a function of these modules.

    `backward` then averages the modules' gradients over the processes, and batch norm is over all processes' images.
    """
    if processes() == 1:
        return lambda call, x: call(x)
    device = next(modules[0].parameters()).device
    synchronise = nn.SyncBatchNorm.convert_sync_batchnorm if device.type == "cuda" else synchronised
    calls = _Calls(*map(synchronise, modules))
    # Synchronised batch norms agree by themselves. torch 2.14 has a new name for the argument that turns copying off.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return nn.parallel.DistributedDataParallel(
        calls,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{buffers: False},
    )
