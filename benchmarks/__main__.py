"""Speed against other ways of doing the same work: the list of rows, and the command that runs them.

python -m benchmarks                               # all rows -> benchmarks/results/<device>.json and <device>.md
python -m benchmarks --rows step views-simclr      # some rows, or all whose names begin so; the others stay
python -m benchmarks --quick --out DIR             # tries the code: such figures say nothing about speed

Each row runs in a process of its own, and is written as soon as it has ended. What it is compared with:
pip install -r requirements-bench.txt
"""

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, memory
from benchmarks.report import Results, headline
from benchmarks.timing import Effort, Missing, child, reason
from files.reading import read_json
from files.writing import atomic_path
from jobs.ending import script, show
from settings import Parser, Settings, setting
from utils import Precision, UserError, choose_device

ROOT = Path(__file__).resolve().parent.parent
# Each row: the function in this folder that measures it, and its arguments. The most important rows come first, because
# on a GPU the time is limited.
ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "step-resnet34": ("steps.step", {"arch": "resnet34"}),
    "step-resnet18": ("steps.step", {"arch": "resnet18"}),
    "views-simclr": ("views.views", {}),
    "ready-resnet18": ("steps.ready_views", {"arch": "resnet18"}),
    "stealing-resnet34": ("stealing.stealing", {"arch": "resnet34"}),
    "linear-resnet18": ("probes.linear_evaluation", {"arch": "resnet18"}),
    "probe-converged": ("probes.probe", {}),
    "start-plain": ("start.start", {}),
    "start-compiled": ("start.start_compiled", {}),
    "step-resnet10w32": ("steps.step", {"arch": "resnet10w32"}),
    "ready-resnet10w32": ("steps.ready_views", {"arch": "resnet10w32"}),
    "views-operations": ("views.operations", {}),
    "views-recipes": ("views.recipes", {}),
    "growth-images": ("growth.images", {}),
    "growth-loss": ("growth.loss", {}),
    "growth-layers": ("growth.layers", {}),
    "growth-ledger": ("growth.ledger", {}),
    "growth-processes": ("scaling.growth_processes", {}),
    "defences-resnet34": ("defences.defences", {"arch": "resnet34"}),
    "service-resnet18": ("service.service", {"arch": "resnet18"}),
    "service-resnet10w32": ("service.service", {"arch": "resnet10w32"}),
}
GPU_SECONDS, GPU_MINUTES = 12.0, 9.5


def row_name(text: str) -> str:
    """A row's name or its first words. UserError for another text."""
    if not names_of([text]):
        raise UserError(f"no row {text!r}: choose from {', '.join(ROWS)}, or give the first word of several")
    return text


def names_of(words: Sequence[str]) -> list[str]:
    """The rows that these words name; all rows for no word."""
    return [name for name in ROWS if not words or any(name == word or name.startswith(f"{word}-") for word in words)]


@dataclass(frozen=True)
class Benchmarks(Settings):
    """What is measured, how long, and where the results go."""

    rows: tuple[str, ...] = setting((), "rows, or first words of rows", read=row_name, several=True, otherwise="all")
    rounds: int = setting(5, "rounds in which the ways of a row take turns", at_least=1)
    seconds: float | None = setting(
        None, "begin no further round of a row after X seconds", above=0, otherwise=f"{GPU_SECONDS:g} on a GPU"
    )
    minutes: float | None = setting(
        None, "leave out or stop what goes on after X minutes", above=0, otherwise=f"{GPU_MINUTES} on a GPU"
    )
    quick: bool = setting(False, "one round of small sizes, to try the code")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    out: Path = setting(ROOT / "benchmarks" / "results", "folder of the results", otherwise="benchmarks/results")
    alone: Path | None = setting(None, "run a single row in this process, and write it to this file")
    title = "benchmarks"


def measure(name: str, effort: Effort) -> dict[str, Any]:
    """A row, and how it was measured. A row that fails says why."""
    if effort.on_gpu:  # as the scripts do
        torch.cuda.init()  # from here on memory is that of CUDA's allocator
        torch.cuda.set_device(effort.device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    started = time.perf_counter()
    try:
        where, arguments = ROWS[name]
        module, function = where.split(".")
        # Imported here: the process that starts the rows needs none of them.
        row = getattr(importlib.import_module(f"benchmarks.{module}"), function)(effort, **arguments)
    except Exception as error:
        kind = "missing" if isinstance(error, Missing) else "failed"
        row = {"title": name, kind: reason(error)}
    return row | {
        "run": {
            "commit": machine.versions(effort.precision)["commit"],
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.perf_counter() - started, 1),
            "rounds": effort.rounds,
            "quick": effort.quick,
            "threads": torch.get_num_threads(),
            "clock_mhz": machine.clock(effort.precision),
            "peak_memory_bytes": memory.of_process(),
        }
    }


def in_own_process(name: str, args: Benchmarks, effort: Effort, limit: float | None) -> dict[str, Any]:
    """The row of a process of its own; why there is none, where it takes longer than `limit` seconds or dies."""
    if limit is not None and limit <= 0:
        return {"title": name, "missing": f"left out: --minutes {minutes_of(args, effort):g} had passed"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        flags = ["--rows", name, "--alone", file, "--rounds", effort.rounds, "--device", effort.device]
        flags += ["--seconds", effort.seconds] if effort.seconds < float("inf") else []
        flags += ["--quick"] if effort.quick else []
        try:
            command = [sys.executable, "-m", "benchmarks", *map(str, flags)]
            done = child(command, limit, cwd=ROOT)
        except Missing as error:
            return {"title": name, "missing": str(error)}
        if not file.exists():
            lines = done.stderr.strip().splitlines() or ["without a message"]
            return {"title": name, "failed": f"its process ended with code {done.returncode}: {lines[-1][:300]}"}
        return read_json(file, "a row")


def minutes_of(args: Benchmarks, effort: Effort) -> float | None:
    """The limit of the whole command."""
    return args.minutes or (GPU_MINUTES if effort.on_gpu else None)


@script
def main() -> None:
    parser = Parser(__doc__, [Benchmarks])
    parser.prog = "python -m benchmarks"
    args = parser.parse().use(Benchmarks)
    precision = Precision.choose("auto", choose_device(args.device))
    on_gpu = precision.device.type == "cuda"
    seconds = args.seconds or (GPU_SECONDS if on_gpu else float("inf"))
    effort = Effort(precision, 1 if args.quick else args.rounds, seconds, args.quick)
    if args.alone:
        with atomic_path(args.alone) as temporary:
            temporary.write_text(json.dumps(measure(args.rows[0], effort)))
        return
    results, begun = Results(args.out, precision, args.quick, list(ROWS)), time.monotonic()
    show(f"{results.device}, {precision}, results in {results.json}")
    failed = []
    for name in names_of(args.rows):
        minutes = minutes_of(args, effort)
        limit = 60 * minutes - (time.monotonic() - begun) if minutes else None
        row = in_own_process(name, args, effort, limit)
        results.put(name, row)
        show(f"{name:20}{headline(row)}")
        failed += [name] * ("failed" in row)
    if failed:
        raise UserError(f"rows that failed: {', '.join(failed)}; {results.json} says why")


if __name__ == "__main__":
    main()
