"""The table of an experiment: a line for each point of some axes, with means, intervals and numbers of runs.

table:
  lines: [defence, attack]                      # axes
  across: downstream                            # columns once more for each value of this axis; may be left out
  seeds: [victim_seed, seed]                    # axes over which means are taken, that of victims first
  columns:
    copy: {of: judged.top1_converged, best: max}
    to no defence: {of: judged.top1_converged, to: {defence: none}}    # paired difference
    to the victim: {of: judged.top1_converged, than: owner.top1_converged}
    cost (%): {of: copy.run_seconds, per: victim.run_seconds}           # in percent of another figure
    queries: judged.queries                     # STEP.NAME of a figure in the rows of that step
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.grid import Grid, Value
from experiments.parts import part_of
from experiments.results import Estimate, Results
from files.reading import Check, list_of, table, text
from utils import UserError

_TABLE: dict[str, Check] = {"of": text(), "lines": list_of(text(), at_least=1), "across": text()}
_TABLE |= {"seeds": list_of(text()), "columns": table()}
_COLUMN: dict[str, Check] = {"of": text(), "to": table(text()), "than": text(), "per": text(), "best": text()}
PARTS: dict[str, Check] = {"table": table()}
NOTE = """\
[a, b]: 95 % interval; of several victims over their means, of several seeds over these (Student's t), of a single run
of a share of the test images (exact, binomial). Differences are of runs with the same seeds; of single runs on the same
test images with their interval for paired shares and McNemar's p, not corrected for the number of lines. n: victims x
seeds of the attacker, or runs, of the first figure. Bold: the best of its column, where the interval of its difference
to the next leaves out 0."""


@dataclass(frozen=True)
class Column:
    """A column: the figure STEP.NAME; in percent of the figure `per`, where that is given; or its difference to the
    figure `than`, or to itself, at the point with `to`'s values. best: max, min or nothing."""

    name: str
    of: str
    to: Mapping[str, str]
    than: str
    per: str
    best: str

    @property
    def compares(self) -> bool:
        return bool(self.to) or self.than != self.of

    def estimate(self, results: Results, at: Mapping[str, str]) -> Estimate | None:
        if self.per:
            return results.share(self.of, at, self.per)
        if not self.compares:
            return results.estimate(self.of, at)
        other = {**at, **self.to}
        return None if (other, self.than) == (at, self.of) else results.difference(self.of, at, other, self.than)


@dataclass(frozen=True)
class Entry:
    """A cell of the table. undecided: how many runs tried to decide the figure and could not."""

    column: Column
    estimate: Estimate | None
    undecided: int = 0

    def __str__(self) -> str:
        name = "" if self.column.per else self.column.of.partition(".")[2]
        said = spelled(name, self.estimate, self.column.compares)
        return ", ".join(filter(None, [said, f"{self.undecided} undecided" if self.undecided else ""]))


class Layout:
    """How a grid's results become a table. UserError for a file that does not say it rightly."""

    def __init__(self, grid: Grid):
        where = f"{grid.path}: table"
        if "table" not in grid.content:
            raise UserError(f"{grid.path} has no table")
        declared = part_of(grid.content["table"], _TABLE, where, needed=("of", "lines", "columns"))
        self.grid, self.lines, self.across = grid, declared["lines"], declared.get("across")
        self.seeds = declared.get("seeds", [axis for axis in grid.axes if axis.endswith("seed")])
        self.step = declared["of"]
        if self.step not in grid.steps or set(self.lines) - {*grid.steps[self.step].axes}:
            raise UserError(f"{where}: lines {self.lines} of {self.step!r}: give a step, and axes that it depends on")
        grid.check_axes([*self.seeds, *([self.across] if self.across else [])], where)
        self.columns = [self._column(str(name), value, where) for name, value in declared["columns"].items()]

    def _column(self, name: str, declared: Any, where: str) -> Column:
        where = f"{where}, column {name!r}"
        declared = part_of(declared, _COLUMN, where, needed=("of",), text_is="of")
        than, per = declared.get("than", declared["of"]), declared.get("per", "")
        for figure in filter(None, (declared["of"], than, per)):
            self.grid.check_figure(figure, where)
        best = declared.get("best", "")
        if best not in ("", "max", "min"):
            raise UserError(f"{where}: best {best!r}: give max or min")
        self.grid.check_values(declared.get("to", {}), f"{where}, to")
        return Column(name, declared["of"], declared.get("to", {}), than, per, best)

    def points(self) -> list[dict[str, str]]:
        """The points of the lines: those of the cells of the step that the lines are of."""
        cells = self.grid.cells[self.step]
        projected = (tuple((axis, dict(at)[axis]) for axis in self.lines) for at in cells)
        return sorted((dict(point) for point in dict.fromkeys(projected)), key=self._place)

    def _place(self, point: Mapping[str, str]) -> list[int]:
        """Where a line stands: in the order of the axes' values, the first axis of the lines first."""
        return [[value.name for value in self.grid.axes[axis]].index(point[axis]) for axis in self.lines]

    def entries(self, results: Results) -> list[tuple[dict[str, str], dict[str, Entry]]]:
        """For each line: its point, and its entries by their headings."""
        blocks: list[Value | None] = [*self.grid.axes[self.across]] if self.across else [None]
        lines = []
        for point in self.points():
            cells = {}
            for block in blocks:
                at = {**point, **({self.across: block.name} if block else {})}
                for column in self.columns:
                    heading = f"{block.name}: {column.name}" if block else column.name
                    undecided = results.undecided(column.of, at) if column.of.endswith(".found") else 0
                    cells[heading] = Entry(column, column.estimate(results, at), undecided)
            lines.append((point, cells))
        return lines


def frames(layout: Layout, results: Results) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table as it is read, and with a number a column: mean, low, high, victims, runs and p of each figure."""
    lines = layout.entries(results)
    bold = {heading: _best(layout, results, lines, heading) for heading in (lines[0][1] if lines else ())}
    words, numbers = [], []
    for index, (point, cells) in enumerate(lines):
        shown, plain = dict(point), dict(point)
        for heading, entry in cells.items():
            shown[heading] = f"**{entry}**" if bold[heading] == index else str(entry)
            for name in ("mean", "low", "high", "victims", "runs", "p"):
                plain[f"{heading} ({name})"] = getattr(entry.estimate, name, None)
        shown["n"] = _numbers(cells.values())
        words.append(shown)
        numbers.append(plain)
    return pd.DataFrame(words), pd.DataFrame(numbers)


def _numbers(entries: Collection[Entry]) -> str:
    """Victims and runs behind a line's first figure and, where these are of others, behind its first difference."""
    figure, difference = (
        next((entry.estimate.n for entry in entries if entry.estimate and entry.column.compares is compares), "")
        for compares in (False, True)
    )
    if not (figure and difference) or figure == difference:
        return figure or difference or "0"
    return f"{figure}, differences {difference}"


def _best(layout: Layout, results: Results, lines: Sequence, heading: str) -> int | None:
    """The line that is the best of a column, where its difference to the next is decided."""
    column = lines[0][1][heading].column
    estimates = [cells[heading].estimate for _, cells in lines]
    known = [(estimate.mean, index) for index, estimate in enumerate(estimates) if estimate]
    if not column.best or column.compares or len(known) < 2:
        return None
    (_, first), (_, second), *_ = sorted(known, reverse=column.best == "max")
    block = {layout.across: heading.removesuffix(f": {column.name}")} if layout.across else {}
    difference = results.difference(column.of, {**lines[first][0], **block}, {**lines[second][0], **block})
    return first if difference and difference.decided else None


def spelled(name: str, estimate: Estimate | None, signed: bool = False) -> str:
    """An estimate in words: digits by the name of its figure, the interval, and the p of a difference."""
    if estimate is None:
        return ""
    if name == "found":  # yes or no of each run
        return f"{round(estimate.mean * estimate.runs)} of {estimate.runs}"
    form = ("+" if signed else "") + _form(name, estimate.mean)
    ends = "" if estimate.low in (None, estimate.high) else f" [{estimate.low:{form}}, {estimate.high:{form}}]"
    p = "" if estimate.p is None else f", p {estimate.p:.2g}"
    return f"{estimate.mean:{form}}{ends}{p}"


def _form(name: str, value: float) -> str:
    if name.startswith("p_") or name == "p":
        return ".2g"
    if name in ("queries", "distinct", "near_distinct", "test_images", "images_trained") or abs(value) >= 1000:
        return ",.0f"
    return ".1f" if abs(value) >= 10 or name.startswith(("top", "knn", "agreement", "overlap")) else ".3f"


def markdown(frame: pd.DataFrame) -> str:
    """A table of Markdown, with what its intervals and words mean below."""
    rows = [list(frame.columns), *frame.astype(str).to_numpy().tolist()]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(frame.columns))
    return "\n".join([*lines, "", NOTE, ""])


def latex(frame: pd.DataFrame) -> str:
    """A table for a paper that uses booktabs."""
    marked = frame.map(lambda cell: cell.strip("*") if isinstance(cell, str) else cell)
    bold = frame.map(lambda cell: "font-weight: bold;" if str(cell).startswith("**") else "")
    styled = marked.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    return styled.apply(lambda _: bold, axis=None).to_latex(hrules=True, convert_css=True)
