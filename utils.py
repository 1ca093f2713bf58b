"""Errors, seeds, device and precision, and the provenance of results."""

import contextlib
import functools
import hashlib
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

# Signals that tell a job to stop: a scheduler's, Ctrl-C, and a terminal that is closed. Windows lacks some.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP") if hasattr(signal, name)
)


class UserError(Exception):
    """An error that the user can fix: scripts print it as one line and exit with code 2.

    Control characters, which names in a stranger's file may have, become spaces.
    """

    def __str__(self) -> str:
        return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", super().__str__())


# ---- the first process of a job --------------------------------------------------------------------------------------


def first_process() -> bool:
    """Whether this process is rank 0 of its job; a process without a job is. Only rank 0 writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def first_by_launcher() -> bool:
    """Whether this is rank 0 according to the launcher's environment; only rank 0 reports usage errors."""
    several = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    rank = os.environ.get("RANK") or (several and os.environ.get("SLURM_PROCID")) or "0"
    return not rank.isdecimal() or int(rank) == 0  # every process complains of a rank that is none


def quiet() -> bool | None:
    """The value for tqdm's `disable`: rank 0 shows progress, on terminals only."""
    return None if first_process() else True


# ---- randomness ------------------------------------------------------------------------------------------------------


def derive_seed(seed: int, purpose: str, epoch: int = 0, process: int = 0) -> int:
    """A 63-bit seed from (seed, purpose, epoch, process), so that no draw depends on how many others were made."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}/{process}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, epoch: int = 0, process: int = 0) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`: the same draws on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, epoch, process))


@contextlib.contextmanager
def seeded(seed: int, purpose: str = "weights") -> Iterator[None]:
    """Seeds the global CPU generator (which initialises weights), and restores it at the end of the block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, purpose))
        yield


# ---- device and precision --------------------------------------------------------------------------------------------


def choose_device(name: str = "auto", gpu_index: int = 0) -> torch.device:
    """The device of that name; `auto` is CUDA device `gpu_index`, else the CPU. UserError if it cannot be used."""
    if name == "auto":
        name = f"cuda:{gpu_index}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # `meta` has devices without memory
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used, give --device cpu: {str(error).splitlines()[0]}") from None
    return device


@functools.cache
def cpu_units() -> frozenset[str]:
    """Which units for bf16 this CPU has: `amx_bf16` multiplies matrices, `avx512_bf16` rows of them."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return frozenset()
    return frozenset(unit for unit in ("amx_bf16", "avx512_bf16") if unit in flags)


@dataclass(frozen=True)
class Precision:
    """How a network is run on a device: `autocast()` around its calls, `memory_format` for weights and images."""

    name: str
    device: torch.device

    @classmethod
    def choose(cls, name: str, device: torch.device) -> "Precision":
        """`auto` is bf16 where the hardware multiplies it, else fp32. UserError for fp16 without CUDA."""
        if name == "auto":
            on_cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bf16" if on_cuda or (device.type == "cpu" and cpu_units()) else "fp32"
        if name == "fp16" and device.type != "cuda":
            raise UserError(f"precision fp16 needs a CUDA device, this is {device}: give --precision bf16 or fp32")
        return cls(name, device)

    def __str__(self) -> str:
        return f"{self.device}, {self.name}"

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.name == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.name != "fp32")

    @property
    def memory_format(self) -> torch.memory_format:
        # oneDNN's and cuDNN's convolutions work in channels last: any other format is reordered in each call.
        return torch.channels_last

    def grad_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


# ---- provenance ------------------------------------------------------------------------------------------------------


def provenance(precision: Precision) -> dict[str, str]:
    """The provenance in a results row: command, commit, versions, device, precision."""
    device = precision.device
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _git_commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": f"{device} ({hardware})",
        "precision": precision.name,
    }


def _git_commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
