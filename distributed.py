"""Several processes as one job: how they find each other, what they exchange, and batch norm over all their images.

torchrun --nproc-per-node 4 steal.py ...        srun --ntasks 8 python steal.py ...        python steal.py ...

A batch is the job's: each process takes its share of the images, and the loss is computed in every process on the
features of the whole batch, of which only its own rows carry a gradient. The sum of the parameters' gradients over the
processes is then that of one process with the whole batch, whatever the loss. Without other processes nothing here does
anything.
"""

import argparse
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import stopping
from utils import UserError

PATIENCE = timedelta(minutes=5)  # for the job's processes to find each other

# ---- setting up ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Which process of how many this is, on its own machine too, and where the first one listens."""

    rank: int
    processes: int
    local_rank: int
    local_processes: int
    address: str
    port: int
    hosted: bool = False  # the launcher keeps the store


def find_place(environment: Mapping[str, str], args: argparse.Namespace) -> Place | None:
    """This process's place by torchrun's variables, Slurm's, or the flags of 2022, in this order; None if it is alone.

    UserError for flags that name no place.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _place_of_torchrun(environment)
    # A batch script itself runs outside of any step: only srun makes several processes.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _place_of_slurm(environment)
    if args.world_size > 1:
        return _place_of_flags(args)
    return None


def _place_of_torchrun(environment: Mapping[str, str]) -> Place | None:
    processes = int(environment["WORLD_SIZE"])
    if processes == 1:
        return None
    return Place(
        int(environment["RANK"]),
        processes,
        int(environment.get("LOCAL_RANK", "0")),
        int(environment.get("LOCAL_WORLD_SIZE", "1")),
        environment.get("MASTER_ADDR", "127.0.0.1"),
        int(environment.get("MASTER_PORT", "29500")),
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _place_of_slurm(environment: Mapping[str, str]) -> Place:
    job = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_STEP_ID", "0"))
    here = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_NTASKS_PER_NODE", "1"))
    return Place(
        int(environment["SLURM_PROCID"]),
        int(environment["SLURM_STEP_NUM_TASKS"]),
        int(environment.get("SLURM_LOCALID", "0")),
        int(re.match(r"\d+", here).group()),
        environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        # Steps that share a machine need ports of their own.
        int(environment.get("MASTER_PORT") or 20000 + (10 * job[0] + job[1]) % 20000),
    )


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: gpu[003-006,9],big1 -> gpu003."""
    name, number, rest = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes).groups()
    return name + (number or "") + (rest or "")


def _place_of_flags(args: argparse.Namespace) -> Place:
    found = re.fullmatch(r"tcp://([^:/]+):(\d+)", args.dist_url or "")
    if not found:
        raise UserError(
            f"--dist-url {args.dist_url} is not tcp://ADDRESS:PORT of the process of --rank 0: give it, or use torchrun"
        )
    if not 0 <= args.rank < args.world_size:
        raise UserError(f"--rank {args.rank} is none of the {args.world_size} of --world-size: give 0 or more")
    return Place(args.rank, args.world_size, 0, 1, found[1], int(found[2]))


def set_up(args: argparse.Namespace) -> Place | None:
    """Make this process a part of its job, if it has one; from here on only the first process prints.

    --multiprocessing-distributed starts torchrun in place of this process. UserError when the others can't be found.
    """
    if args.multiprocessing_distributed and "RANK" not in os.environ:
        _become_torchrun(args)
    place = find_place(os.environ, args)
    if place is None:
        return None
    if args.dist_backend == "nccl" and not torch.cuda.is_available():
        raise UserError("--dist-backend nccl needs GPUs, there is none: leave it out")
    if place.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        stores = [_store(place, host) for host in (place.rank == 0 and not place.hosted, False)]
    except (RuntimeError, dist.DistNetworkError) as error:
        raise UserError(
            f"process {place.rank} of {place.processes} finds no job at {place.address}:{place.port}: are all started, "
            f"and is the port free? {str(error).splitlines()[0][:120]}"
        ) from None
    stopping.join(stores[1], place.rank, place.processes, not place.hosted)
    # Tensors on a GPU go through NCCL, those on the CPU, such as answers and digests, through gloo.
    over_nccl = torch.cuda.is_available() and args.dist_backend != "gloo"
    backend = "cpu:gloo,cuda:nccl" if over_nccl else "gloo"
    dist.init_process_group(backend, store=stores[0], rank=place.rank, world_size=place.processes)
    if "OMP_NUM_THREADS" not in os.environ:  # else they would all compute on all cores
        torch.set_num_threads(max(1, torch.get_num_threads() // place.local_processes))
    return place


def refuse() -> None:
    """UserError when a script that works alone was started as one of several processes, which would all do the same."""
    alone = argparse.Namespace(world_size=1)
    place = find_place(os.environ, alone)
    if place:
        script = os.path.basename(sys.argv[0]).removesuffix(".py")
        raise UserError(f"{script} is one process, this is one of {place.processes}: start it without torchrun or srun")


def _store(place: Place, host: bool) -> dist.Store:
    store = dist.TCPStore(place.address, place.port, None, host, PATIENCE, wait_for_workers=False)
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def _become_torchrun(args: argparse.Namespace) -> None:
    """--multiprocessing-distributed of 2022: a process for each GPU of this machine; --world-size counts machines."""
    machines, here = max(1, args.world_size), max(1, torch.cuda.device_count())
    if machines * here == 1:
        return
    if machines == 1:
        where = ["--standalone"]
    else:
        place = _place_of_flags(args)
        where = [f"--nnodes={machines}", f"--node-rank={place.rank}"]
        where += [f"--master-addr={place.address}", f"--master-port={place.port}"]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={here}", *where, *sys.argv]
    os.execv(sys.executable, command)


# ---- who and how many ------------------------------------------------------------------------------------------------


def processes() -> int:
    """How many processes the job has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(total: int, rank: int | None = None) -> slice:
    """The rows of a batch of `total` that are this process's, or that of `rank`: as equal parts as can be."""
    if rank is None:
        rank = dist.get_rank() if dist.is_initialized() else 0
    part, more = divmod(total, processes())
    start = rank * part + min(rank, more)
    return slice(start, start + part + (rank < more))


def barrier() -> None:
    """Wait until all processes are here."""
    any_of(False)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all have to ask."""
    if processes() == 1:
        return flag
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


# ---- exchange --------------------------------------------------------------------------------------------------------


def gather(rows: Tensor, total: int) -> Tensor:
    """The whole of `total` rows (total, ...), of which each process has its `share` (b, ...); without gradient."""
    if processes() == 1:
        return rows
    longest = -(-total // processes())
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(processes())]
    dist.all_gather(parts, padded)
    sizes = [share(total, rank) for rank in range(processes())]
    return torch.cat([part[: size.stop - size.start] for part, size in zip(parts, sizes, strict=True)])


def whole_batch(rows: Tensor, views: int = 1) -> Tensor:
    """Features of the whole batch (views * B, D), view-major, from this process's (views * B / processes, D).

    Only its own rows carry a gradient: see the module's first lines.
    """
    if processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(processes())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[dist.get_rank()] = rows
    # (processes, views, b, D) -> (views, processes, b, D)
    return torch.stack(parts).unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Part:
    """A process's rows of a batch: how many rows the batch has, and which of them (R,) are its own.

    `rows` are on the CPU, for draws, `own` on the device, for data.
    """

    total: int
    rows: Tensor
    own: Tensor

    @classmethod
    @functools.cache  # the same in every step: no copy to the device in any of them
    def of(cls, images: int, views: int, device: torch.device) -> "Part":
        """Of a batch of so many images with `views` rows each, view-major."""
        own = torch.arange(images)[share(images)]
        rows = torch.cat([own + view * images for view in range(views)])
        return cls(views * images, rows, rows.to(device))


class _Normalise(torch.autograd.Function):
    """Batch norm of x (B, C, ...) by the statistics of all processes' rows, as many in each.

    With S1, S2 the sums over all rows of the gradient dy and of dy x^, x^ the normalised x, and n their number, the
    gradient of x is weight / deviation * (dy - S1 / n - x^ S2 / n). Those of weight and bias are the process's own
    sums, which are added up with the other parameters'. The sums are made by torch's own kernels, much the fastest way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        _, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        own = torch.stack([mean, inverse.pow(-2) - eps])
        parts = [torch.empty_like(own) for _ in range(processes())]
        dist.all_gather(parts, own)
        means, variances = torch.stack(parts).unbind(1)
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        given = (dy, x, weight, mean, inverse.pow(-2) - ctx.eps, mean, inverse, False, ctx.eps)
        _, own_scaled, own_sum = torch.ops.aten.native_batch_norm_backward(*given, [False, True, True])
        sums = torch.stack([own_sum, own_scaled])
        dist.all_reduce(sums)
        first, second = sums / (processes() * (x.numel() // x.shape[1]))
        # dx = slope dy + tilt x + shift
        slope = weight * inverse
        tilt = -slope * inverse * second
        shift = -slope * first - tilt * mean
        slope, tilt, shift = (one.to(x.dtype).view([1, -1] + [1] * (x.ndim - 2)) for one in (slope, tilt, shift))
        return torch.addcmul(torch.addcmul(shift, dy, slope), x, tilt), own_scaled, own_sum, None


class SyncBatchNorm(_BatchNorm):
    """Batch norm by the statistics of all processes' images, for CPUs: torch's own works on GPUs only.

    As torch's: (x - mean) / sqrt(variance + eps), variance with divisor n; the running variance has divisor n - 1. Each
    process has to have as many rows as the others.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # (B, C) and (B, C, H, W) alike

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        ones = torch.ones_like(self.running_mean)
        weight, bias = (self.weight, self.bias) if self.affine else (ones, torch.zeros_like(ones))
        out, mean, variance = _Normalise.apply(x, weight, bias, self.eps)
        count = processes() * (x.numel() // x.shape[1])
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(1, count - 1), self.momentum)
        return out


def synchronised(model: nn.Module) -> nn.Module:
    """The model, on a CPU, with `SyncBatchNorm`s for its batch norms; parameters, buffers and their names stay."""
    if isinstance(model, _BatchNorm):
        ours = SyncBatchNorm(model.num_features, model.eps, model.momentum, model.affine)
        ours.__dict__.update(model.__dict__)
        return ours
    for name, child in model.named_children():
        setattr(model, name, synchronised(child))
    return model


class _Calls(nn.Module):
    """Modules in one, as DistributedDataParallel wants them: it acts on what goes through `forward`."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.held = nn.ModuleList(modules)

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return call(x)


def parallel(*modules: nn.Module) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    """What calls a function of these modules such that `backward` averages their gradients over the processes."""
    if processes() == 1:
        return lambda call, x: call(x)
    device = next(modules[0].parameters()).device
    synchronise = nn.SyncBatchNorm.convert_sync_batchnorm if device.type == "cuda" else synchronised
    calls = _Calls(*map(synchronise, modules))
    # Synchronised batch norms agree by themselves. torch 2.14 has a new name for that.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return nn.parallel.DistributedDataParallel(
        calls,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{buffers: False},
    )
