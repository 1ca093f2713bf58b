"""The row in results.jsonl about an encoder that was judged on a downstream data set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import SimCLREncoder
from training.record import Record


def rounded(scores: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Scores rounded to six decimals, with a prefix before their names."""
    return {prefix + name: round(value, 6) if isinstance(value, float) else value for name, value in scores.items()}


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

    about: how it was judged, placed before the scores; more: counts of images, seed, seconds and provenance.
    """
    settings = checkpoint.get("settings", {})
    return {
        **{"model": modeltype, "arch": encoder.arch, "losstype": settings.get("losstype")},
        **{"attack": settings.get("attack"), **about},
        **rounded(scores),
        **Record.of(checkpoint).figures(),
        "defence": settings.get("defence"),
        **{"checkpoint": str(path) if path else None, **more},
    }
