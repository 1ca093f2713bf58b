"""Settings: declared once, by the class they belong to; flags, ranges, refusals, names and config.yml follow from that.

@dataclass(frozen=True)
class Recipe(Settings):
    lr: float = setting(1e-3, "learning rate", above=0)

command = Parser(__doc__, [Recipe, Attack], kind="victim").parse()      # what the command line says
recipe = command.use(Recipe)                                            # in force; command[Recipe] from here on
command.refuse_idle()                                                   # UserError for a flag that nothing reads
"""

import argparse
import dataclasses
import math
import operator
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import UserError, first_by_launcher

_LIMITS = {
    "above": ("above", operator.gt),
    "at_least": ("of at least", operator.ge),
    "below": ("below", operator.lt),
    "at_most": ("of at most", operator.le),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of an owner: see `setting` for the fields."""

    default: Any
    text: str
    name: str = ""
    kind: type = str
    choices: Iterable[str] | None = None
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    flags: Sequence[str] = ()
    read: Callable[[str], Any] | None = None
    named: bool = True
    acts: Callable[["Command"], str | None] | None = None
    otherwise: str | None = None
    several: bool = False
    optional_value: bool = False
    argument: str | None = None
    title: str | None = None
    earlier: Any = None

    def check(self, value: Any) -> None:
        """UserError for a value that is out of the setting's range or not one of its choices."""
        if value is None or isinstance(value, bool):
            return
        if self.choices is not None and value not in self.choices:
            raise UserError(f"{self.flag} {value} is unknown: choose from {', '.join(self.choices)}")
        if isinstance(value, int | float) and not self._in_range(value):
            raise UserError(f"{self.flag} {value} is {self.range}: give another number")

    def _in_range(self, value: float) -> bool:
        limits = [(holds, getattr(self, name)) for name, (_, holds) in _LIMITS.items()]
        finite = abs(value) < (2**63 if isinstance(value, int) else math.inf)
        return finite and all(limit is None or holds(value, limit) for holds, limit in limits)

    @property
    def range(self) -> str:
        """What a value out of range is not, in words."""
        limits = {word: getattr(self, name) for name, (word, _) in _LIMITS.items()}
        words = [f"{word} {limit:g}" for word, limit in limits.items() if limit is not None]
        number = "a whole number" if self.kind is int else "a number" if words else "a finite number"
        return f"not {number} {' and '.join(words)}".rstrip()

    @property
    def flag(self) -> str:
        """The flag as messages spell it."""
        return self.flags[-1] if self.flags else f"--{self.name.replace('_', '-')}"

    def parse(self, text: str) -> Any:
        """The value that a command line's text stands for. ArgumentTypeError for one that cannot be."""
        try:
            if "\0" in text:
                raise UserError(f"{text!r} has a NUL character")
            value = (self.read or (read_switch if self.kind is bool else self.kind))(text)
            valid = self.read or not isinstance(value, int | float) or self._in_range(value)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            valid = False
        if not valid:
            raise argparse.ArgumentTypeError(f"{text!r} is {self.range}")
        return value


def setting(default: Any, text: str, **declared: Any) -> Any:
    """A field that the command line has a flag for: its default, and its help text.

    choices: the values it takes. above, at_least, below, at_most: the range of a number; numbers are finite.
    flags: how the command line spells it, the usual way last (default: its name with dashes).
    read: text -> value, where the type of the default does not say it; raises UserError.
    named: whether a value other than the default is part of a run's name (False: it changes nothing that is computed).
    acts: command -> why the setting has no effect, or None where it has one.
    otherwise: what help says of the default where it depends on other settings.
    several: it takes one or more values. optional_value: True where nothing follows the flag.
    argument: the keyword argument of a loss that it is for, where that has another name.
    title: its group in `--help` (default: its owner's). earlier: what runs had before it was a setting.
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(default, text, **declared)})


class Settings:
    """Base of the dataclasses that declare settings: checks their ranges when an instance is made."""

    title: typing.ClassVar[str] = "options"

    def __post_init__(self) -> None:
        for name, declared in settings_of(type(self)).items():
            declared.check(getattr(self, name))

    @classmethod
    def absent(cls, command: "Command") -> str:
        """Why the settings have no effect where this class is not in force."""
        return "here"


def settings_of(owner: Any) -> dict[str, Setting]:
    """The settings by name of a class, of its instances, or of a loss, which has a mapping of them."""
    if isinstance(getattr(owner, "settings", None), Mapping):
        return {name: _complete(field, name, None) for name, field in owner.settings.items()}
    owner = owner if isinstance(owner, type) else type(owner)
    fields = [field for field in dataclasses.fields(owner) if "setting" in field.metadata]
    return {field.name: _complete(field, field.name, field.type) for field in fields}


def _complete(field: dataclasses.Field, name: str, annotation: Any) -> Setting:
    """The setting of a field, with the name and the type that the class gives it."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(one for one in typing.get_args(annotation) if one is not type(None))
    kind = annotation if isinstance(annotation, type) else type(field.default)
    return dataclasses.replace(field.metadata["setting"], name=name, kind=kind)


def read_switch(text: str) -> bool:
    """`True` or `False` as the 2022 command lines spell them."""
    if text.lower() not in ("true", "false"):
        raise UserError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


# What a script may say of single settings instead of what is declared.
_CHANGES = {"defaults": "default", "choices": "choices", "flags": "flags", "reads": "read"}


class Parser(argparse.ArgumentParser):
    """The flags of a script: those of the owners, classes of settings or losses, that it may put into force.

    kind: the first word of the run's name. core: the settings in each name. implied: those that the folder above stands
    for. fixed: settings that all runs of the script have, without a flag. without: settings that are no flags here and
    stay at their defaults. defaults, choices, flags, reads: by setting, what holds in this script instead.
    """

    def __init__(
        self,
        description: str,
        owners: Sequence[Any],
        kind: str = "",
        core: Sequence[str] = (),
        implied: Collection[str] = (),
        fixed: Mapping[str, Any] = types.MappingProxyType({}),
        without: Collection[str] = (),
        **changes: Mapping[str, Any],
    ):
        super().__init__(description=description.splitlines()[0], allow_abbrev=False)
        self.owners, self.kind, self.core, self.implied = list(owners), kind, list(core), frozenset(implied)
        self.fixed, self.defaults = dict(fixed), dict(changes.get("defaults", {}))
        self.settings: dict[str, Setting] = {}
        self.owner_of: dict[str, Any] = {}
        groups: dict[str, argparse._ArgumentGroup] = {}
        for owner in self.owners:
            for name, declared in settings_of(owner).items():
                if name in self.settings or name in without:
                    continue
                here = {_CHANGES[key]: table[name] for key, table in changes.items() if name in table}
                self.settings[name] = dataclasses.replace(declared, **here)
                self.owner_of[name] = owner
                title = declared.title or owner.title
                groups[title] = groups.get(title) or self.add_argument_group(title)
                self._add(groups[title], self.settings[name])

    def _add(self, group: argparse._ArgumentGroup, declared: Setting) -> None:
        options: dict[str, Any] = {"dest": declared.name, "default": declared.default, "help": declared.text}
        default = declared.default if declared.otherwise is None else declared.otherwise
        if default is not None:
            options["help"] += f" (default: {default})"
        if declared.choices is not None:
            options |= {"choices": list(declared.choices)}
        elif declared.kind is bool or declared.optional_value:
            words = "True|False" if declared.kind is bool else "True|False|VALUE"
            options |= {"type": declared.parse, "nargs": "?", "const": True, "metavar": words}
        else:
            metavar = {int: "N", float: "X", Path: "PATH"}.get(declared.kind, "NAME")
            options |= {"type": declared.parse, "metavar": metavar}
        if declared.several:
            options["nargs"] = "+"
        group.add_argument(*(declared.flags or (declared.flag,)), **options)

    def error(self, message: str) -> None:
        self.exit(2, f"error: {self.prog}: {message} (see {self.prog} --help)\n" if first_by_launcher() else None)

    def parse(self, line: Sequence[str] | None = None) -> "Command":
        """What a command line, by default this process's, says. Exits with one line and code 2 where it cannot be."""
        unset = object()
        namespace = argparse.Namespace(**dict.fromkeys(self.settings, unset))
        words = [self._spelled(str(word)) for word in (sys.argv[1:] if line is None else line)]
        parsed = vars(self.parse_args(words, namespace))
        return Command(self, {name: value for name, value in parsed.items() if value is not unset})

    def _spelled(self, word: str) -> str:
        """The word, as a flag that is known: dashes and underscores inside a flag are the same."""
        flag, equals, value = word.partition("=")
        if not flag.startswith("-") or flag in self._option_string_actions:
            return word
        alike = flag[:2] + flag[2:].replace("_", "-")
        known = (one for one in self._option_string_actions if one[:2] + one[2:].replace("_", "-") == alike)
        return next(known, flag) + equals + value


# ---- what is in force ------------------------------------------------------------------------------------------------


class Command:
    """What a command line says, and what is in force: `command.lr` is the value in force of the setting `lr`.

    given: the settings that the command line has. in_force: instances made by `use`. A setting that belongs to nothing
    in force reads as what was given, or its default.
    """

    def __init__(self, parser: Parser, given: Mapping[str, Any]):
        self.parser, self.given = parser, dict(given)
        self.in_force: list[Any] = []
        self.values: dict[str, Any] = {}
        self.expected: dict[str, Any] = {}  # what a run's name leaves out
        self.settled = set(given)  # the names of settings that no file will change any more
        self.suffix = ""

    def __getattr__(self, name: str) -> Any:
        if name in self.parser.fixed:
            return self.parser.fixed[name]
        if name in self.values:
            return self.values[name]
        if name not in self.parser.settings:
            raise AttributeError(f"{self.parser.prog} has no setting {name}")
        return self.given.get(name, self.parser.settings[name].default)

    def use_all(self, *owners: Any) -> None:
        """Put owners into force as given, or by their defaults."""
        for owner in owners:
            self.use(owner)

    def use(self, owner: Any, *layers: Mapping[str, Any], **fixed: Any) -> Any:
        """Put an owner into force: an instance of the class, or the loss with its values.

        A setting's value is the one given, else that of the first layer that has it, else its default in this script;
        `fixed` are further arguments of the class. UserError for a value out of range.
        """
        values = {}
        for name, declared in settings_of(owner).items():
            default = self.parser.defaults.get(name, declared.default)
            self.expected[name] = next((layer[name] for layer in layers if layer.get(name) is not None), default)
            values[name] = self.values[name] = self.given.get(name, self.expected[name])
        made = owner(**values, **fixed) if isinstance(owner, type) else owner.bind(values)
        self.in_force.append(made)
        return made

    def __getitem__(self, owner: type) -> Any:
        """The instance in force of a class. KeyError where there is none."""
        found = self.all(owner)
        if not found:
            raise KeyError(f"no {owner.__name__} is in force")
        return found[-1]

    def all(self, owner: type) -> list[Any]:
        """The instances in force of a class, in the order of `use`."""
        return [made for made in self.in_force if isinstance(made, owner)]

    def set(self, **values: Any) -> None:
        """Settle what the files or other settings decide, such as a victim's architecture."""
        self.values |= values
        self.given |= {name: value for name, value in values.items() if name in self.given}
        self.settled |= values.keys()

    def why_idle(self, name: str) -> str | None:
        """Why a setting has no effect; None where it has one."""
        owned = [made for made in self.in_force if name in settings_of(made)]
        if not owned:
            return self.parser.owner_of[name].absent(self)
        # Each owner has its say: a setting that one of them reads has an effect.
        conditions = [settings_of(made)[name].acts for made in owned]
        reasons = [acts(self) if acts else None for acts in conditions]
        return None if None in reasons else reasons[0]

    def refuse_idle(self, **reasons: str | None) -> None:
        """UserError for a flag that has no effect, unless it says what holds anyway; `reasons` are the script's own."""
        for name, value in self.given.items():
            reason = reasons.get(name) or self.why_idle(name)
            default = self.parser.settings[name].default
            same = value in (self.expected.get(name, default), default)
            if reason and not same:
                raise UserError(f"{self.parser.settings[name].flag} has no effect {reason}: leave it out")

    def acting(self) -> dict[str, Any]:
        """The values in force of the settings that have an effect, by name, in the order of their owners."""
        names = dict.fromkeys(name for made in self.in_force for name in settings_of(made))
        flags = self.parser.settings
        return {name: self.values[name] for name in names if name in flags and self.why_idle(name) is None}

    def line(self) -> str:
        """`in force: ...`: what decides the result; settings that are off are left out."""
        shown = {name: value for name, value in self.acting().items() if self.parser.settings[name].named}
        words = [f"{name} {value}" for name, value in shown.items() if value is not None and value is not False]
        return f"in force: {', '.join(words)}"

    def config(self) -> dict[str, Any]:
        """What config.yml says: the settings that act, in the order of their owners."""
        return {**self.parser.fixed, **self.acting()}
