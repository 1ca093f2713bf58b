"""The folder of a run: its name, what it is, and what it writes."""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from data_aug.datasets import canonical_name
from files.reading import checked, number, read_lines, read_yaml, table, text
from files.writing import add_line, atomic_path, lock, naming, put_line
from jobs.ending import show
from settings import Command, Setting
from training.record import Record
from utils import Precision, UserError, first_process, provenance

CHECKPOINT = "checkpoint.pth.tar"
MOST_THREADS = 1024  # that a stored configuration may ask for
NAME_BYTES = 200  # of a folder's name; file systems end at 255, and some cut earlier


_SPELT = {"num_queries": "{}q", "epochs": "{}ep", "seed": "seed{}"}


# ---- a run's folder --------------------------------------------------------------------------------------------------


class _Log(logging.FileHandler):
    """A log whose errors are raised, where the library would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        with naming(Path(self.baseFilename)):
            raise


class Run:
    """An experiment: its folder, its configuration, and how it is run.

    config.yml (the values in force, commit, versions, device), checkpoint.pth.tar, metrics.jsonl (a line per record),
    run.log and tensorboard events, which go to a folder of the run's name below `events` where that is given. Making a
    Run writes nothing before `start()`, so that whatever is wrong with the input can be found first. Between `start()`
    and `finish()` no other process writes in the folder. Of a job's processes only rank 0 writes.

    resume: go on with what is in the folder, or from another checkpoint. clear: delete the log, metrics and events of
    an earlier run in this folder. results: a file that has the rows of all runs. record: what the checkpoint says of
    its origin.
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        config: Mapping[str, Any] | None = None,
        resume: bool | Path = False,
        clear: bool = True,
        events: Path | None = None,
        results: Path | None = None,
    ):
        self.folder, self.precision, self.config = folder, precision, dict(config or {})
        self.resume, self.clear, self.results = resume, clear, results
        self.checkpoint, self.metrics = folder / CHECKPOINT, folder / "metrics.jsonl"
        self.record = Record()
        self.decisive: Collection[str] = ()  # the settings that decide the result
        self.earlier: dict[str, Any] = {}  # the values of those that a run of an earlier version does not name
        self._events = events / folder.name if events else folder
        self._writer = None
        self._lock: int | None = None
        self._rows = 0
        self._logger = logging.getLogger(f"run.{folder}")

    def below(self, name: str, kind: str | None = None) -> "Run":
        """The run of a part of this experiment, in a sub-folder."""
        config = {**self.config, **({"kind": kind} if kind else {})}
        return Run(self.folder / name, self.precision, config, self.resume, self.clear)

    def differences(self, stored: Mapping) -> dict[str, Any]:
        """The decisive settings that have another value in a stored config or checkpoint, with that value."""
        now = self.config.get("settings", {})
        before = {**self.earlier, **stored["settings"]} if stored.get("settings") else {}
        return {name: before[name] for name in self.decisive if name in before and plain(before[name]) != now[name]}

    def start(self, from_epoch: int = 0) -> None:
        """Make the folder and write config.yml; UserError where it cannot be written.

        When a run goes on from `from_epoch`, the metrics of that epoch and later ones are dropped: they come again.
        """
        if not first_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder)
        for cut in self.folder.glob(".*.tmp"):  # a kill while a file was written
            cut.unlink()
        if self.clear and from_epoch == 0:
            for old in [self.folder / "run.log", self.metrics, *self._events.glob("events.out.tfevents.*")]:
                old.unlink(missing_ok=True)
        if from_epoch and self.metrics.exists():
            kept = [line for line in self.lines() if line.get("epoch", from_epoch) < from_epoch]
            with atomic_path(self.metrics) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        with atomic_path(self.folder / "config.yml") as temporary:
            temporary.write_text(yaml.safe_dump(self.config, sort_keys=False))
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        handler = _Log(self.folder / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._logger.addHandler(handler)
        # Imported here: it takes a second, and a run that fails on its input need not wait for it.
        from torch.utils.tensorboard import SummaryWriter

        with naming(self._events):
            self._writer = SummaryWriter(str(self._events), purge_step=from_epoch or None)

    def say(self, text: str) -> None:
        """Print a line and log it."""
        show(text)
        self._logger.info(text)

    def log(self, step: int, values: Mapping) -> None:
        """Append a line to metrics.jsonl and its numbers to tensorboard at `step`."""
        if not first_process():
            return
        add_line(self.metrics, {**values, "time": round(time.time(), 3)})
        self.scalars(step, {k: v for k, v in values.items() if isinstance(v, int | float) and k != "epoch"})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers to tensorboard only."""
        for name, value in values.items():
            if self._writer is not None:
                with naming(self._events):
                    self._writer.add_scalar(name, value, step)

    def lines(self) -> list[dict]:
        """The lines of metrics.jsonl so far."""
        return read_lines(self.metrics) if self.metrics.exists() else []

    def rows(self) -> list[dict]:
        """The results that the run has written."""
        return [line["row"] for line in self.lines() if isinstance(line.get("row"), dict)]

    def done(self, rows: int = 1) -> bool:
        """Whether the run is to be resumed and has all its rows already; then they are shown, and put in `results`."""
        there = self.rows() if self.resume else []
        if len(there) < rows:
            return False
        print(f"{relative(self.folder)} has its results already", *map(as_row, there), sep="\n")
        for row in there:
            self._put(row)
        return True

    def add_row(self, row: Mapping, step: int = 0) -> None:
        """Show a result, and add it to the run's metrics and to `results`.

        There the row stands in place of the one that an earlier start of the same run wrote.
        """
        parent = self.results.parent if self.results else self.folder.parent
        row = {**row, "run": os.path.relpath(self.folder, parent), "part": self._rows}
        self._rows += 1
        self.log(step, {"row": row})
        self.say(as_row(row))
        if first_process() and self.results:
            self._put(row)
            self.say(f"row: {relative(self.results)}")

    def _put(self, row: Mapping) -> None:
        if first_process() and self.results and {"run", "part"} <= row.keys():
            self.results.parent.mkdir(parents=True, exist_ok=True)
            put_line(self.results, row, ("run", "part"))

    def finish(self) -> None:
        """Flush and close the log and the events, and let other processes write in the folder."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with naming(self._events):
                writer.close()
        for handler in list(self._logger.handlers):
            handler.close()
            self._logger.removeHandler(handler)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read_config(path: Path) -> dict:
    """A run's config.yml, with `kind` and `settings` where it has them. UserError for another file."""
    fields = {"kind": text(), "settings": table(), "threads": number(whole=True, at_least=1)}
    return checked(read_yaml(path, "a run's config.yml"), fields, str(path))


def open_run(command: Command, parent: Path, precision: Precision, **more: Any) -> Run:
    """The run of a command, with everything in force for its config.yml.

    It is in --run-dir or, without that, in the folder of its name below `parent`.

    `more` are further settings for config.yml, such as the file of the victim. UserError where the run is to be resumed
    and was begun with other settings; where there is nothing to resume, that is said.
    """
    settings = {name: plain(value) for name, value in {**command.config(), **more}.items()}
    folder = command.run_dir or parent / run_name(command)
    begun = folder / "config.yml" if command.resume is True else None
    before = read_config(begun) if begun and begun.exists() else {}
    threads = before.get("threads", 0)
    if 0 < threads <= MOST_THREADS and threads != torch.get_num_threads() and "workers" not in command.given:
        print(f"--resume: {threads} CPU threads, as before")  # another number would change the weights' last digits
        torch.set_num_threads(threads)
    config = {
        "kind": command.parser.kind,
        "settings": settings,
        "threads": torch.get_num_threads(),
        "provenance": provenance(precision),
    }
    results = command.checkpoint_dir / "results.jsonl"
    events = command.logdir if "logdir" in command.parser.settings else None
    run = Run(folder, precision, config, command.resume, command.clear, events, results)
    if events and events.exists() and not events.is_dir():
        raise UserError(f"--logdir {events} is a file: give a folder")
    run.decisive = {name for name in settings if _decides(command, name)}
    flags = command.parser.settings
    run.earlier = {name: _earlier(flags[name]) for name in settings if name in flags}
    if command.resume is True and not folder.exists():
        print(f"--resume: nothing is in {relative(folder)}, so it begins anew")
    for name, value in run.differences(before).items():
        other = f"{name} {value}, not {settings[name]}"
        raise UserError(f"{relative(folder)} was begun with {other}: leave out --resume to begin anew")
    return run


def _decides(command: Command, name: str) -> bool:
    """Whether a setting decides the result: flags that say so, what all runs of a script have, and weights judged."""
    declared = command.parser.settings.get(name)
    return declared.named if declared else name in command.parser.fixed or name == "weights"


def _earlier(declared: Setting) -> Any:
    return declared.default if declared.earlier is None else declared.earlier


def run_name(command: Command) -> str:
    """The name of a command's run: `kind`, the `core` settings, and each other setting that is not as expected.

    A setting is expected at its default, or at the value that the loss, the attack or another setting gives it. Of data
    in a file or folder the name has the last part of the path. Where text is changed so that it might stand for another
    value, or cut, the name ends in a digest of the whole.
    """
    parser = command.parser
    parts = [parser.kind, *(_SPELT.get(name, "{}").format(getattr(command, name)) for name in parser.core)]
    for name in sorted(parser.settings):
        if name in parser.core or name in parser.implied or not parser.settings[name].named:
            continue
        value, default = getattr(command, name), parser.settings[name].default
        if value != command.expected.get(name, default):
            parts.append(f"{name.replace('_', '')}={value}")
    if command.suffix:
        parts.append(command.suffix)
    words = [re.sub(r"(folder|npz):.*?([^/\\]*)[/\\]*$", r"\1_\2", part, flags=re.DOTALL) for part in parts]
    name = "-".join(re.sub(r"[^\w.=+]", "_", word) for word in words)
    # Dashes and commas stand in the names of losses, attacks and lists of defences, which differ without them too.
    if all(re.fullmatch(r"[\w.=+,\-\[\]' ]*", part) for part in parts) and len(name.encode()) <= NAME_BYTES:
        return name
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{name.encode()[: NAME_BYTES - 9].decode(errors='ignore')}-{digest}"


def plain(value: Any) -> Any:
    """A value as YAML and a checkpoint keep it."""
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, str):
        return canonical_name(str(value))  # data in a file, whose path may be spelled in several ways
    return str(value) if isinstance(value, Path) else value


def relative(path: Path) -> Path:
    """The path as seen from the working folder, if it lies below it."""
    with contextlib.suppress(ValueError):
        return path.absolute().relative_to(Path.cwd())
    return path


def as_row(row: Mapping) -> str:
    """A result in a readable line."""
    names = (
        *("model", "attack", "arch", "losstype", "defence", "downstream"),
        *("probe", "top1", "top5", "top1_converged", "knn"),
        *("l2", "cosine", "cka", "overlap", "agreement", "test_images", "queries"),
    )
    values = {name: row[name] for name in names if row.get(name) is not None}
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
