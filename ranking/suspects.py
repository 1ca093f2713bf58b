"""Many suspects: where they are, what they are known to have queried, and which of them are known to be stolen."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.candidates import Candidate
from files.reading import reading
from models import read_checkpoint
from models.checkpoint import encoder_from_checkpoint
from training import finding
from training.record import Record
from utils import UserError
from victim import version_of

NO_ENCODERS = {".csv", ".txt", ".md", ".json", ".jsonl", ".yml", ".yaml", ".log"}  # endings passed over in a folder
LARGEST_LIST = 2**22  # bytes of a text file
_TRUE, _FALSE = ("1", "true", "yes"), ("0", "false", "no")


@dataclass
class Suspect:
    """A suspect: its name in tables, its file or folder, and why it cannot be read, empty where it can.

    version: a name for its weights. record: what its file says that was queried.
    """

    name: str
    path: Path
    reason: str = ""
    version: str = ""
    record: dict = field(default_factory=dict)

    def open(self) -> Candidate:
        """The encoder, read anew. UserError or OSError where it cannot be."""
        checkpoint = read_checkpoint(self.path)
        return Candidate("suspect", self.path, checkpoint, encoder_from_checkpoint(checkpoint, str(self.path)))


def find_suspects(source: Path, root: Path) -> list[Suspect]:
    """The suspects of a folder, or of a text file with a path on each line, in the order of their names or lines.

    A folder has a file or a folder for each suspect; hidden files and texts are passed over. A line is a path from the
    working folder or from the list's own, or the name of a run below `root`; empty lines are passed over. UserError
    where there are none, or a name comes twice.
    """
    if source.is_dir():
        paths = {path.name: path for path in sorted(source.iterdir()) if _may_be_one(path)}
    elif source.is_file():
        paths = _listed(source, root)
    else:
        raise UserError(f"no suspects at {source}: give a folder of encoders, or a text file of their paths")
    if not paths:
        raise UserError(f"{source} has no suspects: give a folder of encoders, or a text file of their paths")
    return [_located(name, path, root) for name, path in paths.items()]


def _located(name: str, path: Path, root: Path) -> Suspect:
    try:
        return Suspect(name, finding.locate(path, root))
    except (UserError, OSError, ValueError) as error:  # several runs of that name; a character that no path has
        return Suspect(name, path, str(UserError(error)))


def _may_be_one(path: Path) -> bool:
    return not path.name.startswith(".") and path.suffix.lower() not in NO_ENCODERS


def _listed(source: Path, root: Path) -> dict[str, Path]:
    with reading(source, "a list of suspects, a path on each line"):
        if source.stat().st_size > LARGEST_LIST:
            raise UserError(f"{source} is too large for a list of suspects: give a text file with a path on each line")
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line]
        twice = next((line for line in lines if lines.count(line) > 1), None)
        if twice:
            raise UserError(f"{source} lists {twice} twice: leave it out once")
        return {line: _beside(source, line) for line in lines}


def _beside(source: Path, line: str) -> Path:
    """A line's path, from the list's folder where it is there."""
    try:
        return source.parent / line if (source.parent / line).exists() else Path(line)
    except (OSError, ValueError):
        return Path(line)


def look_at(suspects: list[Suspect]) -> None:
    """Fill in what each file says, one encoder in memory at a time, or why it cannot be read."""
    for suspect in readable(suspects):
        try:
            candidate = suspect.open()
            suspect.version = version_of(candidate.encoder)
            record = Record.of(candidate.checkpoint)
            names = ("query_set", "query_indices", "query_digests")
            suspect.record = {key: value for key, value in record.state_dict().items() if key in names}
        except (UserError, OSError) as error:
            suspect.reason = str(UserError(error))


def readable(suspects: list[Suspect]) -> list[Suspect]:
    return [suspect for suspect in suspects if not suspect.reason]


# ---- what is known ---------------------------------------------------------------------------------------------------


def read_truth(path: Path, suspects: list[Suspect]) -> dict[str, bool]:
    """Which suspects are stolen, by name, from a CSV file with the columns `suspect` and `stolen` (1 or 0).

    UserError for another file, a name that is no suspect's or comes twice, and a file without both kinds. A suspect
    that the file does not have is left out.
    """
    names, truth = {suspect.name for suspect in suspects}, {}
    with reading(path, "a table of suspects"):
        for number, (name, stolen) in enumerate(_rows(path), 2):
            if name not in names:
                raise UserError(
                    f"{path}, line {number}: {name!r} is no suspect: names are as in the list or the folder"
                )
            if name in truth:
                raise UserError(f"{path}, line {number}: {name!r} comes twice")
            if stolen.lower() not in (*_TRUE, *_FALSE):
                raise UserError(f"{path}, line {number}: stolen is {stolen!r}: write 1 or 0")
            truth[name] = stolen.lower() in _TRUE
    if len(set(truth.values())) < 2:
        raise UserError(f"{path} has no suspects of both kinds: rates need stolen ones (1) and others (0)")
    return truth


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise UserError(f"no file at {path}: give a CSV file with the columns suspect and stolen")
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, skipinitialspace=True)
        if not {"suspect", "stolen"} <= set(table.fieldnames or ()):
            raise UserError(f"{path} has no columns suspect and stolen: its first line is {table.fieldnames}")
        for row in table:
            yield (row["suspect"] or "").strip(), (row["stolen"] or "").strip()
