"""What a file of experiments/ asks for: attacks, defences and seeds, and the flags of each script."""

import contextlib
import shlex
from collections.abc import Collection, Mapping
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


_PARTS: dict[str, Check] = {
    **dict.fromkeys(("about", "common", "victim", "steal", "judge", "user", "detect", "verify"), _flags),
    "about": text(),
    "independent": list_of(_flags),
    "seeds": list_of(number(whole=True), at_least=1),
    "attacks": table(),
    "defences": table(),
}
_ATTACK: dict[str, Check] = {"flags": _flags, "against": list_of(text()), "stream": text()}
_ATTACK |= {"detect": _flags, "judge": _flags, "victim": _flags}
_DEFENCE: dict[str, Check] = {"flags": _flags, "vary": _flags, "values": list_of(number(), at_least=1)}


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
    """An attack's flags, and the defences that it is run against (default: all).

    stream: what detect.py calls streams of this kind, as in task_repeat_nearest; empty if it has none. detect: further
    flags of detect.py, so that the stream is this attack's. judge: further flags for judging its copies. victim:
    further flags of run.py, for an attack on another victim, such as an untrained one.
    """

    name: str
    flags: str
    against: tuple[str, ...] = ()
    stream: str = ""
    detect: str = ""
    judge: str = ""
    victim: str = ""


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
        self.points, self.attacks = [], []
        for name, value in content["defences"].items():
            self.points += _points(name, _entry(value, _DEFENCE, _DEFENCE.keys(), f"{path}: defence {name!r}"))
        for name, value in content["attacks"].items():
            attack = _entry(value, _ATTACK, {"flags"}, f"{path}: attack {name!r}")
            self.attacks.append(Attacker(name, **{**attack, "against": tuple(attack.get("against", ()))}))
        if not self.points or not self.attacks:
            raise UserError(f"{path} has no attacks or no defences: name one of each, such as none: ''")
        strengths = [(point.defence, point.strength) for point in self.points]
        if any(len(set(numbers)) < len(numbers) for numbers in (self.seeds, strengths)):
            raise UserError(f"{path}: a number stands twice in seeds or in values: name each once")
        for attack in self.attacks:
            if set(attack.against) - content["defences"].keys():
                raise UserError(f"{path}: the attack {attack.name!r} is against {attack.against}: no such defence")

    def words(self, part: str = "") -> list[str]:
        """The flags of a part, after the common ones."""
        return shlex.split(f"{self.content.get('common', '')} {self.content.get(part, '')}")

    def pairs(self) -> list[tuple[Attacker, Point]]:
        return [(a, p) for p in self.points for a in self.attacks if not a.against or p.defence in a.against]


def _entry(value: Any, fields: Mapping[str, Check], needed: Collection[str], where: str) -> dict[str, Any]:
    """An attack or a defence: flags as a text, or a mapping with the fields that are needed. UserError for others."""
    if isinstance(value, str):
        return checked({"flags": value}, fields, where)
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}, not its flags as a text: '' for no flags")
    unknown = ", ".join(str(key) for key in value if key not in fields)
    missing = ", ".join(key for key in fields if key in needed and key not in value)
    if unknown or missing:
        wrong = f"has no {missing}" if missing else f"has {unknown}, which is unknown"
        raise UserError(f"{where} {wrong}: give {', '.join(fields)}")
    return checked(value, fields, where)


def _points(name: str, defence: Mapping) -> list[Point]:
    if "vary" not in defence:
        return [Point(name, None, defence["flags"])]
    return [Point(name, strength, f"{defence['flags']} {defence['vary']} {strength}") for strength in defence["values"]]
