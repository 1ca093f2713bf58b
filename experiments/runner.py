"""Runs experiments/*.yaml: every attack against every defence, both sides judged, as a table and a picture."""

import itertools
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

from experiments.experiment import Attacker, Experiment, Point
from files.reading import list_of, optional, read_lines, record, table, text
from files.writing import add_line, atomic_path
from utils import UserError

HERE = Path(__file__).resolve().parent.parent  # the folder of the scripts


class Runner:
    """Runs scripts, `jobs` at a time, and remembers their results by command line.

    The results of finished scripts are saved in `folder`/done.jsonl, so that a restarted runner does not repeat them.
    As a context manager it stops the scripts that run, which save, and starts no others, when its block is left.
    """

    def __init__(self, folder: Path, jobs: int):
        self.root, self.workers = folder / "checkpoints", max(1, cores() // jobs)
        self.file = folder / "done.jsonl"
        self.pool = ThreadPoolExecutor(jobs)
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        lines = read_lines(self.file) if self.file.exists() else []
        self.done = {line["command"]: line for line in lines if not _FINISHED(line)}

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.stopped = True
            for child in self.running:
                child.terminate()
        for child in tuple(self.running):
            child.wait()
        self.pool.shutdown(cancel_futures=True)

    def __call__(self, line: str) -> dict:
        """{"path": the checkpoint that the script names, "rows": the rows that it wrote}. UserError when it fails."""
        command = shlex.join(shlex.split(line))
        if command in self.done:
            return self.done[command]
        words = [*shlex.split(line), "--checkpoint-dir", str(self.root), "--workers", str(self.workers)]
        code, out, err = self._run(words, command)
        if code:
            last = (err.strip() or out.strip()).splitlines()[-1:]
            raise UserError(f"`python {command}` failed: {' '.join(last)}")
        entry = {"command": command, "path": _path_in(out), "rows": self._rows(" ".join(words))}
        with self.lock:
            add_line(self.file, entry)
        return entry

    def _run(self, words: Sequence[str], command: str) -> tuple[int, str, str]:
        """The exit code of a script, and what it printed."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.workers)}
        with self.lock:
            if self.stopped:
                raise CancelledError
            print(f"$ python {command}", flush=True)
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            child = subprocess.Popen([sys.executable, *words], cwd=HERE, env=environment, **pipes)
            self.running.add(child)
        out, err = child.communicate()
        with self.lock:
            self.running.discard(child)
            if self.stopped:
                raise CancelledError
        return child.returncode, out, err

    def _rows(self, command: str) -> list[dict]:
        """The rows that a command wrote."""
        results = self.root / "results.jsonl"
        rows = read_lines(results) if results.exists() else []
        return [row for row in rows if row.get("command") == command]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# A line of done.jsonl; others are left out, and their scripts run again.
_FINISHED = record(command=text(), path=optional(text()), rows=list_of(table()))


def _path_in(output: str) -> str | None:
    """The checkpoint that a script's output names."""
    named = re.findall(r"^(?:victim|copy): (.+\.pth\.tar)$", output, re.MULTILINE)
    return str(HERE / named[-1]) if named else None


def run_all(experiment: Experiment, runner: Runner) -> list[dict]:
    """Run everything that the experiment specifies; returns a row for each attack, defence, strength and seed."""
    victim = runner(f"run.py {experiment.flags('victim')} --resume")["path"]
    of_victim = f"--victim {shlex.quote(victim)}"

    def copied(attack: Attacker, point: Point, seed: int) -> dict:
        line = f"steal.py {experiment.flags('steal')} {of_victim} {attack.flags} {point.flags} --seed {seed} --resume"
        copy = runner(line)["path"]
        judge = f"linear_eval.py {experiment.flags('judge')} {attack.judge} --modeltype stolen"
        judged = runner(f"{judge} --stolen {shlex.quote(copy)}")["rows"][-1]
        return {"attack": attack, "point": point, "seed": seed, "copy": judged, "path": copy}

    def user(point: Point) -> dict:
        return runner(f"legitimate.py {experiment.flags('user')} {of_victim} {point.flags}")["rows"][-1]

    common = experiment.content.get("common", "")
    others = [
        runner.pool.submit(runner, f"run.py {common} {flags} --resume")
        for flags in experiment.content.get("independent", [])
    ]
    users = {point: runner.pool.submit(user, point) for point in experiment.points}
    copies = [
        runner.pool.submit(copied, attack, point, seed)
        for attack, point in experiment.pairs()
        for seed in experiment.seeds
    ]
    rows = [{**copy.result(), "user": users[copy.result()["point"]].result()} for copy in copies]
    independent = [shlex.quote(other.result()["path"]) for other in others]
    if "detect" in experiment.content:
        seen = runner(f"detect.py {experiment.flags('detect')} {of_victim}")["rows"][-1]
        rows = [{**row, "detection": seen} for row in rows]
    if "verify" in experiment.content:
        suspects = " ".join(shlex.quote(row["path"]) for row in rows)
        line = f"verify.py {experiment.flags('verify')} {of_victim} --suspect {suspects}"
        verified = runner(f"{line} --independent {' '.join(independent)}" if independent else line)["rows"]
        by_path = {row["checkpoint"]: row for row in verified}
        rows = [{**row, "verified": by_path[row["path"]]} for row in rows]
    return rows


# ---- table and picture -----------------------------------------------------------------------------------------------


def results_table(rows: Sequence[Mapping]) -> str:
    """A Markdown table: a line for each defence, strength and attack; accuracies are means over the seeds."""
    head = ["defence", "attack", "copy", "copy, kNN", "user", "queries (distinct)", "detection AUC", "watermark"]
    head += ["p (binomial)", "p (t)", "p (encoders)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key in dict.fromkeys((row["point"], row["attack"].name) for row in rows):
        same = [row for row in rows if (row["point"], row["attack"].name) == key]
        lines.append("| " + " | ".join([str(key[0]), key[1], *_cells(same)]) + " |")
    return "\n".join(lines)


def _cells(rows: Sequence[Mapping]) -> list[str]:
    """The figures of rows that differ in the seed only."""
    first = rows[0]
    verified = [row["verified"] for row in rows if "verified" in row]
    detected = first["detection"].get(f"auc_{first['attack'].stream}") if "detection" in first else None
    return [
        _mean([row["copy"]["top1_converged"] for row in rows]),
        _mean([row["copy"]["knn"] for row in rows]),
        f"{first['user']['top1_converged']:.1f}",
        f"{first['copy']['queries']:,} ({first['copy']['distinct']:,})",
        "" if detected is None else f"{detected:.2f}",
        _mean([row["accuracy"] for row in verified]) if verified else "",
        *(_worst(verified, name) for name in ("p_binomial", "p_t", "p_encoders")),
    ]


def _worst(rows: Sequence[Mapping], name: str) -> str:
    """The largest p-value of that name, if the rows have any."""
    values = [row[name] for row in rows if name in row]
    return f"{max(values):.2g}" if values else ""


def _mean(values: Sequence[float]) -> str:
    """The mean, for three or more seeds with the standard deviation."""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) >= 3 else mean


def picture(rows: Sequence[Mapping], path: Path) -> None:
    """For each attack run against every defence: the user's accuracy by the copy's, a line through the strengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    attacks = list(dict.fromkeys(row["attack"].name for row in rows if not row["attack"].against))
    defences = list(dict.fromkeys(row["point"].defence for row in rows))
    colours = dict(zip(defences, itertools.cycle(pyplot.colormaps["tab20"].colors), strict=False))
    figure, axes = pyplot.subplots(1, len(attacks), figsize=(6 * len(attacks), 5), layout="constrained", squeeze=False)
    for axis, attack in zip(axes[0], attacks, strict=True):
        for defence in defences:
            points = _curve([row for row in rows if (row["attack"].name, row["point"].defence) == (attack, defence)])
            style = {"marker": "o", "markersize": 4, "color": colours[defence], "label": defence}
            axis.plot(*zip(*[point[:2] for point in points], strict=True), **style)
            for x, y, strength in points:
                if strength is not None:
                    axis.annotate(f"{strength:g}", (x, y), fontsize=6, xytext=(2, 2), textcoords="offset points")
        axis.set(xlabel="copy's accuracy (%)", ylabel="user's accuracy (%)", title=attack)
    axes[0][-1].legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _curve(rows: Sequence[Mapping]) -> list[tuple[float, float, float | None]]:
    """(copy's accuracy, user's accuracy, strength), means over the seeds, in the order of the strengths."""
    points = []
    for point in dict.fromkeys(row["point"] for row in rows):
        same = [row for row in rows if row["point"] == point]
        accuracy = statistics.fmean(row["copy"]["top1_converged"] for row in same)
        points.append((accuracy, same[0]["user"]["top1_converged"], point.strength))
    return points
