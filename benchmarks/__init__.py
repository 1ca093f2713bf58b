"""Speed relative to a reference in the same run: the two alternate, so that a machine's drift affects both."""

import statistics
import time
from collections.abc import Callable

import torch

from utils import Precision, choose_device


def timings(rounds: int, warm_up: int = 1, **tasks: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each task in each of `rounds` alternating rounds, after `warm_up` calls of each."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(warm_up + rounds):
        for name, task in tasks.items():
            synchronise()
            started = time.perf_counter()
            task()
            synchronise()
            seconds[name].append(time.perf_counter() - started)
    return {name: values[warm_up:] for name, values in seconds.items()}


def alternate(rounds: int, **tasks: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each task over `rounds` alternating rounds, after a warm-up call of each."""
    return {name: statistics.median(values) for name, values in timings(rounds, **tasks).items()}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def set_up(words: str) -> Precision:
    """The precision that --precision auto selects on this machine; prints it, the machine and the words."""
    precision = Precision.choose("auto", choose_device())
    kind = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else kind}, {precision.name}, {words}")
    return precision
