"""Runs the cells of a grid, several side by side, and notes each that has finished in cells.jsonl.

runner = Runner(grid, Path("results/losses"), jobs=2)
for line in runner.plan(cells): print(line)              # what --dry-run shows
failed = runner.run(select(grid, "loss=mse,seed=0"))     # "" or the line of a UserError; started again, it goes on
"""

import contextlib
import multiprocessing.connection
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.grid import Cell, Grid
from experiments.parts import refuse_unknown
from experiments.workers import ROOT, Workers, cores
from files.reading import list_of, read_lines, read_yaml, reading, record, table, text
from files.writing import add_line, lock
from jobs.ending import Stopped, deferred, received, show
from utils import UserError

LOOK_EVERY = 0.2  # seconds between looks for a signal
# What a line of cells.jsonl has at least.
_LINE = record(step=text(), at=table(text()), command=text(), folder=text(), rows=list_of(table()))


def read_cells(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of a folder's cells.jsonl by their commands; of several lines of a command the last.

    A line is about a cell that has finished: step, at, command, folder; commit, versions, device; seeds; run_seconds,
    images_trained, queries; rows. Lines that cannot be read are named and skipped.
    """
    path = folder / "cells.jsonl"
    lines = read_lines(path) if path.exists() else []
    good = [line for line in lines if not _LINE(line)]
    if len(good) < len(lines):
        print(f"{path}: {len(lines) - len(good)} lines are skipped: they are about no cell", file=sys.stderr)
    return {line["command"]: line for line in good}


def select(grid: Grid, only: str) -> list[Cell]:
    """The cells that agree with "axis=value,axis=value" on the axes they have, and the cells that these need.

    An axis that is named twice may have either value. A cell that needs runs of other values, as a test of all copies
    does, is left out. UserError for an axis or a value that the grid does not have, and where no cell is left.
    """
    wanted: dict[str, list[str]] = {}
    for part in re.split(r",(?=[^,=]*=)", only):  # a value may have commas
        axis, _, value = map(str.strip, part.partition("="))
        refuse_unknown(axis, grid.axes, "--only")
        refuse_unknown(value, [known.name for known in grid.axes[axis]], f"--only {axis}")
        wanted.setdefault(axis, []).append(value)
    agreeing = {
        cell
        for cells in grid.cells.values()
        for at, cell in cells.items()
        if all(name in wanted.get(axis, [name]) for axis, name in at)
    }
    kept: set[Cell] = set()
    for cell in grid.unique():  # what a cell needs comes before it
        if cell in agreeing and kept.issuperset(cell.needs):
            kept.add(cell)
    if not kept:
        raise UserError(f"--only {only} leaves no run: leave out a value")
    return [cell for cell in grid.unique() if cell in kept]


@dataclass
class _Running:
    """A cell whose script runs."""

    cell: Cell
    process: BaseProcess
    started: float


class Runner:
    """Runs cells of a grid. folder: of the experiment's results, with cells.jsonl. jobs: scripts side by side."""

    def __init__(self, grid: Grid, folder: Path, jobs: int = 1):
        self.grid, self.folder, self.jobs = grid, folder, jobs
        self.lines = read_cells(folder)
        self.running: list[_Running] = []
        self.waiting: list[Cell] = []
        self.failed: dict[Cell, str] = {}
        self.left_out: dict[Cell, Cell] = {}  # and what they need, which failed or was left out

    def left(self, cells: Sequence[Cell]) -> list[Cell]:
        """Of these cells, each after those that it needs, the ones to run.

        A cell has finished when its line is there. It runs again only where another cell that is left needs its run and
        the run's folder is gone: lines are kept and shared, the runs behind them mostly not.
        """
        wanted: set[Cell] = set()
        left: set[Cell] = set()
        for cell in reversed(cells):
            if cell.command not in self.lines or (cell in wanted and not (ROOT / cell.folder).is_dir()):
                left.add(cell)
                wanted.update(cell.needs)
        return [cell for cell in cells if cell in left]

    def plan(self, cells: Sequence[Cell]) -> list[str]:
        """The commands of cells, in their order, and as a comment the minutes that those left will take."""
        left = self.left(cells)
        lines = [cell.command if cell in left else f"{cell.command}  # done" for cell in cells]
        seconds, unknown = self._seconds_of(left)
        if left and seconds:
            more = f", and the time of {', '.join(unknown)}" if unknown else ""
            minutes = max(1, round(seconds / 60))
            lines.append(f"# {len(left)} of {len(cells)} runs are left: about {minutes} min{more}")
        return lines

    def run(self, cells: Sequence[Cell]) -> str:
        """Run the cells that have not finished, each after those that it needs.

        A cell that fails does not end the others, but those that need it are left out. Returns what went wrong in a
        line, after it has printed which cells failed, and how; an empty text where all have finished. Stopped on a
        signal, when the scripts that ran have saved. UserError where another process runs in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (ROOT / self.grid.runs).mkdir(parents=True, exist_ok=True)
        taken = lock(self.folder)
        try:
            self.lines = read_cells(self.folder)  # another process may have been here since
            self.waiting = self.left(cells)
            self.failed, self.left_out = {}, {}
            workers = Workers({cell.words[0] for cell in self.waiting}, max(1, cores() // self.jobs))
            with deferred(), self._ending(), _bar(len(cells)) as bar:
                self._show(bar)
                while (self.waiting or self.running) and not received():
                    self._start(workers)
                    for ended in self._look(LOOK_EVERY):
                        self._show(bar, ended)
            if received():
                raise Stopped(f"stopped by {received()}: the same command goes on from there")
        finally:
            if taken is not None:
                os.close(taken)
        return self._complain(len(cells))

    # ---- scripts ----

    def _start(self, workers: Workers) -> None:
        """Start as many of the waiting cells as may run, the first ones first."""
        for cell in [*self.waiting]:
            lacking = [need for need in cell.needs if need in self.failed or need in self.left_out]
            if lacking:
                self.left_out[cell] = lacking[0]
                self.waiting.remove(cell)
        busy = {*self.waiting, *(running.cell for running in self.running)}
        ready = [cell for cell in self.waiting if busy.isdisjoint(cell.needs)]
        for cell in ready[: self.jobs - len(self.running)]:
            process = workers.start(cell.words, _log_of(cell))
            self.running.append(_Running(cell, process, time.perf_counter()))
            self.waiting.remove(cell)

    def _look(self, seconds: float | None = None) -> list[str]:
        """Wait so long, or until a script has ended; those that have, in words."""
        multiprocessing.connection.wait([running.process.sentinel for running in self.running], seconds)
        ended = [running for running in self.running if running.process.exitcode is not None]
        words = []
        for running in ended:
            self.running.remove(running)
            taken = time.perf_counter() - running.started
            self._note(running.cell, running.process.exitcode, taken)
            running.process.close()
            words.append(f"{running.cell} ({'failed, ' * (running.cell in self.failed)}{taken:.1f} s)")
        return words

    def _note(self, cell: Cell, code: int, seconds: float) -> None:
        """Add the line of a cell that has finished, or remember why it failed."""
        if code == 0:
            try:
                line = _line_of(cell, seconds)
            except UserError as error:
                self.failed[cell] = str(error)
            else:
                add_line(self.folder / "cells.jsonl", line)
                self.lines[cell.command] = line
        elif received():
            self.waiting.insert(0, cell)  # it was told to stop
        else:
            self.failed[cell] = (
                f"ended by {signal.Signals(-code).name}" if code < 0 else _last_line(_log_of(cell), code)
            )

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """After its block the scripts that still run are told to stop, and have ended; a second Ctrl-C kills them."""
        try:
            yield
            for running in self.running:
                running.process.terminate()
            while self.running:
                self._look()
        except BaseException as error:
            for running in self.running:
                end = running.process.kill if isinstance(error, KeyboardInterrupt) else running.process.terminate
                end()
            for running in self.running:
                running.process.join()
            raise

    # ---- what is shown ----

    def _show(self, bar: tqdm, ended: str = "") -> None:
        """How far it is: in the bar on a terminal, else in a line for each cell that ended."""
        left = [*self.waiting, *(running.cell for running in self.running)]
        seconds, unknown = self._seconds_of(left)
        told = [f"{len(self.failed)} failed"] if self.failed else []
        told += [f"{'over ' * bool(unknown)}{tqdm.format_interval(seconds)} left"] if seconds else []
        bar.n = bar.total - len(left) - len(self.failed) - len(self.left_out)
        bar.set_postfix_str(", ".join(told))
        if ended and bar.disable:
            show(f"{', '.join([f'{bar.n}/{bar.total} done', *told])}: {ended}")

    def _seconds_of(self, cells: Sequence[Cell]) -> tuple[float, list[str]]:
        """The seconds that cells will take, by the finished cells of their steps, and the steps that have none."""
        taken: dict[str, list[float]] = {}
        for cell in self.grid.unique():
            seconds = self.lines.get(cell.command, {}).get("run_seconds")
            if isinstance(seconds, int | float):
                taken.setdefault(cell.step, []).append(seconds)
        known = sum(statistics.median(taken[cell.step]) for cell in cells if cell.step in taken)
        return known / self.jobs, list(dict.fromkeys(cell.step for cell in cells if cell.step not in taken))

    def _complain(self, number: int) -> str:
        """Print which cells failed and which were left out; the same in a line."""
        for cell, why in self.failed.items():
            show(f"failed: {cell}\n  {cell.command}\n  {_log_of(cell)}\n  {why}")
        for cell, need in self.left_out.items():
            show(f"left out: {cell}, needs {need}")
        if not self.failed:
            return ""
        more = f", {len(self.left_out)} that need them were left out" if self.left_out else ""
        return f"{len(self.failed)} of {number} runs failed{more}: see above"


def _bar(total: int) -> tqdm:
    """A bar that is shown on terminals only."""
    return tqdm(total=total, bar_format="{n_fmt}/{total_fmt} {bar:20}{postfix}", disable=None, leave=False)


# ---- a run -----------------------------------------------------------------------------------------------------------


def _log_of(cell: Cell) -> Path:
    """Where a cell's script prints to, beside the folder of its run."""
    folder = ROOT / cell.folder
    return folder.with_name(f"{folder.name}.log")


def _last_line(log: Path, code: int) -> str:
    """What a script said last, since it was started."""
    said = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines and not lines[-1].startswith("$ ") else f"exit code {code}"


def _line_of(cell: Cell, seconds: float) -> dict[str, Any]:
    """The line of cells.jsonl about a cell whose script took so long. UserError where its run is not there."""
    folder = ROOT / cell.folder
    config = read_yaml(folder / "config.yml", "a run's config.yml")
    origin = config.get("provenance") if isinstance(config.get("provenance"), dict) else {}
    lines = read_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    rows = [line["row"] for line in lines if isinstance(line.get("row"), dict)]
    epochs = [line for line in lines if {"seconds", "images_per_second"} <= line.keys()]
    images = [round(line["seconds"] * line["images_per_second"]) for line in epochs]
    asked = {row.get("queries") for row in rows}
    return {
        **{"step": cell.step, "at": dict(cell.at), "command": cell.command, "folder": str(cell.folder)},
        **{"commit": origin.get("commit"), "device": origin.get("device")},
        "versions": {name: origin.get(name) for name in ("python", "torch")},
        "seeds": {axis: value for axis, value in cell.at if "seed" in axis},
        # A run that went on took longer than its last process.
        "run_seconds": round(max(seconds, sum(e["seconds"] for e in epochs), *(_seconds(row) for row in rows), 0), 3),
        "images_trained": len(images) * max(images, default=0),  # in an epoch that went on, less than all were counted
        "queries": asked.pop() if len(asked) == 1 else _queries_in(folder / "checkpoint.pth.tar"),
        "rows": rows,
    }


def _seconds(row: Mapping) -> float:
    seconds = row.get("seconds")
    return seconds if isinstance(seconds, int | float) else 0.0


def _queries_in(path: Path) -> int | None:
    """The queries in the ledger of a copy's checkpoint, where there is one."""
    if not path.exists():
        return None
    with reading(path, "a checkpoint"):
        ledger = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("ledger") or {}
        return sum(account["queries"] for account in ledger.values()) if ledger else None
