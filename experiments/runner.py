"""Runs experiments/*.yaml: every attack against every defence, both sides judged."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any

from experiments.experiment import Attacker, Experiment, Point
from files.reading import list_of, optional, read_lines, record, table, text
from files.writing import add_line, lock
from jobs.ending import SAVED, Stopped, deferred
from utils import UserError

HERE = Path(__file__).resolve().parent.parent  # the folder of the scripts


class Runner:
    """Runs scripts, `jobs` at a time, and remembers their results by command line.

    The results of finished scripts are saved in `folder`/done.jsonl, so that a restarted runner does not repeat them;
    scripts that were stopped go on. As a context manager it stops the scripts that run, which save, and starts no
    others, when its block is left. UserError where another process works in the folder.
    """

    def __init__(self, folder: Path, jobs: int):
        self.root, self.threads = folder / "checkpoints", max(1, cores() // jobs)
        self.file = folder / "done.jsonl"
        self.pool = ThreadPoolExecutor(jobs)
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        self.turns: dict[str, threading.Lock] = {}  # a command that is asked for twice runs once
        lines = read_lines(self.file) if self.file.exists() else []
        # Paths are relative to the folder, which may be moved.
        there = (line for line in lines if not _FINISHED(line) and (folder / (line["path"] or "")).exists())
        self.done = {line["command"]: line for line in there}

    def __enter__(self) -> "Runner":
        self.folder_lock = lock(self.file.parent)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with deferred():  # only a second Ctrl-C does not wait
            try:
                with self.lock:
                    self.stopped = True
                for child in [*self.running]:
                    child.terminate()
                for child in [*self.running]:
                    child.wait()
            except KeyboardInterrupt:
                for child in [*self.running]:
                    child.kill()
                raise
            finally:
                self.pool.shutdown(cancel_futures=True)
                if self.folder_lock is not None:
                    os.close(self.folder_lock)
        if isinstance(error, Stopped):
            raise Stopped(f"{error}: the same command goes on from there") from None

    def checkpoint(self, *words: str) -> str:
        """The path of the checkpoint that a script makes. UserError when it fails."""
        return os.path.normpath(self.file.parent / self._run(words, "path"))

    def rows(self, *words: str) -> list[dict]:
        """The rows that a script writes, at least one. UserError when it fails."""
        return self._run(words, "rows")

    def _run(self, words: Sequence[str], wanted: str) -> Any:
        """What is wanted of a script, which is run unless it is done."""
        words = [*words, "--resume"]
        command = shlex.join(words)
        with self.turns.setdefault(command, threading.Lock()):
            if not self.done.get(command, {}).get(wanted):
                code, out, err = self._call(words, command)
                _check_code(command, code, err.strip() or out.strip())
                entry = {"command": command, "path": self._path_in(out), "rows": self._rows_of(words, out)}
                if not entry[wanted]:
                    raise UserError(f"`python {command}` {_MISSING[wanted]}")
                self.done[command] = entry
                with self.lock:
                    add_line(self.file, entry)
            return self.done[command][wanted]

    def _call(self, words: Sequence[str], command: str) -> tuple[int, str, str]:
        """The exit code of a script, and what it printed. A run that goes on keeps its number of threads."""
        called = [sys.executable, *words, "--checkpoint-dir", str(self.root)]
        options = {"cwd": HERE, "env": {**os.environ, "OMP_NUM_THREADS": str(self.threads)}}
        with self.lock:
            if self.stopped:
                raise CancelledError
            print(f"$ python {command}", flush=True)
            child = subprocess.Popen(called, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
            self.running.add(child)
        out, err = child.communicate()
        with self.lock:
            self.running.discard(child)
            if self.stopped:
                raise CancelledError
        return child.returncode, out, err

    def _path_in(self, output: str) -> str | None:
        """The checkpoint that a script's output names, as seen from the folder."""
        named = re.findall(r"^(?:victim|copy): (.+\.pth\.tar)$", output, re.MULTILINE)
        return os.path.relpath(HERE / named[-1], self.file.parent) if named else None

    def _rows_of(self, words: Sequence[str], output: str) -> list[dict]:
        """The rows that a command wrote, or the run that it says is finished."""
        results = self.root / "results.jsonl"
        rows = read_lines(results) if results.exists() else []
        finished = re.search(r"^(.+) has its results already$", output, re.MULTILINE)
        if finished:
            run = os.path.relpath(HERE / finished[1], self.root)
            return [row for row in rows if row.get("run") == run]
        command = " ".join([*words, "--checkpoint-dir", str(self.root)])
        return [row for row in rows if row.get("command") == command]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_MISSING = {"path": "named no checkpoint", "rows": "wrote no row"}
# A line of done.jsonl; others are left out, and their scripts run again.
_FINISHED = record(command=text(), path=optional(text()), rows=list_of(table()))


def _check_code(command: str, code: int, printed: str) -> None:
    """Stopped or UserError for a script that did not end as it should."""
    if code == SAVED:
        raise Stopped(f"`python {command}` was stopped")
    if code < 0:
        raise UserError(f"`python {command}` was ended by {signal.Signals(-code).name}")
    if code:
        said = printed.splitlines()[-1].removeprefix("error: ") if printed else f"exit code {code}"
        raise UserError(f"`python {command}` failed: {said}")


def run_all(experiment: Experiment, runner: Runner) -> list[dict]:
    """Run everything that the experiment specifies; returns a row for each attack, defence, strength and seed."""
    submit = runner.pool.submit
    victim = submit(runner.checkpoint, "run.py", *experiment.words("victim")).result()
    of_victim = ("--victim", victim)

    def copied(attack: Attacker, point: Point, seed: int) -> dict:
        asked = (*shlex.split(f"{attack.flags} {point.flags}"), "--seed", str(seed))
        of = of_victim
        if attack.victim:
            words = (*experiment.words("victim"), *shlex.split(attack.victim))
            of = ("--victim", runner.checkpoint("run.py", *words))
        copy = runner.checkpoint("steal.py", *experiment.words("steal"), *of, *asked)
        judge = (*experiment.words("judge"), *shlex.split(attack.judge), "--modeltype", "stolen", "--stolen", copy)
        judged = runner.rows("linear_eval.py", *judge)[-1]
        return {"attack": attack, "point": point, "seed": seed, "copy": judged, "path": copy}

    def user(point: Point) -> dict:
        words = (*experiment.words("user"), *of_victim, *shlex.split(point.flags))
        return runner.rows("legitimate.py", *words)[-1]

    def watched(attack: Attacker) -> dict:
        words = (*experiment.words("detect"), *of_victim, *shlex.split(attack.detect))
        return runner.rows("detect.py", *words)[-1]

    others = [
        submit(runner.checkpoint, "run.py", *experiment.words(), *shlex.split(flags))
        for flags in experiment.content.get("independent", [])
    ]
    users = {point: submit(user, point) for point in experiment.points}
    copies = [submit(copied, attack, point, seed) for attack, point in experiment.pairs() for seed in experiment.seeds]
    for ended in as_completed([*others, *users.values(), *copies]):
        ended.result()  # the first failure ends the experiment
    rows = [{**copy.result(), "user": users[copy.result()["point"]].result()} for copy in copies]
    if "detect" in experiment.content:
        seen = {attack: submit(watched, attack) for attack in experiment.attacks if attack.stream}
        rows = [{**row, "detection": seen[row["attack"]].result() if row["attack"] in seen else {}} for row in rows]
    if "verify" in experiment.content:
        suspects = [row for row in rows if not row["attack"].victim and row["copy"].get("queries")]  # no controls
        encoders = ["--suspect", *(row["path"] for row in suspects)]
        encoders += ["--independent", *(other.result() for other in others)] if others else []
        asked = submit(runner.rows, "verify.py", *experiment.words("verify"), *of_victim, *encoders)
        verified = {row["checkpoint"]: row for row in asked.result()}
        rows = [{**row, "verified": verified[row["path"]]} if row in suspects else row for row in rows]
    return rows
