"""The folder of a run: what it is, what it writes, and what a checkpoint says of where a model comes from."""

import contextlib
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from files.writing import atomic_path
from settings import Command
from utils import Precision, first_process, provenance

CHECKPOINT = "checkpoint.pth.tar"
_SPELT = {"num_queries": "{}q", "epochs": "{}ep", "seed": "seed{}"}


# ---- what was asked --------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What a checkpoint says of where a model comes from: the images, and what a copy's attacker asked of whom.

    images: how many a victim was trained on. query_set: data set, split and number of the images queried, query_indices
    (N,) their positions in that split, query_digests (N, 16) those of the pixels sent. ledger: the victim's record.
    defence_report: the defences' figures. stolen_from, victim_version: the weights of the encoder and of its API.
    """

    images: int | None = None
    query_set: dict | None = None
    query_indices: Tensor | None = None
    stolen_from: str | None = None
    victim_version: str | None = None
    ledger: dict = field(default_factory=dict)
    query_digests: Tensor | None = None
    defence_report: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict:
        """The entries of a checkpoint; those without a value are left out."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value != {}}

    def load_state_dict(self, checkpoint: Mapping) -> None:
        """Take the entries that a checkpoint has; until 2026 `defence_report` was called `met`."""
        for entry in fields(self):
            if entry.name in checkpoint:
                setattr(self, entry.name, checkpoint[entry.name])
        self.defence_report = checkpoint.get("defence_report", checkpoint.get("met", self.defence_report))

    @classmethod
    def of(cls, checkpoint: Mapping) -> "Record":
        record = cls()
        record.load_state_dict(checkpoint)
        return record

    def figures(self) -> dict[str, Any]:
        """Queries, distinct images queried, and the defences' figures, for a row."""
        accounts = self.ledger.values()
        digests = {bytes(row) for account in accounts for row in account["images"].view(-1, 16).numpy()}
        queries = sum(account["queries"] for account in accounts)
        return {"queries": queries, "distinct": len(digests), **self.defence_report}


# ---- a run's folder --------------------------------------------------------------------------------------------------


class Run:
    """The folder of one experiment, what it is (`config`) and how it is run.

    config.yml (the values in force, commit, versions, device), checkpoint.pth.tar, metrics.jsonl (a line per record),
    run.log and tensorboard events, which go to `events` where that is given. Making a Run writes nothing before
    `start()`, so that whatever is wrong with the input can be found first. Of a job's processes only rank 0 writes.

    resume: go on with what is in the folder, or from another checkpoint. clear: delete the log, metrics and events of
    an earlier run. results: a file that `add_row` appends to as well. record: what the checkpoint says of its origin.
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
        self._events = events or folder
        self._writer = None
        self._logger = logging.getLogger(f"run.{folder}")

    def below(self, name: str, kind: str | None = None) -> "Run":
        """The run of a part of this one, in a folder below its folder."""
        config = {**self.config, **({"kind": kind} if kind else {})}
        return Run(self.folder / name, self.precision, config, self.resume, self.clear)

    def start(self, from_epoch: int = 0) -> None:
        """Make the folder and write config.yml; UserError where it cannot be written.

        When a run goes on from `from_epoch`, the metrics of that epoch and later ones are dropped: they come again.
        """
        if not first_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
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
        handler = logging.FileHandler(self.folder / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._logger.addHandler(handler)
        # Imported here: it takes a second, and a run that fails on its input need not wait for it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._events), purge_step=from_epoch or None)

    def say(self, text: str) -> None:
        """Print a line and log it."""
        print(text, flush=True)
        self._logger.info(text)

    def log(self, step: int, values: Mapping) -> None:
        """Append a line to metrics.jsonl and its numbers to tensorboard at `step`."""
        if not first_process():
            return
        with self.metrics.open("a") as file:
            file.write(json.dumps({**values, "time": round(time.time(), 3)}) + "\n")
        self.scalars(step, {k: v for k, v in values.items() if isinstance(v, int | float) and k != "epoch"})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers to tensorboard only."""
        for name, value in values.items():
            if self._writer is not None:
                self._writer.add_scalar(name, value, step)

    def lines(self) -> list[dict]:
        """The lines of metrics.jsonl so far; a last line cut off by a kill is left out."""
        lines = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines

    def rows(self) -> list[dict]:
        """The results that the run has written."""
        return [line["row"] for line in self.lines() if "row" in line]

    def done(self) -> bool:
        """Whether the run is to be resumed and has its rows already; if so they are shown."""
        rows = self.rows() if self.resume else []
        if rows:
            print(f"{relative(self.folder)} has its results already", *map(as_row, rows), sep="\n")
        return bool(rows)

    def add_row(self, row: Mapping, step: int = 0) -> None:
        """Show a result, and append it to the run's metrics and to results.jsonl."""
        self.log(step, {"row": row})
        self.say(as_row(row))
        if first_process() and self.results:
            self.results.parent.mkdir(parents=True, exist_ok=True)
            # One append of one line: evaluations that run side by side don't mix theirs.
            with self.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.say(f"row: {relative(self.results)}")

    def finish(self) -> None:
        """Flush and close the log and the events."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for handler in list(self._logger.handlers):
            handler.close()
            self._logger.removeHandler(handler)


def open_run(command: Command, parent: Path, precision: Precision, **more: Any) -> Run:
    """The run of a command, in the folder of its name below `parent`, with everything in force for its config.yml.

    `more` are further settings for config.yml, such as the file of the victim.
    """
    settings = {name: plain(value) for name, value in {**command.config(), **more}.items()}
    config = {"kind": command.parser.kind, "settings": settings, "provenance": provenance(precision)}
    results = command.checkpoint_dir / "results.jsonl"
    events = command.logdir if "logdir" in command.parser.settings else None
    return Run(parent / run_name(command), precision, config, command.resume, command.clear, events, results)


def run_name(command: Command) -> str:
    """The name of a command's run: `kind`, the `core` settings, and each other setting that is not as expected.

    A setting is expected at its default, or at the value that the loss, the attack or another setting gives it.
    """
    parser = command.parser
    parts = [parser.kind, *(_SPELT.get(name, "{}").format(getattr(command, name)) for name in parser.core)]
    for name in sorted(parser.settings):
        if name in parser.core or name in parser.implied or not parser.settings[name].named:
            continue
        value, default = getattr(command, name), parser.settings[name].default
        if value != command.expected.get(name, default):
            parts.append(f"{name.replace('_', '')}={value}")
    words = "-".join(re.sub(r"[^\w.=+]", "_", part) for part in parts)
    return f"{words}-{command.suffix}" if command.suffix else words


def plain(value: Any) -> Any:
    """A value as YAML and a checkpoint keep it."""
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
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
