"""What is read back from files: kinds, shapes and sizes are checked here, and whatever goes wrong is one line.

content = checked(read_yaml(path, "a run's config.yml"), {"kind": text(), "settings": table()}, str(path))
"""

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from utils import UserError

Check = Callable[[Any], str | None]  # says what a value should be, or None where it is that
LARGEST = 64 * 2**20  # bytes of a file of text, and of a line
MOST = 10**6  # values in a file of text


@contextlib.contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a UserError: the path, what it should be, and the first line of the error.

    Libraries' warnings about the file are not shown. In a UserError from inside, what cannot be printed, such as an end
    of a line in a file's key, becomes a question mark.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError as error:
        raise UserError(_printable(str(error))) from None
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(_printable(f"{path} cannot be read as {what}: {lines[0][:200]}")) from None


def _printable(words: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in words)


# ---- text ------------------------------------------------------------------------------------------------------------


def read_yaml(path: Path, what: str) -> dict:
    """A mapping from a file of YAML."""
    return _read(path, what, yaml.safe_load)


def read_json(path: Path, what: str) -> dict:
    """A mapping from a file of JSON."""
    return _read(path, what, json.loads)


def _read(path: Path, what: str, parse: Callable[[str], Any]) -> dict:
    with reading(path, what):
        _check_file(path)
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise UserError(f"{path} is not {what}: it has no keys, but holds a {type(content).__name__}")
        if sum(1 for _, _ in zip(_values(content), range(MOST + 1), strict=False)) > MOST:
            raise UserError(f"{path} is not {what}: it has more than {MOST:,} values")
        return content


def read_lines(path: Path) -> list[dict]:
    """The mappings in a file of JSON lines. Lines that are cut, broken or something else are named and skipped."""
    lines, broken = [], []
    with reading(path, "lines of JSON"):
        _check_file(path)
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LARGEST), b""), 1):
                content = None
                with contextlib.suppress(ValueError, RecursionError):
                    content = json.loads(line)
                if isinstance(content, dict):
                    lines.append(content)
                elif line.strip():
                    broken.append(str(number))
    if broken:
        shown = ", ".join(broken[:5]) + ", ..." * (len(broken) > 5)
        print(f"{path}: {len(broken)} broken lines are skipped ({shown})", file=sys.stderr)
    return lines


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    if path.stat().st_size > LARGEST and path.suffix != ".jsonl":
        raise UserError(f"{path} is too large for a file of text")


def _values(content: Any) -> Iterator[Any]:
    """The values in nested content; what is referred to several times counts each time."""
    left = [content]
    while left:
        value = left.pop()
        yield value
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value


# ---- checks ----------------------------------------------------------------------------------------------------------


def checked(content: Any, fields: Mapping[str, Check], where: str) -> dict[str, Any]:
    """The entries of a mapping that `fields` knows, each by its check. UserError for another value; keys may lack."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where} has no keys, but is of type {type(content).__name__}")
    for key, check in fields.items():
        wanted = check(content[key]) if key in content else None
        if wanted:
            raise UserError(f"{where}: {key} is not {wanted}")
    return {key: content[key] for key in fields if key in content}


def text() -> Check:
    return lambda value: None if isinstance(value, str) else "a text"


def switch() -> Check:
    return lambda value: None if isinstance(value, bool) else "true or false"


def number(
    whole: bool = False, at_least: float | None = None, at_most: float | None = None, finite: bool = True
) -> Check:
    """A number, or a whole number, that is finite unless `finite` says otherwise."""
    words = ("a whole number" if whole else "a number") + (f" of at least {at_least:g}" if at_least is not None else "")
    words += f" and at most {at_most:g}" if at_most is not None else ""

    def check(value: Any) -> str | None:
        kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        fits = kind and (abs(value) < 2**63 or not finite) and (at_least is None or value >= at_least)
        fits = fits and (at_most is None or value <= at_most)
        return None if fits else words

    return check


def table(values: Check | None = None) -> Check:
    """A mapping from texts to values."""

    def check(value: Any) -> str | None:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return "a mapping with texts as keys"
        wrong = (values(entry) for entry in value.values()) if values else ()
        return next((f"a mapping to {wanted}" for wanted in wrong if wanted), None)

    return check


def list_of(values: Check, at_least: int = 0) -> Check:
    """A list of values, of which there are at least so many."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) < at_least:
            return f"a list of at least {at_least} values" if at_least else "a list"
        return next((f"a list of {wanted}" for wanted in map(values, value) if wanted), None)

    return check


def record(**fields: Check) -> Check:
    """A mapping that has all of these keys, each by its check."""

    def check(value: Any) -> str | None:
        if not isinstance(value, Mapping) or not fields.keys() <= value.keys():
            return f"a mapping with {', '.join(fields)}"
        wrong = ((key, check(value[key])) for key, check in fields.items())
        return next((f"a mapping with {key} as {wanted}" for key, wanted in wrong if wanted), None)

    return check


def optional(check: Check) -> Check:
    """None, or what the check wants."""
    return lambda value: None if value is None else check(value)


def normalisation(value: Any) -> str | None:
    """The check of a mean and a standard deviation, three numbers each."""

    def three(part: Any) -> bool:
        return isinstance(part, list | tuple) and len(part) == 3 and not any(map(number(), part))

    fits = isinstance(value, list | tuple) and len(value) == 2 and all(map(three, value)) and min(value[1]) > 0
    return None if fits else "a mean and a deviation above 0, of three numbers each"


def dense(value: Any) -> bool:
    """Whether a value is a tensor whose numbers are all stored: a view of a single number may have any shape."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def tensor(dtype: torch.dtype, dims: tuple[int | None, ...]) -> Check:
    """A tensor of this type, of these sizes (None: any), in finite numbers."""

    def check(value: Any) -> str | None:
        fits = (
            dense(value)
            and value.dtype == dtype
            and value.ndim == len(dims)
            and all(size in (None, there) for size, there in zip(dims, value.shape, strict=True))
        )
        if not fits:
            return f"a tensor of {dtype} and shape {tuple('any' if size is None else size for size in dims)}"
        return None if not value.is_floating_point() or bool(value.isfinite().all()) else "finite"

    return check
