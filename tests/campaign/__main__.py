"""python -m tests.campaign [kills|files|lines] [--trials N] [--seed S] [--only NUMBER]"""

import argparse
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.campaign import files, forked, kills, lines

KINDS = {"kills": (kills, 240), "files": (files, len(files.CASES)), "lines": (lines, len(lines.CASES))}


def _each(function: Callable, items: Sequence[tuple], processes: int) -> list:
    """The function of each item, by several processes, in order."""
    if processes == 1:
        return [function(*item) for item in items]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.starmap(function, items, chunksize=1)


def _tried(kind: str, work: Path, number: int, seed: int) -> tuple[str, str | None]:
    try:
        tried, wrong = KINDS[kind][0].trial(work, number, random.Random(f"{kind}/{seed}/{number}"))
    except Exception as error:  # what the campaign could not make of the end is a failure too
        tried, wrong = "?", f"the campaign failed: {type(error).__name__}: {error}"
    print("x" if wrong else ".", end="", flush=True, file=sys.stderr)
    return tried, wrong


def campaign(kind: str, numbers: list[int], seed: int, processes: int) -> int:
    """Run these trials of a kind, print its row and its failures; returns how many failed."""
    module, started = KINDS[kind][0], time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=f"campaign-{kind}-"))
    try:
        module.prepare(work, numbers, lambda function, items: _each(function, items, processes))
        ended = _each(_tried, [(kind, work, number, seed) for number in numbers], processes)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(file=sys.stderr)
    failed = [(number, *end) for number, end in zip(numbers, ended, strict=True) if end[1]]
    print(f"| {kind} | {len(ended)} | {len(ended) - len(failed)} | {time.monotonic() - started:.0f} s |")
    for number, tried, wrong in failed:
        print(f"  {tried}\n    {wrong}\n    python -m tests.campaign {kind} --seed {seed} --only {number}", flush=True)
    return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", nargs="?", choices=KINDS, help="default: all of them")
    parser.add_argument("--trials", type=int, help="default: 240 kills, each file and each line once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="these trials only")
    parser.add_argument("--processes", type=int, default=2, help="trials side by side")
    asked = parser.parse_args()
    forked.import_scripts()
    print("| kind | tried | held | time |\n|---|---|---|---|")
    failed = 0
    for kind in [asked.kind] if asked.kind else KINDS:
        numbers = asked.only or list(range(asked.trials or KINDS[kind][1]))
        failed += campaign(kind, numbers, asked.seed, asked.processes)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
