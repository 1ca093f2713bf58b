"""The notebook of examples/: its cells run as they stand, on fewer images and epochs."""

import json
import re
import sys

import torch

from models import load_encoder
from tests.conftest import ROOT

CELLS = json.loads((ROOT / "examples" / "tour.ipynb").read_text())["cells"]
IMPORTS, *CODE = ("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
SMALLER = {
    **{"[:4000]": "[:64]", "1500": "64", "tests, precision": "tests[:80], precision"},
    **{"labels[2000:]": "labels[40:80]", "2000": "40"},
    **{"epochs=10": "epochs=2", "epochs=4": "epochs=1", "batch_size=128": "batch_size=32"},
}


def test_the_tour_has_ten_lines_and_no_results_of_another_version():
    assert len("\n".join(CODE).splitlines()) == 10
    assert not [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")]


def test_the_tour_trains_steals_and_judges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = "\n".join((IMPORTS, *CODE))
    for number, fewer in SMALLER.items():
        assert number in text
        text = text.replace(number, fewer)
    # The project's own notebook: running it is the point.
    exec(compile(text, "tour.ipynb", "exec"), names := {})
    assert (names["victim"].ledger.queries, names["victim"].ledger.calls) == (64, 1)
    assert re.search(r"^\d+\.\d+ \d+\.\d+$", capsys.readouterr().out, re.MULTILINE)
    for folder, trained in (("victim", names["encoder"]), ("copy", names["copy"])):
        kept = load_encoder(tmp_path / "tour" / folder / "checkpoint.pth.tar").state_dict()
        assert all(torch.equal(value.cpu(), kept[key]) for key, value in trained.state_dict().items())
