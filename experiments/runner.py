"""Runs experiments/*.yaml: every attack against every defence, both sides judged, as a table and a picture."""

import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from files.writing import atomic_path
from utils import UserError

HERE = Path(__file__).resolve().parent.parent  # the folder of the scripts
KEYS = {"about", "common", "victim", "independent", "steal", "judge", "user", "detect", "verify"}
KEYS |= {"attacks", "defences", "seeds"}


@dataclass(frozen=True)
class Point:
    """A defence at a strength: its name, the strength if the experiment varies it, and its flags."""

    defence: str
    strength: float | None
    flags: str

    def __str__(self) -> str:
        return self.defence if self.strength is None else f"{self.defence} {self.strength:g}"


@dataclass(frozen=True)
class Attacker:
    """An attack's flags, the defences that it is run against (default: all), and detect.py's name for its stream.

    `judge`: further flags for judging its copies.
    """

    name: str
    flags: str
    against: tuple[str, ...] = ()
    stream: str = "task_plain_coverage"
    judge: str = ""


class Experiment:
    """The parts of a YAML file; its table crosses `points` and `attacks`."""

    def __init__(self, path: Path):
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}") from None
        unknown = set(content) - KEYS if isinstance(content, dict) else {"a list or text"}
        missing = {"victim", "steal", "judge", "user", "attacks", "defences"} - set(content or ())
        if unknown or missing:
            raise UserError(f"{path}: unknown {sorted(unknown) or 'nothing'}, missing {sorted(missing) or 'nothing'}")
        self.name, self.content = path.stem, content
        self.seeds = content.get("seeds", [0])
        self.points = [point for name, value in content["defences"].items() for point in _points(name, value)]
        self.attacks = [
            Attacker(name, value) if isinstance(value, str) else Attacker(name, **{**value, "against": _tuple(value)})
            for name, value in content["attacks"].items()
        ]
        known = set(content["defences"])
        for attack in self.attacks:
            if set(attack.against) - known:
                raise UserError(f"{path}: the attack {attack.name!r} is against {attack.against}: no such defence")

    def flags(self, part: str) -> str:
        return f"{self.content.get('common', '')} {self.content.get(part, '')}"

    def pairs(self) -> list[tuple[Attacker, Point]]:
        return [(a, p) for p in self.points for a in self.attacks if not a.against or p.defence in a.against]


def _tuple(attack: Mapping) -> tuple[str, ...]:
    return tuple(attack.get("against", ()))


def _points(name: str, value: str | Mapping) -> list[Point]:
    if isinstance(value, str):
        return [Point(name, None, value)]
    return [Point(name, strength, f"{value['flags']} {value['vary']} {strength}") for strength in value["values"]]


class Runner:
    """Runs scripts, `jobs` at a time, and remembers their results by command line.

    The results of finished scripts are saved in `folder`/done.jsonl, so that a restarted runner does not repeat them.
    """

    def __init__(self, folder: Path, jobs: int):
        self.root, self.workers = folder / "checkpoints", max(1, cores() // jobs)
        self.file = folder / "done.jsonl"
        self.lock = threading.Lock()
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {entry["command"]: entry for entry in map(json.loads, lines)}

    def __call__(self, line: str) -> dict:
        """{"path": the checkpoint that the script names, "rows": the rows that it wrote}. UserError when it fails."""
        command = " ".join(shlex.split(line))
        if command in self.done:
            return self.done[command]
        words = [*shlex.split(line), "--checkpoint-dir", str(self.root), "--workers", str(self.workers)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.workers)}
        print(f"$ python {command}", flush=True)
        called = [sys.executable, *words]
        ended = subprocess.run(called, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            last = (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1:]
            raise UserError(f"`python {command}` failed: {' '.join(last)}")
        entry = {"command": command, "path": _path_in(ended.stdout), "rows": self._rows(" ".join(words))}
        with self.lock, self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        return entry

    def _rows(self, command: str) -> list[dict]:
        """The rows that a command wrote."""
        results = self.root / "results.jsonl"
        lines = results.read_text().splitlines() if results.exists() else []
        return [row for row in map(json.loads, lines) if row.get("command") == command]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _path_in(output: str) -> str | None:
    """The checkpoint that a script's output names."""
    named = re.findall(r"^(?:victim|copy): (.+\.pth\.tar)$", output, re.MULTILINE)
    return str(HERE / named[-1]) if named else None


def run_all(experiment: Experiment, runner: Runner, jobs: int) -> list[dict]:
    """Run everything that the experiment specifies; returns a row for each attack, defence, strength and seed."""
    victim = runner(f"run.py {experiment.flags('victim')} --resume")["path"]
    of_victim = f"--victim {victim}"

    def copied(attack: Attacker, point: Point, seed: int) -> dict:
        line = f"steal.py {experiment.flags('steal')} {of_victim} {attack.flags} {point.flags} --seed {seed} --resume"
        copy = runner(line)["path"]
        line = f"linear_eval.py {experiment.flags('judge')} {attack.judge} --modeltype stolen --stolen {copy}"
        judged = runner(line)["rows"][-1]
        return {"attack": attack, "point": point, "seed": seed, "copy": judged, "path": copy}

    def user(point: Point) -> dict:
        return runner(f"legitimate.py {experiment.flags('user')} {of_victim} {point.flags}")["rows"][-1]

    with ThreadPoolExecutor(jobs) as pool:
        others = [
            pool.submit(runner, f"run.py {experiment.content.get('common', '')} {flags} --resume")
            for flags in experiment.content.get("independent", [])
        ]
        users = {point: pool.submit(user, point) for point in experiment.points}
        copies = [
            pool.submit(copied, attack, point, seed)
            for attack, point in experiment.pairs()
            for seed in experiment.seeds
        ]
        rows = [{**copy.result(), "user": users[copy.result()["point"]].result()} for copy in copies]
        independent = [other.result()["path"] for other in others]
    if "detect" in experiment.content:
        seen = runner(f"detect.py {experiment.flags('detect')} {of_victim}")["rows"][-1]
        rows = [{**row, "detection": seen} for row in rows]
    if "verify" in experiment.content:
        suspects = " ".join(row["path"] for row in rows)
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
