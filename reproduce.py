"""Run the experiments of experiments/*.yaml: what is missing, then tables, pictures and a page.

python reproduce.py experiments/losses.yaml --scale demo --jobs 2
python reproduce.py experiments/*.yaml --scale small --dry-run          # the commands, one a line
python reproduce.py experiments/losses.yaml --scale small --only attack=mse,seed=0
python reproduce.py experiments/losses.yaml --scale full --slurm "--partition=gpu"

results/SCALE/NAME/ gets cells.jsonl, a line for each run that has ended, and is made from it: table.md, .csv, .tex, the
pictures, claims.json and report.html. The runs themselves are in results/runs/; experiments share those that are the
same. Started again, the command goes on where it stopped.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jobs.early  # noqa: F401

from experiments.batches import submit
from experiments.grid import Grid
from experiments.report import PARTS, check, write_report
from experiments.results import Prices
from experiments.runner import Runner, select
from experiments.workers import ROOT
from jobs.ending import script
from settings import Command, Parser, Settings, setting
from training.run import relative
from utils import UserError


@dataclass(frozen=True)
class Reproduction(Settings):
    """Which runs, and where the results go."""

    scale: str = setting("demo", "data, networks, epochs and seeds: a name in experiments/scales.yaml")
    results: Path = setting(Path("results"), "root of all results")
    jobs: int = setting(1, "scripts side by side", at_least=1)
    only: str | None = setting(None, "run what agrees with AXIS=VALUE,AXIS=VALUE, and what that needs")
    dry_run: bool = setting(False, "print the commands, and run nothing")
    slurm: str | bool = setting(
        False,
        "submit what is missing as job arrays, a step each; a text is options of sbatch",
        read=str,
        optional_value=True,
    )
    price_per_1000_queries: float = setting(0.0, "what an attacker pays for queries, in dollars", at_least=0)
    price_per_hour: float = setting(0.0, "what the machine costs, in dollars", at_least=0)
    title = "run"


def parse(line: Sequence[str] | None = None) -> Command:
    parser = Parser(__doc__, [Reproduction])
    parser.add_argument("experiments", type=Path, nargs="+", help="files such as experiments/losses.yaml")
    command = parser.parse(line)
    command.use(Reproduction)
    return command


def prepare(path: Path, asked: Reproduction) -> Runner:
    """What will run an experiment. UserError for a file that is none."""
    root = asked.results.absolute()
    # From the scripts' folder, where their commands are to be pasted.
    root = root.relative_to(ROOT) if root.is_relative_to(ROOT) else root
    grid = Grid(path.absolute(), asked.scale, root / "runs", PARTS)
    check(grid)
    return Runner(grid, ROOT / root / asked.scale / grid.name, asked.jobs)


@script
def main() -> None:
    command = parse()
    asked = command[Reproduction]
    paths = [path for path in command.given["experiments"] if path.name != "scales.yaml"]
    runners = [prepare(path, asked) for path in paths]  # all, before the first of them runs
    os.chdir(ROOT)
    complaints = []
    for runner in runners:
        cells = select(runner.grid, asked.only) if asked.only else runner.grid.unique()
        if asked.dry_run:
            print(*runner.plan(cells), sep="\n")
            continue
        if asked.slurm:
            options = shlex.split(asked.slurm) if isinstance(asked.slurm, str) else []
            print(*submit(runner.grid, runner.left(cells), runner.folder, options), sep="\n")
            continue
        complaints += [f"{runner.grid.name}: {said}" for said in [runner.run(cells)] if said]
        prices = Prices(asked.price_per_1000_queries, asked.price_per_hour)
        table = write_report(runner.grid, list(runner.lines.values()), runner.folder, prices)
        print(f"{table}\n{relative(runner.folder / 'report.html')}")
    if complaints:
        raise UserError("; ".join(complaints))


if __name__ == "__main__":
    main()
