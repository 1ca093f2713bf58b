"""Peak memory: of CUDA's allocator on a GPU, else the resident memory of this process."""

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


_earlier = 0  # CUDA's peak before the last reset


class Peak:
    """The bytes that a block took at most, above those in use before it; None where the system does not say."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the peak of a block; on Linux or a GPU only."""
    global _earlier
    peak = Peak()
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        _earlier = max(_earlier, torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated() - before
        return
    try:
        _RESET.write_text("5")  # from here on VmHWM is the peak since now
        before = _resident("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.bytes = _resident("VmHWM") - before


def of_process() -> dict[str, int]:
    """The peak of this process so far, in bytes: resident memory, that of its largest child, and CUDA's allocator's."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {
        "resident": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "largest child": unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    }
    if torch.cuda.is_initialized():
        found["cuda"] = max(_earlier, torch.cuda.max_memory_allocated())
    return found


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
