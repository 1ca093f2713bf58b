"""What the cells of an experiment measured: figures at a point of its axes, their means and their differences.

An interval is of 95 %. Over several victims it is Student's t over the victims' means, over several seeds of a single
victim Student's t over the seeds. Of a single run it is exact, binomial, where the figure is a share of test images;
other figures of single runs have none.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from evaluation.rows import unpacked
from evaluation.statistics import mcnemar, paired_interval, rate_interval
from experiments.grid import Grid

SHARES = ("top1", "top5", "top1_converged", "knn", "agreement")  # of the row's test images, in percent
Point = Mapping[str, str]  # axis -> name of its value


@dataclass(frozen=True)
class Prices:
    """What a thief and an owner pay, in dollars."""

    thousand_queries: float = 0.0
    hour: float = 0.0

    def cost(self, line: Mapping) -> dict[str, float]:
        """What a finished cell cost: seconds, queries, images trained on, and dollars for hours and queries."""
        names = ("run_seconds", "queries", "images_trained")
        known = {name: line[name] for name in names if isinstance(line.get(name), int | float)}
        hours, thousands = known.get("run_seconds", 0) / 3600, known.get("queries", 0) / 1000
        return known | {"dollars": hours * self.hour + thousands * self.thousand_queries}


@dataclass(frozen=True)
class Sample:
    """A figure of a run: the seeds that it was made with, and its row."""

    value: float
    seeds: tuple[str, ...]
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean, the ends of its interval (None: there is none), and the numbers of victims and of runs behind it.

    p: of a difference of single runs, McNemar's, two-sided; over several runs Student's t's.
    """

    mean: float
    low: float | None
    high: float | None
    victims: int
    runs: int
    p: float | None = None

    @property
    def n(self) -> str:
        return str(self.runs) if self.victims == 1 else f"{self.victims} x {self.runs // self.victims}"

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and not self.low <= 0 <= self.high


class Results:
    """The rows of a grid's finished cells. seeds: the axes of seeds, that of victims first."""

    def __init__(self, grid: Grid, lines: Iterable[Mapping], seeds: Sequence[str], prices: Prices = Prices()):
        self.grid, self.seeds, self.prices = grid, list(seeds), prices
        self.lines = {str(line["command"]): line for line in lines}

    def row(self, step: str, at: Point) -> Mapping[str, Any] | None:
        """The figures of the step's cell at a point: its cost, and its row.

        Of several rows that of the encoder that a cell at this point made. None where it has not ended.
        """
        cell = self.grid.where(step, at)
        line = self.lines.get(cell.command) if cell else None
        if line is None:
            return None
        rows, cost = line["rows"], self.prices.cost(line)
        if len(rows) > 1:
            here = {self.grid.where(name, at) for name in self.grid.steps} - {None, cell}
            folders = {other.folder.resolve() for other in here}
            rows = [row for row in rows if Path(str(row.get("checkpoint"))).resolve().parent in folders]
        return {**cost, **rows[0]} if rows else cost

    def rows(self, step: str, at: Point) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
        """The seeds and the figures of a step's cells at a point of the other axes, of all that have ended."""
        found = []
        for seeds in self._seeds_of(step):
            row = self.row(step, {**at, **seeds})
            if row is not None:
                found.append((tuple(seeds.get(axis, "") for axis in self.seeds), row))
        return found

    def samples(self, figure: str, at: Point) -> list[Sample]:
        """The figure STEP.NAME at a point of the other axes, for all seeds; without the runs that do not have it."""
        step, _, name = figure.partition(".")
        rows = [(seeds, row) for seeds, row in self.rows(step, at) if isinstance(row.get(name), int | float)]
        return [Sample(float(row[name]), seeds, row) for seeds, row in rows]

    def undecided(self, figure: str, at: Point) -> int:
        """How many runs at a point tried to decide a figure, such as `found` of an ownership test, and could not."""
        step, _, name = figure.partition(".")
        return sum(name in row and row[name] is None for _, row in self.rows(step, at))

    def estimate(self, figure: str, at: Point) -> Estimate | None:
        """The mean of a figure at a point; None where no run has it."""
        samples, share = _different(self.samples(figure, at)), figure.partition(".")[2] in SHARES
        if len(samples) != 1:
            found = _mean([(sample.seeds, sample.value) for sample in samples])
            if found is None or found.low is None or not share:
                return found
            return replace(found, low=max(0.0, found.low), high=min(100.0, found.high))
        return of_run(samples[0].row, figure.partition(".")[2])

    def difference(self, figure: str, at: Point, other: Point, than: str | None = None) -> Estimate | None:
        """The mean difference of a figure at two points, of runs with the same seeds; None where there are none.

        than: the figure at the other point, if it is another one: of a victim, which has fewer seeds than its copies.
        """
        pairs = self._pairs(figure, at, than or figure, other)
        if len(pairs) != 1:
            return _mean([(one.seeds, one.value - two.value) for one, two in pairs], test=True)
        (one, two), (name, of_other) = pairs[0], (each.partition(".")[2] for each in (figure, than or figure))
        return between_runs(one.row, two.row, name, of_other)

    def share(self, figure: str, at: Point, per: str) -> Estimate | None:
        """The mean of a figure in percent of another, of runs with the same seeds; None where there are none.

        Without runs that trained nothing, as of an untrained victim: there is nothing to compare the cost with.
        """
        pairs = self._pairs(figure, at, per, at)
        worth = [(one, two) for one, two in pairs if two.value and two.row.get("images_trained") != 0]
        return _mean([(one.seeds, 100 * one.value / two.value) for one, two in worth])

    def _pairs(self, figure: str, at: Point, of_other: str, other: Point) -> list[tuple[Sample, Sample]]:
        there = self.samples(of_other, other)
        return [(one, two) for one in self.samples(figure, at) for two in there if _same(one.seeds, two.seeds)]

    def _seeds_of(self, step: str) -> list[dict[str, str]]:
        """The seeds of a step's rows: of its cells or, where its rows are about another step's runs, of those."""
        points = self.grid.cells[self.grid.steps[step].judges or step]
        seeds = [tuple((axis, name) for axis, name in at if axis in self.seeds) for at in points]
        return [dict(each) for each in dict.fromkeys(seeds)]


def of_run(row: Mapping, name: str) -> Estimate:
    """A figure of a single run, by its row."""
    if name not in SHARES or not row.get("test_images"):
        return Estimate(float(row[name]), None, None, 1, 1)
    images = row["test_images"]
    low, high = rate_interval(round(row[name] / 100 * images), images)
    return Estimate(float(row[name]), 100 * low, 100 * high, 1, 1)


def between_runs(one: Mapping, other: Mapping, name: str, of_other: str | None = None) -> Estimate:
    """The difference of figures of two single runs, by their rows: paired, where these say which images are right."""
    of_other = of_other or name
    difference = float(one[name]) - float(other[of_other])
    right = [_right(row) for row in (one, other)]
    same_images = one.get("test_digest") == other.get("test_digest")
    of_right = name == of_other == "top1_converged"  # the probe whose right answers a row has
    if not same_images or not of_right or any(answers is None for answers in right):
        return Estimate(difference, None, None, 1, 1)
    return Estimate(difference, *paired_interval(*right), 1, 1, mcnemar(*right)[0])


def _mean(values: Sequence[tuple[tuple[str, ...], float]], test: bool = False) -> Estimate | None:
    """The mean of (seeds, value): over victims, the first seeds, the mean of their means; None of nothing."""
    if not values:
        return None
    by_victim: dict[str, list[float]] = {}
    for seeds, value in values:
        by_victim.setdefault(seeds[0] if seeds else "", []).append(value)
    means = [statistics.fmean(each) for each in by_victim.values()]
    of = means if len(means) > 1 else [value for _, value in values]
    mean, victims = statistics.fmean(means), len(means)
    if len(of) < 2:
        return Estimate(mean, None, None, victims, len(values))
    error = statistics.stdev(of) / len(of) ** 0.5
    half = float(stats.t.ppf(0.975, len(of) - 1)) * error
    p = float(stats.ttest_1samp(of, 0).pvalue) if test and error else None
    return Estimate(mean, mean - half, mean + half, victims, len(values), p)


def _different(samples: Sequence[Sample]) -> list[Sample]:
    """Samples without those of an encoder that stands there already: right on the very same images.

    So are an attacker's own encoders beside several victims. They know nothing of these, so only their own seeds count.
    """
    by_answers = {str(sample.row.get("right", position)): sample for position, sample in enumerate(samples)}
    if len(by_answers) == len(samples):
        return list(samples)
    return [replace(sample, seeds=("", *sample.seeds[1:])) for sample in by_answers.values()]


def _same(seeds: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two runs agree in the seeds that both have."""
    return all(one == other or not (one and other) for one, other in zip(seeds, others, strict=True))


def _right(row: Mapping) -> np.ndarray | None:
    """Which test images the row's encoder is right on; None where the row does not say."""
    try:
        return unpacked(row["right"], row["test_images"])
    except (KeyError, TypeError, ValueError):
        return None
