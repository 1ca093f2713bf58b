"""The whole story in minutes, on embedded data and a CPU: train a victim, steal it twice, judge everyone.

python demo.py            (make demo)

Runs the project's own scripts, prints each command, then one table, and saves one picture.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jobs.early  # noqa: F401

from evaluation.figures import neighbour_picture
from experiments.results import between_runs, of_run
from experiments.table import spelled
from files.reading import read_lines
from files.writing import atomic_path
from jobs.ending import SAVED, Stopped, script
from settings import Command, Parser, Settings, setting

HERE = Path(__file__).resolve().parent
ARCH = "resnet10w32"
QUERIES = 1500
LOSSES = ("mse", "infonce")
# Everyone is judged on the images that no attacker of this victim may query.
JUDGE = f"--dataset-test shapes --arch {ARCH} --num-labeled 1000 --num-test 1000"
TRAIN = f"--dataset shapes --arch {ARCH} --num-train 4000 --epochs 16 --flat-epochs 1 --batch-size 128 --lr 0.002"
COPY = f"--datasetsteal shapes --num_queries {QUERIES} --epochs 3"
STEAL = f"--dataset shapes --archstolen {ARCH} {COPY} --flat-epochs 1 --batch-size 32 --lr 0.002"
REASON = "its training was stopped early, and copies learn from its answers to plain images, on which all are judged."
KINDS = {"victim": "--modeltype victim --dataset shapes", "random encoder": "--modeltype random"}


@dataclass(frozen=True)
class Demo(Settings):
    """Where the demonstration leaves its runs, table and picture."""

    out: Path = setting(Path("demo-results"), "folder for runs, table and picture")


def parse(line: Sequence[str] | None = None) -> Command:
    command = Parser(__doc__, [Demo]).parse(line)
    command.use(Demo)
    return command


def call(root: Path, script_name: str, arguments: str) -> float:
    """Run a script, showing its command and its output; seconds taken. Exits with its code, and says no more."""
    command = [script_name, *arguments.split(), "--checkpoint-dir", str(root)]
    print(f"\n$ python {' '.join(command)}", flush=True)
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, str(HERE / command[0]), *command[1:]]) as child:
        try:
            code = child.wait()
        except Stopped:
            child.terminate()
            code = child.wait() or SAVED
    if code:
        sys.exit(code)
    return time.perf_counter() - started


def run_everything(root: Path) -> list[dict]:
    """The seven commands; a row for each encoder: its name, the evaluation's row, the seconds it took to make."""
    made = {"victim": call(root, "run.py", TRAIN)}
    for loss in LOSSES:
        made[f"copy, {loss}"] = call(root, "steal.py", f"{STEAL} --losstype {loss}")
    made["random encoder"] = 0.0
    for name in made:
        copy = f"--modeltype stolen --dataset shapes {COPY} --losstype {name.removeprefix('copy, ')}"
        call(root, "linear_eval.py", f"{JUDGE} {KINDS.get(name, copy)}")
    results = read_lines(root / "results.jsonl")
    return [{"name": name, **row, "made_in": made[name]} for name, row in zip(made, results, strict=True)]


def demo_table(rows: list[dict]) -> str:
    """The rows, the victim's first, as a Markdown table with 95 % intervals for the number of test images."""
    lines = [
        "| encoder | top-1, converged | minus the victim's | kNN | queries | seconds to make |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        minus = None if row is rows[0] else between_runs(row, rows[0], "top1_converged")
        top1, knn = (spelled(name, of_run(row, name)) for name in ("top1_converged", "knn"))
        figures = top1, spelled("top1_converged", minus, signed=True), knn
        lines.append(f"| {row['name']} | {' | '.join(figures)} | {row['queries']:,} | {row['made_in']:.0f} |")
    return "\n".join(lines)


def lesson(rows: list[dict]) -> str:
    """What the table teaches; a copy above its victim has its reason beside it."""
    victim, *copies, random = [row["top1_converged"] for row in rows]
    text = f"{rows[0]['test_images']:,} test images; [a, b]: 95 % intervals, of differences on the same images.\n"
    text += f"{QUERIES:,} answers carry a copy {min(copies) - random:.0f} points above an untrained encoder"
    if max(copies) <= victim:
        return f"{text}, {victim - max(copies):.0f} below its victim."
    return f"{text}, and {max(copies) - victim:.0f} above its victim:\n{REASON}"


@script
def main() -> None:
    out = parse().out
    started = time.perf_counter()
    shutil.rmtree(out / "runs", ignore_errors=True)
    rows = run_everything(out / "runs")
    text = f"{demo_table(rows)}\n\n{lesson(rows)}"
    neighbour_picture(rows, ARCH, out / "demo.png")
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(text + "\n")
    print(f"\n{text}\n\npicture: {out / 'demo.png'}; all in {time.perf_counter() - started:.0f} seconds")
    print("next: python reproduce.py experiments/defences.yaml --jobs 2")


if __name__ == "__main__":
    main()
