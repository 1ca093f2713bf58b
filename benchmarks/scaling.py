"""The cost of a step of stealing in several processes: measured here for a few, computed for many GPUs.

python -m benchmarks.scaling                      # starts 1, 2 and 4 processes on this machine's CPU; prints tables
python -m benchmarks --rows growth-processes      # the measured part as a row
python -m benchmarks.scaling --arch resnet18-imagenet --size 64 --batch-size 32
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.row import Ratio, make_row
from benchmarks.timing import Contest, Effort, Missing, child, reason
from jobs.ending import script
from jobs.exchange import barrier, parallel, processes, share, whole_batch
from jobs.meeting import set_up_job
from jobs.place import Processes
from loss import STEAL_LOSSES
from models import arch_name, build_copy, build_encoder
from settings import Parser, Settings, setting
from utils import Precision, seeded

GPUS = (1, 2, 4, 8, 16, 32, 64)
PER_NODE = 4
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Scaling(Settings):
    """The measurement, and the assumptions about links between GPUs."""

    arch: str = setting("resnet50-imagenet", "architecture", read=arch_name)
    size: int = setting(224, "side of the images in pixels", at_least=1)
    batch_size: int = setting(16, "images in the job's batch", at_least=1)
    rounds: int = setting(5, "number of timings", at_least=1)
    within: float = setting(150.0, "GB/s from a GPU to others of its node (assumed)", above=0)
    between: float = setting(20.0, "GB/s from a GPU to GPUs of other nodes (assumed)", above=0)
    latency: float = setting(30.0, "latency of a collective in microseconds (assumed)", at_least=0)
    precision: str = setting("auto", "number format on the CPU", choices=("auto", "fp32", "bf16"))
    measure: bool = setting(False, "run as a process of a job, and print the measurements")
    title = "benchmark"


def measure(args: Scaling, precision: Precision) -> dict[str, list[float]]:
    """Seconds, by round, of a step with InfoNCE on the job's batch, and of each of its exchanges separately."""
    width = build_encoder(args.arch).dim
    with seeded(0):
        copy = build_copy(args.arch, width).to(memory_format=precision.memory_format)
        images, answers = torch.rand(args.batch_size, 3, args.size, args.size), torch.rand(args.batch_size, width)
    call = parallel(copy)
    local = images[share(len(images))].contiguous(memory_format=precision.memory_format)
    optimizer = torch.optim.SGD(copy.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def step() -> None:
        with precision.autocast():
            features = call(copy.output, local)
        loss = STEAL_LOSSES["infonce"](whole_batch(features.float()), answers)
        optimizer.zero_grad(set_to_none=True)
        (loss * processes()).backward()
        optimizer.step()

    found = {"step": seconds_of(step, args.rounds)}
    if processes() > 1:
        gradients, part = torch.zeros(numbers_of(copy)), torch.zeros(len(local), width)

        def norm_statistics() -> None:
            for channels in 2 * channels_of(copy):  # forward, and the same number backward
                dist.all_reduce(torch.zeros(2 * channels))

        found["gradients"] = seconds_of(lambda: dist.all_reduce(gradients), args.rounds)
        found["features"] = seconds_of(lambda: whole_batch(part), args.rounds)
        found["batch norms"] = seconds_of(norm_statistics, args.rounds)
    return found


def numbers_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def channels_of(network: nn.Module) -> list[int]:
    """The width of each BatchNorm."""
    return [layer.num_features for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def seconds_of(work: Callable[[], None], rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls, after a warm-up call."""
    times = []
    for _ in range(rounds + 1):
        barrier()
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times[1:]


def in_processes(count: int, flags: Sequence[str]) -> dict[str, list[float]]:
    """What `measure` finds in a job of so many processes of this machine's CPU, with these flags."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = child([*launch, "-m", "benchmarks.scaling", *flags, "--dist-backend", "gloo", "--measure"], cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{count} processes ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def growth_processes(effort: Effort) -> dict[str, Any]:
    """The row of a step of stealing in 1, 2 and 4 processes of the CPU, one thread each: seconds."""
    side, batch = effort.size((64, 32), (64, 32), (32, 4))
    arch = effort.size("resnet18-imagenet", "resnet18-imagenet", "resnet10w32-imagenet")
    flags = ["--arch", arch, "--size", str(side), "--batch-size", str(batch), "--rounds", str(effort.rounds)]
    contest, counts = Contest(effort), effort.size((1, 2, 4), (1, 2, 4), (1, 2))
    for count in counts:
        name = f"{count} process" + "es" * (count > 1)
        contest.names.append(name)
        try:
            contest.seconds[name] = in_processes(count, flags)["step"]
        except (RuntimeError, Missing) as error:
            contest.missing[name] = reason(error)
    ratios = [Ratio(f"{count} processes", "1 process") for count in counts[1:]]
    notes = ("by gloo, on the CPU; one after the other, not in turn: each count is a job of its own",)
    title = f"A step in several processes, {arch}, {side} px, a batch of {batch} in all"
    return make_row(title, contest, "s", ratios, notes)


def kept_for_backward(arch: str, size: int) -> float:
    """Bytes for each image that a training step in bf16 keeps from the forward to the backward pass."""
    copy = build_encoder(arch).to(memory_format=torch.channels_last)

    def kept(batch: int) -> int:
        alive: dict[int, Tensor] = {}  # by address; alive, so that no memory is used twice and counted once
        images = torch.rand(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: alive.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
        )
        with hooks, torch.autocast("cpu", torch.bfloat16):
            copy(images)
        return sum(tensor.untyped_storage().nbytes() for tensor in alive.values())

    # The difference between two batches, because weights that were cast to bf16 are kept too, once.
    return (kept(4) - kept(2)) / 2


def exchanged(arch: str, batch: int, gpus: int) -> dict[str, float]:
    """Bytes that each of `gpus` GPUs sends in a step, by the usual ring algorithms; float32.

    gradients: all-reduce of P numbers, 2 (N - 1) / N * 4 P. features: all-gather of batch * D, (N - 1) / N * 4 B D.
    batch norms: all-gather of (2 C + 1) forward and all-reduce of 2 C backward, over all C channels.
    """
    encoder = build_encoder(arch)
    norms, ring = channels_of(encoder), (gpus - 1) / gpus
    return {
        "gradients": 2 * ring * 4 * numbers_of(encoder),
        "features": ring * 4 * batch * encoder.dim,
        "batch norms": (gpus - 1) * 4 * sum(2 * c + 1 for c in norms) + 2 * ring * 4 * sum(2 * c for c in norms),
        "collectives": 2 * len(norms) + 2,
    }


def computed(args: Scaling) -> list[str]:
    """Lines of a table for ResNet-50 at 224 and a batch of 512: bytes, time over the assumed links, memory."""
    each = kept_for_backward("resnet50-imagenet", 224)
    weights = 4 * numbers_of(build_encoder("resnet50-imagenet"))
    lines = [f"kept for backward: {each / 2**20:.0f} MiB an image; weights {weights / 2**20:.0f} MiB in float32", ""]
    lines += ["| GPUs | images each | sent in a step, MB | ms in communication | memory, GiB |", "|---" * 5 + "|"]
    for gpus in GPUS:
        sent = exchanged("resnet50-imagenet", 512, gpus)
        collectives = sent.pop("collectives")
        total, link = sum(sent.values()), args.between if gpus > PER_NODE else args.within
        ms = 1e3 * (total / (link * 1e9) + collectives * args.latency * 1e-6) if gpus > 1 else 0.0
        # Copy, its gradients and momentum; the victim; the loss's (2 B, 2 B) matrix about four times.
        memory = 4 * weights + each * 512 / gpus + 4 * 4 * (2 * 512) ** 2
        lines.append(f"| {gpus} | {512 // gpus} | {total / 1e6:.0f} | {ms:.1f} | {memory / 2**30:.1f} |")
    return lines


@script
def main() -> None:
    command = Parser(__doc__, [Scaling, Processes]).parse()
    args = command.use(Scaling)
    set_up_job(command.use(Processes))
    torch.set_num_threads(1)
    precision = Precision.choose(args.precision, torch.device("cpu"))
    if args.measure:
        print(json.dumps(measure(args, precision)))
        return
    print(f"{args.arch}, {args.size} x {args.size}, {args.batch_size} images in a batch, {precision}, a thread each\n")
    print("| processes | step, s | gradients, s | features, s | batch norms, s |\n|---|---|---|---|---|")
    for count in (1, 2, 4):
        found = {name: statistics.median(values) for name, values in in_processes(count, sys.argv[1:]).items()}
        parts = (f"{found[name]:.3f}" if name in found else "" for name in ("gradients", "features", "batch norms"))
        print(f"| {count} | {found['step']:.2f} | {' | '.join(parts)} |", flush=True)
    print("\n".join(["", "ResNet-50, 224 x 224, batch 512, computed:", "", *computed(args)]))


if __name__ == "__main__":
    main()
