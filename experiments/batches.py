"""Runs the cells of a grid as Slurm jobs: an array for each step, after the arrays of the steps that it needs."""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from experiments.grid import Cell, Grid
from experiments.workers import ROOT
from files.writing import atomic_path
from utils import UserError

# As the scripts of slurm/ have it. Options on sbatch's command line come first.
_HEAD = """\
#!/usr/bin/env bash
# {number} runs of the step {step}, one for each task of the array.
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
set -euo pipefail
cd {root}
. slurm/requeue.sh
case $SLURM_ARRAY_TASK_ID in
"""


def submit(grid: Grid, cells: Sequence[Cell], folder: Path, options: Sequence[str] = ()) -> list[str]:
    """Submit cells as job arrays, one for each step; a line for each array.

    The batch scripts and the jobs' output go to `folder`/slurm. options: of sbatch, such as --gres=none. An array
    begins when those of the steps that it needs have finished, and is cancelled where a task of these failed. The runs
    are noted in cells.jsonl by a Runner afterwards, which finds them finished. UserError where sbatch refuses.
    """
    place = (folder / "slurm").absolute()
    place.mkdir(parents=True, exist_ok=True)
    (ROOT / grid.runs).mkdir(parents=True, exist_ok=True)
    jobs: dict[str, str] = {}
    lines = []
    for step in grid.steps:
        mine = [cell for cell in cells if cell.step == step]
        if not mine:
            continue
        needed = dict.fromkeys(need.step for cell in mine for need in cell.needs)
        after = [jobs[name] for name in needed if name in jobs]
        script = place / f"{step}.sbatch"
        with atomic_path(script) as temporary:
            temporary.write_text(_script(step, mine))
        flags = [f"--array=0-{len(mine) - 1}", f"--job-name={grid.name}-{step}", f"--output={place}/%x-%A_%a.out"]
        if after:
            flags += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
        jobs[step] = _sbatch([*flags, *options, str(script)])
        lines.append(f"{step}: job {jobs[step]}, {len(mine)} runs" + f", after {', '.join(after)}" * bool(after))
    return lines


def _script(step: str, cells: Sequence[Cell]) -> str:
    """The batch script of a step's array."""
    head = _HEAD.format(number=len(cells), step=step, root=shlex.quote(str(ROOT)))
    tasks = [f'{number}) step "$PYTHON" {shlex.join(cell.words)} ;;\n' for number, cell in enumerate(cells)]
    return head + "".join(tasks) + "esac\n"


def _sbatch(arguments: Sequence[str]) -> str:
    """The number of the job that sbatch submits. UserError where there is no Slurm, or where sbatch refuses."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError(
            "there is no sbatch on this machine: run without --slurm, or on a login node of Slurm"
        ) from None
    if done.returncode:
        raise UserError(f"sbatch refused {arguments[-1]}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
