"""Rows of the seconds from a script's start until its first step is done."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.row import claim, make_row, median_of
from benchmarks.timing import Contest, Effort, Missing, child

ROOT = Path(__file__).resolve().parent.parent
TRAIN = "run.py --dataset shapes --arch resnet10w32 --epochs 1 --print-freq 1"
FIRST = "Epoch: [0][0/"  # so begins the line of the first step


def until_first_step(device: torch.device, *flags: str, cache: str | None = None) -> None:
    """Run run.py until it has printed the line of its first step. RuntimeError where it ends before.

    cache: the folder for what torch.compile keeps.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *TRAIN.split(), "--checkpoint-dir", folder, "--device", str(device), *flags]
        environment = {**os.environ, **({"TORCHINDUCTOR_CACHE_DIR": cache} if cache else {})}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process, said = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes), ""
        try:
            for said in process.stdout:
                if said.startswith(FIRST):
                    return
            raise RuntimeError(f"run.py ended without a step: {said.strip()}")
        finally:  # at once: to let it save would count
            process.kill()
            process.communicate()


def start(effort: Effort) -> dict[str, Any]:
    """The row of a small network's training, not compiled."""
    contest = Contest(effort)
    contest.add("run.py", lambda: lambda: until_first_step(effort.device, "--compile", "off"))
    contest.add("import torch", lambda: lambda: child([sys.executable, "-c", "import torch"]))
    contest.run()
    limit = claim("seconds until the first step", median_of(contest, "run.py"), at_most=30 if effort.on_gpu else 5)
    notes = (f"`python {TRAIN} --compile off`, as a process, until it prints its first step", "files are in the cache")
    return make_row("Start of a run, resnet10w32, shapes", contest, "s", notes=notes, claims=[limit])


def start_compiled(effort: Effort) -> dict[str, Any]:
    """The row of the same with --compile on: with nothing compiled before, and again."""
    if effort.quick:
        raise Missing("left out by --quick")
    contest = Contest(effort)
    with tempfile.TemporaryDirectory() as kept:

        def anew() -> None:
            with tempfile.TemporaryDirectory() as cache:
                until_first_step(effort.device, "--compile", "on", cache=cache)

        def again() -> None:
            until_first_step(effort.device, "--compile", "on", cache=kept)

        contest.add("first time", lambda: anew, warm_up=False)
        contest.add("again", lambda: again)
        contest.run()
    limit = claim("seconds until the first step, compiled anew", median_of(contest, "first time"), at_most=30)
    notes = (f"`python {TRAIN} --compile on`", "again: what torch.compile kept of an earlier run is there")
    claims = [limit] if effort.on_gpu else []
    return make_row("Start of a compiled run, resnet10w32, shapes", contest, "s", notes=notes, claims=claims)
