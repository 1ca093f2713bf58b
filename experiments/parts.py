"""The parts of an experiment's file: what is unknown, lacking or of another type is named in a line."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from files.reading import Check, checked
from utils import UserError


def part_of(
    declared: Any, fields: Mapping[str, Check], where: str, needed: Iterable[str] = (), text_is: str = ""
) -> dict[str, Any]:
    """A mapping with these fields, of which some are needed; a text stands for a mapping with the field `text_is`.

    UserError, beginning with `where`, for anything else.
    """
    if text_is and isinstance(declared, str):
        declared = {text_is: declared}
    if not isinstance(declared, Mapping):
        raise UserError(
            f"{where} is {declared!r}, not a {'text or a ' * bool(text_is)}mapping: give {', '.join(fields)}"
        )
    for key in declared:
        refuse_unknown(key, fields, where)
    lacking = [key for key in needed if key not in declared]
    if lacking:
        raise UserError(f"{where} has no {' and no '.join(sorted(lacking))}")
    return checked(dict(declared), fields, where)


def refuse_unknown(name: Any, known: Iterable[Any], where: str) -> None:
    """UserError for a name that is none of those known, with the nearest of them."""
    known = [*map(str, known)]
    if str(name) not in known:
        near = difflib.get_close_matches(str(name), known, 1)
        remedy = f"did you mean {near[0]!r}?" if near else f"give {', '.join(known) or 'another'}"
        raise UserError(f"{where}: {str(name)!r} is unknown: {remedy}")
