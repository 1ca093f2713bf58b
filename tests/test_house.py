"""The rules of the house (docs/design.md): what may import what, and how large a thing may grow."""

import ast
import re

import pytest

from tests.conftest import ROOT

FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "tests", "slurm"} & set(path.relative_to(ROOT).parts) and not path.name.startswith(".")
)
SCRIPTS = {path.stem for path in ROOT.glob("*.py") if "@script" in path.read_text()}

# What each room may import of the others; scripts may import all, and nothing imports a script.
_BASE = {"files", "settings", "utils"}
MAY_IMPORT = {
    "utils": set(),
    "files": {"utils"},
    "settings": {"utils"},
    "jobs": _BASE,
    "models": _BASE,
    "data_aug": _BASE,
    "training": _BASE | {"jobs", "models", "data_aug"},
    "loss": {"settings", "training", "utils"},
    "defenses": _BASE | {"models", "data_aug"},
    "victim": {"files", "utils", "models", "data_aug", "defenses"},
    "service": _BASE | {"data_aug", "defenses", "victim"},
    "attacks": _BASE | {"data_aug", "defenses", "jobs", "loss", "models", "training", "victim"},
    "simclr": _BASE | {"attacks", "data_aug", "defenses", "jobs", "training", "victim"},
    "evaluation": _BASE | {"attacks", "data_aug", "defenses", "loss", "models", "simclr", "training", "victim"},
    "ranking": _BASE
    | {"attacks", "data_aug", "defenses", "evaluation", "loss", "models", "simclr", "training", "victim"},
    "experiments": {"files", "jobs", "utils", "evaluation"},
}


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """The rooms of this project that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & {room(path) for path in FILES}


def test_imports_point_one_way():
    wrong = {}
    for path in FILES:
        here = room(path)
        allowed = MAY_IMPORT.get(here, set(MAY_IMPORT) | {"benchmarks"}) | {here}
        # A data set's command line is a script in a library's clothes.
        extra = imported(path) - allowed - ({"jobs"} if path.name == "datasets.py" else set())
        if extra:
            wrong[str(path.relative_to(ROOT))] = extra
    assert not wrong


def test_the_rooms_have_an_order():
    """So that no two import each other, by whatever way round."""
    left = {name: set(allowed) for name, allowed in MAY_IMPORT.items()}
    while left:
        free = {name for name, allowed in left.items() if not allowed & left.keys()}
        assert free, left
        left = {name: allowed for name, allowed in left.items() if name not in free}


def test_nothing_imports_a_script():
    assert {"run", "runs", "steal", "linear_eval", "verify", "demo"} <= SCRIPTS
    assert not {str(path): imported(path) & SCRIPTS for path in FILES if imported(path) & SCRIPTS}


def test_files_are_few_and_small():
    assert len([*ROOT.glob("*.py")]) <= 20
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: size for name, size in sizes.items() if size > 330}
    assert not {name: sizes[f"{name}.py"] for name in SCRIPTS if sizes[f"{name}.py"] > 120}


def test_functions_are_short():
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                size = node.end_lineno - node.lineno + 1
                if size > 45:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = size
    assert not long


def test_a_name_of_a_function_means_one_thing():
    """Public functions of the same name in several files; allowed are those that every script has."""
    where = {}
    for path in FILES:
        if room(path) == "benchmarks":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    shared = {name: files for name, files in where.items() if len(files) > 1}
    assert shared.keys() <= {"main", "parse", "make_parser"}, shared


@pytest.mark.parametrize(
    "word", ["Training(", "Purchases", "Asker", "Bought", "StreamedAnswers", "QuerySet", "kept_as"]
)
def test_struck_words_do_not_come_back(word):
    assert not [str(path) for path in FILES if re.search(rf"\b{re.escape(word)}", path.read_text())]
