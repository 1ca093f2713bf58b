"""What every script needs around an experiment: errors, seeds, precision, checkpoints and the run folder."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import yaml


class UserError(Exception):
    """Something that the user can mend: shown as one line, exit code 2."""


def first_process() -> bool:
    """Whether this process is the one of its job that writes files; one without a job is."""
    return not dist.is_initialized() or dist.get_rank() == 0


def quiet() -> bool | None:
    """What tqdm's `disable` takes: progress is shown on terminals, by the first process."""
    return None if first_process() else True


# ---- randomness ------------------------------------------------------------------------------------------------------


def derive_seed(seed: int, purpose: str, epoch: int = 0, process: int = 0) -> int:
    """A 63-bit seed from (seed, purpose, epoch, process), so that no draw depends on how many others were made."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}/{process}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, epoch: int = 0, process: int = 0) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`: the same draws whatever the device that uses them."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, epoch, process))


@contextlib.contextmanager
def seeded(seed: int, purpose: str = "weights") -> Iterator[None]:
    """Within it the global CPU generator (which initialises weights) is seeded; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, purpose))
        yield


# ---- device and precision --------------------------------------------------------------------------------------------


def choose_device(name: str = "auto", gpu_index: int = 0) -> torch.device:
    """The device of that name; `auto` is the CUDA device `gpu_index` if there is one. UserError if it isn't there."""
    if name == "auto":
        name = f"cuda:{gpu_index}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used, give --device cpu: {str(error).splitlines()[0]}") from None
    return device


def _cpu_has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AMX or AVX512-BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


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
            name = "bf16" if on_cuda or (device.type == "cpu" and _cpu_has_bf16_units()) else "fp32"
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
        # Channels last is what both oneDNN's and cuDNN's convolutions work in: without it each call reorders.
        return torch.channels_last

    def grad_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


# ---- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes `path`'s place when all went well and goes away when not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(content: Mapping, path: Path) -> None:
    """Write a checkpoint of tensors and plain types, atomically; of a job's processes only the first does."""
    if not first_process():
        return
    with atomic_path(path) as temporary:
        try:
            torch.save(dict(content), temporary)
        except RuntimeError as error:  # torch's writer reports a full disk so
            raise UserError(f"cannot write {path}, is the disk full? {str(error).splitlines()[0]}") from None


def provenance(precision: Precision) -> dict[str, str]:
    """What a result's row says of where it comes from: command, commit, versions, device."""
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


class Run:
    """The folder of one experiment.

    config.yml (every value in force, commit, versions, device), checkpoint.pth.tar, metrics.jsonl (one line per
    record), run.log and tensorboard events. Opening it writes nothing before `start()`, so that whatever is wrong with
    the input can be found first. Of a job's processes only the first writes.
    """

    def __init__(self, folder: Path, tensorboard: Path | None = None):
        self.folder = folder
        self.checkpoint = folder / "checkpoint.pth.tar"
        self.metrics = folder / "metrics.jsonl"
        self._events = tensorboard or folder
        self._writer = None
        self._logger = logging.getLogger(f"run.{folder}")

    def start(self, config: Mapping, clear: bool = True, from_epoch: int = 0) -> None:
        """Make the folder and write config.yml. `clear` deletes an earlier run's log, metrics and events.

        When a run goes on from `from_epoch`, the metrics of that epoch and later ones are dropped: they come again.
        """
        if not first_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if clear and from_epoch == 0:
            for old in [self.folder / "run.log", self.metrics, *self._events.glob("events.out.tfevents.*")]:
                old.unlink(missing_ok=True)
        if from_epoch and self.metrics.exists():
            kept = [record for record in self.records() if record.get("epoch", from_epoch) < from_epoch]
            with atomic_path(self.metrics) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        with atomic_path(self.folder / "config.yml") as temporary:
            temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        handler = logging.FileHandler(self.folder / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._logger.addHandler(handler)
        # Imported here: it takes a second, and a run that fails on its input need not wait for it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._events), purge_step=from_epoch or None)

    def say(self, text: str) -> None:
        """Print a line and log it."""
        print(text, flush=True)
        self._logger.info(text)

    def record(self, step: int, values: Mapping) -> None:
        """Append one line to metrics.jsonl and its numbers to tensorboard at `step`."""
        if not first_process():
            return
        with self.metrics.open("a") as file:
            file.write(json.dumps({**values, "time": round(time.time(), 3)}) + "\n")
        self.scalars(step, {k: v for k, v in values.items() if isinstance(v, int | float) and k != "epoch"})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers to tensorboard only."""
        for name, value in values.items():
            if self._writer is not None:
                self._writer.add_scalar(name, value, step)

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl so far; a last line cut off by a kill is left out."""
        records = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def finish(self) -> None:
        """Flush and close the log and the events."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for handler in list(self._logger.handlers):
            handler.close()
            self._logger.removeHandler(handler)
