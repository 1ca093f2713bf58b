"""Where a victim is that is no file here: behind an API, or behind a function of a Python file that asks one."""

import re
from pathlib import Path
from typing import Any


class Address(str):
    """`http://HOST:PORT`, `https://HOST/PATH` or `python:FILE.py:FUNCTION`: it gives answers, and never its weights."""


def is_address(place: Any) -> bool:
    """Whether a path or text is an address; a path has one slash where an address has two."""
    return re.match("https?:/|python:", str(place)) is not None


def read_place(text: str) -> Path | Address:
    """The address that a text is, or else the path."""
    return Address(text) if is_address(text) else Path(text)


def asked_elsewhere(command: object) -> bool:
    """Whether the victim of a command line is at an address."""
    return is_address(getattr(command, "victim", None))
