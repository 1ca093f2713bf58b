"""Defences: one file each, and the table of their names. A new one is a file and a row here (docs/extending.md)."""

from collections.abc import Mapping, Sequence

from defenses.base import Defence, Query, setting, settings_of
from defenses.buckets import Buckets
from defenses.detection import Detection
from defenses.entropy import Entropy
from defenses.noise import Noise
from defenses.poisoning import Poisoning
from defenses.rounding import Rounding
from defenses.topk import TopK
from defenses.transform import Transform
from defenses.truncate import Truncate
from utils import UserError

__all__ = ["DEFENCES", "Defence", "Query", "build_defences", "parse_defences", "setting", "settings_of"]

DEFENCES: dict[str, type[Defence]] = {
    "noise": Noise,
    "poisoning": Poisoning,
    "rounding": Rounding,
    "topk": TopK,
    "truncate": Truncate,
    "transform": Transform,
    "entropy": Entropy,
    "buckets": Buckets,
    "detection": Detection,  # changes nothing
}


def parse_defences(text: str) -> list[str]:
    """The names in a list such as `noise,rounding`. UserError for an unknown or repeated one."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DEFENCES:
            raise UserError(f"unknown defence {name!r}: choose from {', '.join(DEFENCES)}, or give True or False")
    if len(set(names)) < len(names):
        raise UserError(f"{text!r} names a defence twice: give each once")
    return names


def build_defences(names: Sequence[str], settings: Mapping[str, object], secret: int = 0) -> list[Defence]:
    """Defences of those names, in their order, with those of the settings that each takes. UserError for bad values."""
    chosen = [DEFENCES[name] for name in names]
    return [
        one(secret=secret, **{key: settings[key] for key in settings_of(one) if settings.get(key) is not None})
        for one in chosen
    ]
