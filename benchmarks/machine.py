"""The machine that the figures are of: its name, clock and versions, and the most that its chip was seen to compute."""

import importlib.metadata
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import seconds_of
from utils import Precision, provenance

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "lightly", "kornia")
_CPUINFO = Path("/proc/cpuinfo")


def slug(precision: Precision) -> str:
    """The device's name as a file has it: `cpu-avx512-bf16-2-threads`, or the GPU's name in small letters."""
    if precision.device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(precision.device).lower()).strip("-")
    units = [name.replace("_", "-") for name in ("amx_bf16", "avx512_bf16") if name in _cpuinfo("flags").split()]
    kind = units[0] if units else torch.backends.cpu.get_cpu_capability().lower()
    return f"cpu-{kind}-{torch.get_num_threads()}-threads"


def describe(precision: Precision) -> dict[str, Any]:
    """The machine, and the precision that --precision auto takes on it."""
    on_gpu = precision.device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(precision.device) if on_gpu else None,
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_units": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": precision.name,
    }


def versions(precision: Precision) -> dict[str, str | None]:
    """Of Python, this project (its commit) and the packages; None for a package that is not installed."""
    there = provenance(precision)
    return {"python": there["python"], "commit": there["commit"], **{name: _version(name) for name in PACKAGES}}


def clock(precision: Precision) -> float | None:
    """The clock in MHz now: the GPU's, or the median of the CPU's cores; None where the system does not say."""
    if precision.device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        try:
            lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
            return float(lines[(precision.device.index or 0) if len(lines) > 1 else 0])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None
    found = re.findall(r"^cpu MHz\s*: ([\d.]+)", _text(), re.MULTILINE)
    return statistics.median(map(float, found)) if found else None


def peak(precision: Precision, quick: bool = False) -> dict[str, Any]:
    """The chip's measured peak: the fastest of five products of square matrices, in FLOP/s.

    The numbers are bf16 where networks run in bf16, else float32.
    """
    on_gpu = precision.device.type == "cuda"
    side = 256 if quick else 8192 if on_gpu else 4096
    dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32
    a, b = (torch.randn(side, side).to(precision.device, dtype) for _ in range(2))
    times = 10 if on_gpu else 1

    def products() -> None:
        for _ in range(times):
            torch.mm(a, b)

    products()
    fastest = min(seconds_of(products) for _ in range(5)) / times
    return {"flop_per_second": 2 * side**3 / fastest, "side": side, "numbers": str(dtype).removeprefix("torch.")}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo(field: str) -> str:
    found = re.search(rf"^{field}\s*: (.*)$", _text(), re.MULTILINE)
    return found[1] if found else ""


def _text() -> str:
    try:
        return _CPUINFO.read_text()
    except OSError:
        return ""
