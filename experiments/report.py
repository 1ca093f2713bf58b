"""The page and the files that an experiment's results become."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape

from experiments import claims, pictures, table
from experiments.grid import Grid
from experiments.results import Prices, Results
from files.reading import list_of
from files.reading import table as mapping
from files.writing import atomic_path

TEMPLATE = "report.html.j2"
# Of an experiment's file, about its results. published: lines of figures from papers, to read beside the table.
PARTS = {**table.PARTS, **pictures.PARTS, **claims.PARTS, "published": list_of(mapping())}


def check(grid: Grid) -> table.Layout:
    """How the grid's results are read. UserError for a file that does not say it rightly."""
    pictures.declared_pictures(grid)
    claims.check_claims(grid)
    return table.Layout(grid)


def write_report(grid: Grid, lines: Sequence[dict], folder: Path, prices: Prices) -> str:
    """Write table.md, .csv and .tex, the pictures and report.html to the folder; the table in Markdown."""
    layout = check(grid)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(grid, lines, layout.seeds, prices)
    words, numbers = table.frames(layout, results)
    text = table.markdown(words)
    _write(folder / "table.md", text)
    _write(folder / "table.csv", numbers.to_csv(index=False))
    _write(folder / "table.tex", table.latex(words))
    drawn = pictures.draw(grid, results, folder)
    found = claims.verdicts(grid, results)
    _write(folder / "claims.json", json.dumps([vars(verdict) for verdict in found], indent=1) + "\n")
    _write(folder / "report.html", _page(grid, lines, words, found, drawn))
    return text


def _page(grid: Grid, lines: Sequence[dict], words: pd.DataFrame, found: Sequence, drawn: Sequence[Path]) -> str:
    """A page of HTML that needs no other file."""
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=select_autoescape(default=True), trim_blocks=True).get_template(
        TEMPLATE
    )
    cells = [[_cell(value) for value in line] for line in words.astype(str).to_numpy().tolist()]
    images = [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in drawn]
    commits = sorted({str(line.get("commit"))[:12] for line in lines})
    return template.render(
        name=grid.name,
        about=grid.content.get("about", ""),
        claims=found,
        head=list(words.columns),
        cells=cells,
        note=table.NOTE,
        published=grid.content.get("published", []),
        pictures=images,
        commands=[cell.command for cell in grid.unique()],
        finished=len(lines),
        commits=commits,
    )


def _cell(text: str) -> tuple[str, bool, str]:
    """A cell's text, whether it is bold, and the number to sort by, if it has one."""
    bare = text.removeprefix("**").removesuffix("**")
    number = re.match(r"[+-]?[\d,]*\.?\d+(e[+-]?\d+)?", bare)
    return bare, text.startswith("**"), number[0].replace(",", "") if number else ""


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)
