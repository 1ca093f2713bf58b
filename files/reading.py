"""What is read back from files."""

import json
import sys
from pathlib import Path

import yaml


def read_lines(path: Path) -> list[dict]:
    lines = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            print(f"{path}: line {number} is skipped", file=sys.stderr)
    return lines


def read_yaml(path: Path, what: str) -> dict:
    return yaml.safe_load(path.read_text())
