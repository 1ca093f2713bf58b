"""What a file of experiments/ asks for: attacks, defences and seeds, and the flags of each script."""

import contextlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files.reading import Check, checked, list_of, number, read_yaml, table, text
from utils import UserError


def _flags(value: Any) -> str | None:
    """The check of command-line flags."""
    with contextlib.suppress(ValueError):  # a quote that is left open
        if isinstance(value, str) and shlex.split(value) is not None:
            return None
    return "flags of a command line, in a text"


def _either(simple: Check, **parts: Check) -> Check:
    """The check of a value, or of a mapping with these parts and no others."""

    def check(value: Any) -> str | None:
        if not isinstance(value, Mapping):
            return simple(value)
        if "flags" not in value or not value.keys() <= parts.keys():
            return f"a mapping with flags, and of {', '.join(parts)} only"
        wrong = ((key, parts[key](part)) for key, part in value.items())
        return next((f"a mapping with {key} as {wanted}" for key, wanted in wrong if wanted), None)

    return check


_PARTS: dict[str, Check] = {
    **dict.fromkeys(("about", "common", "victim", "steal", "judge", "user", "detect", "verify"), _flags),
    "about": text(),
    "independent": list_of(_flags),
    "seeds": list_of(number(whole=True), at_least=1),
    "attacks": table(_either(_flags, flags=_flags, against=list_of(text()), stream=text(), judge=_flags)),
    "defences": table(_either(_flags, flags=_flags, vary=_flags, values=list_of(number(), at_least=1))),
}


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

    judge: further flags for judging its copies.
    """

    name: str
    flags: str
    against: tuple[str, ...] = ()
    stream: str = "task_plain_coverage"
    judge: str = ""


class Experiment:
    """The parts of a YAML file; its table crosses `points` and `attacks`. UserError for a file that is none."""

    def __init__(self, path: Path):
        content = read_yaml(path, "an experiment, a file of YAML")
        missing = {"victim", "steal", "judge", "user", "attacks", "defences"} - content.keys()
        unknown = sorted(str(key) for key in content if key not in _PARTS)
        if unknown or missing:
            raise UserError(f"{path}: unknown {unknown or 'nothing'}, missing {sorted(missing) or 'nothing'}")
        self.name, self.content = path.stem, checked(content, _PARTS, str(path))
        self.seeds = content.get("seeds", [0])
        self.points = [point for name, value in content["defences"].items() for point in _points(path, name, value)]
        self.attacks = [
            Attacker(name, **{**value, "against": tuple(value.get("against", ()))})
            if isinstance(value, dict)
            else Attacker(name, value)
            for name, value in content["attacks"].items()
        ]
        if not self.points or not self.attacks:
            raise UserError(f"{path} has no attacks or no defences: name one of each, such as none: ''")
        if len(set(self.seeds)) < len(self.seeds) or len(set(self.points)) < len(self.points):
            raise UserError(f"{path}: a number stands twice in seeds or in values: name each once")
        for attack in self.attacks:
            if set(attack.against) - content["defences"].keys():
                raise UserError(f"{path}: the attack {attack.name!r} is against {attack.against}: no such defence")

    def words(self, part: str = "") -> list[str]:
        """The flags of a part, after the common ones."""
        return shlex.split(f"{self.content.get('common', '')} {self.content.get(part, '')}")

    def pairs(self) -> list[tuple[Attacker, Point]]:
        return [(a, p) for p in self.points for a in self.attacks if not a.against or p.defence in a.against]


def _points(path: Path, name: str, value: str | Mapping) -> list[Point]:
    if isinstance(value, str):
        return [Point(name, None, value)]
    if not {"vary", "values"} <= value.keys():
        raise UserError(f"{path}: the defence {name!r} lacks vary or values")
    return [Point(name, strength, f"{value['flags']} {value['vary']} {strength}") for strength in value["values"]]
