"""Speed relative to a reference in the same run: the two alternate, so that a machine's drift affects both."""

import statistics
import time
from collections.abc import Callable

import torch


def alternate(rounds: int, **tasks: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each task over `rounds` alternating rounds, after a warm-up call of each."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in range(rounds + 1):
        for name, task in tasks.items():
            synchronise()
            started = time.perf_counter()
            task()
            synchronise()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> str:
    """The device that the benchmarks use, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
