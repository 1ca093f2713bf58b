"""An experiment's page in a browser: headless Chromium, where there is one."""

import json
import shutil
import subprocess

import pytest

from experiments.report import write_report
from experiments.results import Prices
from tests.test_results import EXPERIMENT, grid_with, lines_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000")
# Sorts by the third column, up and down, and writes what the page then shows into its title.
PROBE = """
<script>
const sizes = [...document.images].map(image => `${image.complete}:${image.naturalWidth > 300}`);
const rows = document.getElementById("results").tBodies[0].rows;
const column = () => [...rows].map(row => Number(row.cells[2].dataset.number));
const button = document.querySelectorAll("#results th button")[2];
button.click(); const up = column(); button.click(); const down = column();
const requests = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length;
document.title = JSON.stringify({sizes, up, down, requests});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_shows_its_pictures_sorts_its_table_and_asks_for_nothing(tmp_path):
    grid = grid_with(tmp_path)
    write_report(grid, lines_of(grid), tmp_path, Prices())
    page = tmp_path / "probed.html"
    page.write_text((tmp_path / "report.html").read_text().replace("</body>", f"{PROBE}</body>"))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr, shown.stderr
    title = shown.stdout.partition("<title>")[2].partition("</title>")[0]
    found = json.loads(title)
    assert found["sizes"] == ["true:true"] * len(EXPERIMENT["pictures"])
    assert found["requests"] == 0
    assert found["up"] == sorted(found["up"])
    assert found["down"] == sorted(found["up"], reverse=True)
    assert len(set(found["up"])) > 1
