"""Defences, each in a file. A new file with a subclass of `Defence` is a new defence (docs/extending.md)."""

import importlib
import pkgutil
from dataclasses import dataclass

from defenses.base import Call, Defence
from files.address import asked_elsewhere
from settings import Command, Settings, read_switch, setting
from utils import UserError

__all__ = ["DEFENCES", "Call", "Defence", "DefenceChoice", "parse_defences", "use_defences"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
# The class `TopK` is the defence `topk`.
DEFENCES: dict[str, type[Defence]] = {defence.__name__.lower(): defence for defence in Defence.__subclasses__()}

# Attacks with these losses compare views of an image; --defence True poisons them (2022 code: infonce and softnn only).
POISONED = ("contsteal", "contsteal-paper", "contsteal-rda", "infonce", "rda", "softnn")


def parse_defences(text: str) -> list[str]:
    """Returns the names in a list such as `noise,rounding`. UserError for an unknown or repeated name."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DEFENCES:
            raise UserError(f"unknown defence {name!r}: choose from {', '.join(DEFENCES)}, or give True or False")
    if len(set(names)) < len(names):
        raise UserError(f"{text!r} names a defence twice: give each once")
    return names


def read_defences(text: str) -> str | bool | None:
    """Parses --defence: True, None for False, or a list such as `noise,rounding`, without spaces."""
    if text.lower() in ("true", "false"):
        return read_switch(text) or None
    return ",".join(parse_defences(text))


def _elsewhere(command: Command) -> str | None:
    return "with a victim behind an API: its owner has chosen the defences" if asked_elsewhere(command) else None


@dataclass(frozen=True)
class DefenceChoice(Settings):
    """Which defences act on the victim's answers."""

    defence: str | None = setting(
        None,
        f"defences applied to answers, in this order, such as noise,rounding: {', '.join(DEFENCES)}. True, as in "
        f"the 2022 code: poisoning against {', '.join(POISONED)}, noise against other losses",
        read=read_defences,
        optional_value=True,
        acts=_elsewhere,
    )
    entropy: bool = setting(False, "append entropy to --defence", acts=_elsewhere)
    secret: int | None = setting(
        None,
        "seed of the defences' random draws (default: --seed)",
        acts=lambda command: None if command.defence else "without --defence",
    )
    title = "defence"

    @classmethod
    def absent(cls, command: Command) -> str:
        """Why the settings have no effect on an attacker who sends no queries."""
        return "where the victim is not asked"


def resolve_defences(command: Command, losstype: str) -> list[str]:
    """Names of the defences that --defence and --entropy select against an attack with this loss."""
    asked = command.defence
    if asked is True:
        asked = "poisoning" if losstype in POISONED else "noise"
    names = asked.split(",") if asked else []
    if command.entropy and "entropy" not in names:
        names.append("entropy")
    command.set(defence=",".join(names) or None)
    return names


def use_defences(command: Command, losstype: str, seed: int) -> list[Defence]:
    """Put the defences named on the command line into force: new objects, which have seen no query."""
    choice = command.use(DefenceChoice)
    secret = seed if choice.secret is None else choice.secret
    return [command.use(DEFENCES[name], secret=secret) for name in resolve_defences(command, losstype)]
