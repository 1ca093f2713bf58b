"""What the documents print can be typed: every command line of theirs is taken by its script."""

import importlib
import re
import shlex
import sys

import pytest

from tests.conftest import ROOT

COMMAND = re.compile(r"^    python (\w+)\.py (.*)$", re.MULTILINE)
LINES = {
    (script, line)
    for page in (ROOT / "README.md", ROOT / "docs" / "results.md")
    for script, line in COMMAND.findall(page.read_text())
    if "$" not in line and "[" not in line  # those with a shell's variables, or with a choice of words
}


@pytest.mark.parametrize(("script", "line"), sorted(LINES))
def test_every_command_is_taken_by_its_script(script, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(line, comments=True)])
    importlib.import_module(script).parse()


def test_the_commands_of_every_script_are_there():
    shown = {script for script, _ in LINES}
    assert {"run", "steal", "steallabels", "linear_eval", "legitimate", "verify", "detect", "reproduce"} <= shown


def test_the_file_map_names_every_module():
    page = (ROOT / "README.md").read_text()
    map_ = page[page.index("## File map") : page.index("## Limits")]
    assert not [path.name for path in ROOT.glob("*.py") if path.name not in map_]
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))]
    assert not [name for name in folders if f"{name}/" not in map_]
