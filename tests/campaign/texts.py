"""Strange texts: YAML, lines of JSON and experiments, and what any file may turn out to be instead."""

import gzip
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

Make = Callable[[Path, random.Random], str | None]


class Canary:
    """Makes a folder named `canary` where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def holding(content: bytes | str) -> Make:
    """Makes a file with this content."""

    def make(path: Path, draws: random.Random) -> None:
        remove(path)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


# ---- any file --------------------------------------------------------------------------------------------------------


def cut(path: Path, draws: random.Random) -> str:
    size = path.stat().st_size
    kept = draws.randrange(size)
    os.truncate(path, kept)
    return f"{kept} of {size} bytes"


def flip(path: Path, draws: random.Random) -> str:
    content, places = bytearray(path.read_bytes()), []
    for _ in range(draws.choice((1, 1, 3, 20))):
        places.append(draws.randrange(len(content)))
        content[places[-1]] ^= 1 << draws.randrange(8)
    path.write_bytes(content)
    return f"bytes {places[:3]}"


def overwrite(path: Path, draws: random.Random) -> str:
    content = bytearray(path.read_bytes())
    start = draws.randrange(len(content))
    length = min(draws.choice((1, 16, 500, 5000)), len(content) - start)
    content[start : start + length] = draws.choice((bytes(length), draws.randbytes(length)))
    path.write_bytes(content)
    return f"{length} bytes from {start}"


def as_folder(path: Path, draws: random.Random) -> None:
    remove(path)
    path.mkdir()


def as_pipe(path: Path, draws: random.Random) -> None:
    remove(path)
    os.mkfifo(path)


def as_loop(path: Path, draws: random.Random) -> None:
    remove(path)
    path.symlink_to(path.name)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 94355\n"
ANYTHING: dict[str, tuple[str, Make]] = {
    "cut": ("refused", cut),
    "flipped bits": ("either", flip),
    "overwritten": ("either", overwrite),
    "empty": ("refused", holding("")),
    "noise": ("refused", holding(random.Random(0).randbytes(3000))),
    "HTML": ("refused", holding("<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>\n")),
    "LFS pointer": ("refused", holding(LFS)),
    "gzip": ("refused", holding(gzip.compress(b"x" * 1000))),
    "zeros": ("refused", holding(bytes(4096))),
    "pickle that runs code": ("refused", holding(pickle.dumps(Canary()))),
    "folder": ("refused", as_folder),
    "pipe": ("refused", as_pipe),
    "loop of links": ("refused", as_loop),
}
NO_TEXT = {name: ("any", make) for name, (_, make) in ANYTHING.items()}


# ---- YAML ------------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
NOT_SAFE = {
    "a list": "- a\n- b\n",
    "a number": "5\n",
    "null": "null\n",
    "runs code": "kind: !!python/object/apply:os.mkdir [canary]\n",
    "unknown tag": "kind: !thing {a: 1}\n",
    "bomb": BOMB + "kind: *a11\n",
    "recursion": "kind: victim\nsettings: &a {a: *a}\n",
    "deep": "a: " + "[" * 50_000 + "\n",
    "tabs": "kind:\n\tvictim: 1\n",
    "NUL": b"kind: vic\0tim\n",
    "Latin-1": "kind: vict\xefm\n".encode("latin-1"),
    "UTF-16": "kind: victim\n".encode("utf-16"),
    "two documents": "kind: victim\n---\nkind: victim\n",
    "keys that are lists": "? [a, b]\n: c\nkind: victim\n",
}
FORGED = {
    "settings: list": "kind: victim\nsettings: [a]\n",
    "settings: text": "kind: victim\nsettings: text\n",
    "settings: null": "kind: victim\nsettings:\n",
    "kind: list": "kind: [victim]\nsettings: {}\n",
    "kind: mapping": "kind: {a: 1}\nsettings: {}\n",
    "numbers as keys": "kind: victim\nsettings: {1: 2, 2.5: x, true: y, null: z}\n",
    "values of other types": "kind: victim\nsettings: {dataset: [1], arch: {a: 1}, epochs: x, losstype: 2020-01-01}\n",
    "numbers without end": "kind: victim\nsettings: {epochs: .inf, seed: .nan, batch_size: -5}\n",
    "a long text": f"kind: victim\nsettings: {{dataset: {'x' * 100_000}}}\n",
    "a long number": f"kind: victim\nsettings: {{epochs: {'9' * 10_000}}}\n",
    "control characters": 'kind: victim\nsettings: {dataset: "a\\e[31m\\r\\nb"}\n',
}
YAML = NO_TEXT | {name: ("any", holding(text)) for name, text in (NOT_SAFE | FORGED).items()}


# ---- lines of JSON ---------------------------------------------------------------------------------------------------

LINES_OF_NOBODY = {
    "not JSON": "this is no JSON",
    "cut line": '{"row": {"model": "vic',
    "list": "[1, 2]",
    "number": "5",
    "null": "null",
    "text": '"text"',
    "deep": "[" * 100_000,
    "deep mapping": '{"a":' * 50_000,
    "long number": '{"top1": ' + "9" * 5000 + "}",
    "empty mapping": "{}",
    "bytes": b"\xff\xfe\x00\x01",
    "NUL": b"\0\0\0\0",
    "surrogate": '{"checkpoint": "\\ud800", "command": "\\ud800"}',
    "row: number": '{"row": 5, "rows": 5, "command": 5, "checkpoint": 5}',
    "row: null": '{"row": null, "rows": null, "command": null, "checkpoint": null}',
    "row: list": '{"row": [1], "rows": [1], "command": ["a"], "checkpoint": ["a"]}',
    "values of other types": '{"rows": [{"top1": "x"}], "command": {}, "checkpoint": {}, "epoch": [], "path": 3}',
}


def among(line: bytes | str) -> Make:
    """Puts a line before the others."""

    def make(path: Path, draws: random.Random) -> None:
        path.write_bytes((line.encode() if isinstance(line, str) else line) + b"\n" + path.read_bytes())

    return make


def cut_last(path: Path, draws: random.Random) -> None:
    """Adds a line that a full disk cut, and a whole line after it."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0][: len(lines[0]) // 2], *lines]) + "\n")


LINES = {f"{name} among others": ("works", among(line)) for name, line in LINES_OF_NOBODY.items()}
LINES |= {"cut line before": ("works", cut_last)}
LINES |= {name: ("any", make) for name, (_, make) in NO_TEXT.items() if name not in ("empty", "cut", "flipped bits")}


# ---- experiments -----------------------------------------------------------------------------------------------------

_PARTS = {
    "axes": {"loss": ["mse"]},
    "scales": {"demo": {}},
    "steps": {"victim": "run.py --epochs 1", "copy": "steal.py --victim {victim} --losstype {loss}"},
    "table": {"of": "copy", "lines": ["loss"], "columns": {"queries": "copy.queries"}},
}


def _with(**changes: object) -> str:
    """An experiment, as JSON (which is YAML), with other parts; None leaves a part out."""
    return json.dumps({key: value for key, value in {**_PARTS, **changes}.items() if value is not ...})


EXPERIMENTS = dict(ANYTHING) | {name: ("refused", holding(text)) for name, text in NOT_SAFE.items()}
EXPERIMENTS |= {
    "flipped bits": ("refused", holding(_with(stips={}))),
    "overwritten": ("refused", holding("axes: -")),
}
EXPERIMENTS |= {
    name: ("refused", holding(_with(**changes)))
    for name, changes in {
        **{f"without {part}": {part: ...} for part in _PARTS},
        **{f"{part}: {value!r}": {part: value} for part in _PARTS for value in (5, None, ["a"], [["a"]], True)},
        "axis: number": {"axes": {"loss": 5}},
        "axis: null": {"axes": {"loss": None}},
        "axis: empty": {"axes": {"loss": []}},
        "axis: value twice": {"axes": {"loss": ["mse", "mse"]}},
        "axis: list in a list": {"axes": {"loss": [["mse"]]}},
        "axis: list of nobody": {"axes": {"loss": "{losses}"}},
        "value: null": {"axes": {"loss": {"mse": None}}},
        "value: list": {"axes": {"loss": {"mse": ["--losstype"]}}},
        "value: only a number": {"axes": {"loss": {"mse": {"text": "mse", "only": 5}}}},
        "value: values of a number": {"axes": {"loss": {"mse": {"text": "mse", "values": 5}}}},
        "step: number": {"steps": {"copy": 5}},
        "step: null": {"steps": {"copy": None}},
        "step: list": {"steps": {"copy": ["run.py"]}},
        "step: without run": {"steps": {"copy": {"without": {}}}},
        "step: unknown name": {"steps": {"copy": "steal.py {nobody}"}},
        "step: itself": {"steps": {"copy": "steal.py {copy}"}},
        "step: quote left open": {"steps": {"copy": 'steal.py --losstype "{loss}'}},
        "scale: number": {"scales": {"demo": 5}},
        "scale: another": {"scales": {"huge": {}}},
        "table: no lines": {"table": {"of": "copy", "lines": [], "columns": {}}},
        "table: step of nobody": {"table": {"of": "nobody", "lines": ["loss"], "columns": {}}},
        "table: columns of numbers": {"table": {"of": "copy", "lines": ["loss"], "columns": {"a": 5}}},
        "pictures: list": {"pictures": ["a"]},
        "picture: of no kind": {"pictures": {"a": {"kind": "none"}}},
        "claims: text": {"claims": "all"},
        "published: text": {"published": "all"},
        "unknown part": {"victims": "--epochs 1"},
    }.items()
}
