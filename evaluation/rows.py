"""The row in results.jsonl about an encoder that was judged on a downstream data set."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from attacks import OWN
from defenses import DEFENCES
from models import SimCLREncoder
from training.record import Record
from training.released import released_settings


def packed(right: Tensor) -> str:
    """Booleans (N,), such as which test images were classified correctly, as a text of N / 6 characters."""
    return base64.b64encode(np.packbits(right.cpu().numpy()).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """The first `count` booleans of a text by `packed`. ValueError for another text."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8))
    if not count <= len(bits) < count + 8:
        raise ValueError(f"{len(bits)} bits are not those of {count} images")
    return bits[:count].astype(bool)


def rounded(scores: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Scores rounded to six decimals, with a prefix before their names."""
    return {prefix + name: round(value, 6) if isinstance(value, float) else value for name, value in scores.items()}


def attack_figures(record: Record, known: bool = True) -> dict[str, Any]:
    """What an attack cost, in queries and distinct images, and the figures of the victim's defences.

    With known=False the cost is None where the record has no ledger, as that of a copy from elsewhere. A figure's name
    begins with a defence's name or `api`, else with `defence_`: no file can take the place of a score.
    """
    figures = record.figures()
    known = known or bool(record.ledger)
    cost = {name: figures[name] if known else None for name in ("queries", "distinct", "near_distinct")}
    report = record.defence_report.items()
    named = {*DEFENCES, "api"}  # of an API over HTTP, its own count
    return cost | {name if name.split("_")[0] in named else f"defence_{name}": value for name, value in report}


def encoder_row(
    modeltype: str,
    encoder: SimCLREncoder,
    path: Path | None,
    checkpoint: Mapping,
    scores: Mapping[str, Any],
    about: Mapping[str, Any],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """The row: the encoder, its scores and, for a copy, the cost of the attack.

    about: how it was judged, placed before the scores, which are rounded; more: counts of images, seed, seconds and
    provenance.
    """
    settings = checkpoint.get("settings") or (released_settings(path, modeltype) if path else {})
    asked_nothing = settings.get("attack") == OWN
    return {
        **{"model": modeltype, "arch": encoder.arch, "losstype": settings.get("losstype")},
        "preset": settings.get("preset"),
        **{"attack": settings.get("attack"), **about},
        **rounded(scores),
        **attack_figures(Record.of(checkpoint), known=asked_nothing or modeltype not in ("stolen", "suspect")),
        "defence": settings.get("defence"),
        **{"checkpoint": str(path) if path else None, **more},
    }
