"""Run an experiment of experiments/*.yaml: every attack against every defence, both sides judged, table and picture.

python reproduce.py experiments/defences-shapes.yaml --jobs 2

Runs the project's own scripts, `--jobs` of them side by side, and keeps what each finished one said in
results/<name>/done.jsonl: started again, it goes on where it stopped. Delete the folder to start anew.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jobs.early  # noqa: F401

from experiments.experiment import Experiment
from experiments.runner import Runner, run_all
from experiments.table import picture, results_table
from files.writing import atomic_path
from jobs.ending import script
from settings import Command, Parser, Settings, setting
from training.run import relative


@dataclass(frozen=True)
class Reproduction(Settings):
    """Which experiment, and where its results go."""

    results: Path = setting(Path("results"), "parent of the experiment's folder of results")
    jobs: int = setting(1, "scripts side by side", at_least=1)
    title = "run"


def parse(line: Sequence[str] | None = None) -> Command:
    parser = Parser(__doc__, [Reproduction])
    parser.add_argument("experiment", type=Path, help="a file such as experiments/defences-shapes.yaml")
    command = parser.parse(line)
    command.use(Reproduction)
    return command


@script
def main() -> None:
    command = parse()
    experiment = Experiment(command.given["experiment"])
    folder = (command.results / experiment.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with Runner(folder, command.jobs) as runner:
        rows = run_all(experiment, runner)
    text = results_table(rows)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(text + "\n")
    picture(rows, folder / "curves.png")
    print(f"{text}\n\ntable, picture and rows: {relative(folder)}")
    print(f"next: python runs.py --checkpoint-dir {shlex.quote(str(relative(folder / 'checkpoints')))}")


if __name__ == "__main__":
    main()
