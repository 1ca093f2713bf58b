"""Finding what earlier runs made: by path, by a run's name, or by the settings that a command line gives."""

import glob
import hashlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from files.address import Address, is_address
from settings import Command
from training.released import released_below, released_settings
from training.run import CHECKPOINT, NAME_BYTES, plain, read_config, relative
from utils import UserError

# ---- places ----------------------------------------------------------------------------------------------------------


def home_of(checkpoint: Path, root: Path) -> Path:
    """Parent folder for runs derived from this encoder: its run folder, or `root/<name>-<hash>` for other files.

    A run folder in which this user cannot write counts as another file.
    """
    if (checkpoint.parent / "config.yml").exists() and os.access(checkpoint.parent, os.W_OK):
        return checkpoint.parent
    digest = hashlib.sha256()
    for file in sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]:
        digest.update(file.read_bytes() if file.is_file() else b"")
    name = named(checkpoint).absolute().name.split(".")[0].encode()[: NAME_BYTES - 9].decode(errors="ignore")
    return root / f"{name}-{digest.hexdigest()[:8]}"


def locate(path: Path | Address, root: Path) -> Path:
    """The checkpoint, or another library's folder, of a path or of a run's name below `root`.

    UserError when several runs have that name, and for an address; a path that is nowhere comes back as it is.
    """
    if is_address(path):
        raise UserError(f"{path} gives answers, and the encoder itself is needed here: give its checkpoint or run")
    if path.is_file() or (path.is_dir() and not (path / CHECKPOINT).exists()):
        return path
    places = [path] if path.is_dir() else [root / path, *root.rglob(glob.escape(path.name) or ".")]
    files = {place / CHECKPOINT for place in places if place.parts[-len(path.parts) :] == path.parts}
    found = sorted(file for file in files if file.exists())
    if len(found) > 1:
        raise UserError(f"several runs are named {path}: {', '.join(map(str, found))}: give a path")
    return found[0] if found else path


def named(checkpoint: Path) -> Path:
    """How commands and messages name an encoder: by its run's folder, where it is a run of this project."""
    of_run = checkpoint.name == CHECKPOINT and (checkpoint.parent / "config.yml").exists()
    return checkpoint.parent if of_run else checkpoint


def runs_below(root: Path, kind: str | None = None) -> dict[Path, dict]:
    """The checkpoints of finished or unfinished runs of a kind (None: all), with their settings; oldest first."""
    found = {}
    for config in sorted(root.rglob("config.yml"), key=lambda path: (path.stat().st_mtime, path)):
        content, checkpoint = _read_config(config), config.parent / CHECKPOINT
        if content.get("kind") in ({kind} if kind else {"victim", "stolen", "stolen-simsiam"}) and checkpoint.exists():
            found[checkpoint] = content.get("settings") or {}
    return found


def _read_config(path: Path) -> dict:
    """A run's config.yml; empty, with a line that says so, where it cannot be read."""
    try:
        return read_config(path)
    except UserError as error:
        print(f"{error}: this run is left out", file=sys.stderr)
        return {}


# ---- finding ---------------------------------------------------------------------------------------------------------


def find(
    command: Command,
    flag: str,
    kind: str,
    wanted: Mapping[str, Any],
    root: Path | None = None,
    besides: Path | None = None,
    preferred: Mapping[str, Any] | None = None,
) -> Path:
    """The checkpoint that --`flag` names, or the run of that kind below `root` that has the settings wanted.

    `flag` may be a path, a run's name, or a number in the list of the runs that fit. Settings that are only `preferred`
    decide between several that fit. `besides` is left out. What is taken is printed; UserError when none fits,
    or when several do: they are listed, numbered, with what differs. Of a file of the 2022 code some settings are
    known, by its name; the others may have any value.
    """
    root = root or command.checkpoint_dir
    given = getattr(command, flag)
    number = int(str(given)) if given is not None and str(given).isdigit() and not Path(given).exists() else None
    if given is not None and number is None:
        path = locate(given if is_address(given) else Path(given), root)
        print(f"{kind}: {relative(named(path))}")
        return path
    there = {path: {**wanted, **known} for path, known in released_below(root, kind).items()} | runs_below(root, kind)
    there.pop(besides, None)
    fitting = {path: settings for path, settings in there.items() if _fits(settings, wanted)}
    for name, value in (preferred or {}).items():
        fitting = {path: known for path, known in fitting.items() if _fits(known, {name: value})} or fitting
    asked = "".join(f" {name} {plain(value)}" for name, value in wanted.items())
    spelled = command.parser.settings[flag].flag
    if not fitting:
        listed = "; ".join(str(relative(named(path))) for path in list(there)[-5:]) or "none"
        raise UserError(
            f"no {kind} encoder{' with' * bool(asked)}{asked} in {root}; there: {listed}; or give {spelled} PATH"
        )
    if number is not None and not 1 <= number <= len(fitting):
        raise UserError(f"{spelled} {number}: {len(fitting)} {kind} encoders fit{asked}, give a number up to that")
    if number is None and len(fitting) > 1:
        raise UserError(
            f"{len(fitting)} {kind} encoders fit{asked}, choose by {spelled} NUMBER: {_differences(list(fitting))}"
        )
    path = list(fitting)[(number or 1) - 1]
    print(f"{kind}: {relative(named(path))}")
    return path


def _fits(settings: Mapping, wanted: Mapping) -> bool:
    """Whether a run has these settings; a switch that was not in force counts as off."""

    def known(value: Any) -> Any:
        return None if value is False else plain(value)

    return all(known(settings.get(name)) == known(value) for name, value in wanted.items())


def _differences(paths: Sequence[Path]) -> str:
    """The runs in a numbered list, each by the parts of its name that not all have, or by its folder."""
    parts = [named(path).name.split("-") for path in paths]
    common = set.intersection(*map(set, parts))
    short = [" ".join(part for part in words if part not in common) for words in parts]
    if len(set(short)) < len(short):
        short = [str(relative(named(path))) for path in paths]
    return "; ".join(f"{number}) {words}" for number, words in enumerate(short, 1))


def check_finished(checkpoint: Mapping, path: Path) -> None:
    """UserError when a run that was interrupted wrote the checkpoint; files of the 2022 code count as finished."""
    wanted = checkpoint.get("settings", {}).get("epochs", checkpoint.get("epoch"))
    if checkpoint.get("epoch") != wanted:
        raise UserError(
            f"{path} stopped after epoch {checkpoint['epoch']} of {wanted}: run the command that made it with --resume"
        )


def check_named(checkpoint: Mapping, path: Path, command: Command, named: Mapping[str, str]) -> None:
    """UserError when the checkpoint has another setting than a given flag names.

    `named` maps flags to settings. Of a file of the 2022 code its name tells some.
    """
    settings = checkpoint.get("settings") or released_settings(path, "victim") or released_settings(path, "stolen")
    for flag, name in named.items():
        known, value = settings.get(name), command.given.get(flag)
        if flag in command.given and known is not None and known != plain(value):
            spelled = command.parser.settings[flag].flag
            raise UserError(f"{path} was trained with {name} {known}, not {value}: give {spelled} {known}")


# ---- showing ---------------------------------------------------------------------------------------------------------


def say_next(command: Command, script_name: str, *words: str | Path) -> None:
    """Print the next command, ready to paste, with the same --data and --checkpoint-dir."""
    common = {"data": "-data", "checkpoint_dir": "--checkpoint-dir"}
    more = [str(word) for name, flag in common.items() if name in command.given for word in (flag, command.given[name])]
    shown = [str(relative(named(word))) if isinstance(word, Path) else word for word in words]
    print(f"next: python {script_name} {shlex.join([*shown, *more])}")
