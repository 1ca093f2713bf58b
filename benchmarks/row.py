"""A row of the results: the figures of each way, their ratios, and whether what is claimed was reached."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.timing import Contest

Shown = Callable[[float], float]  # from seconds for a unit of work to the figure that is shown

UNITS: dict[str, Shown] = {
    "s": lambda seconds: seconds,
    "ms": lambda seconds: 1e3 * seconds,
    "images/s": lambda seconds: 1 / seconds,
}


@dataclass(frozen=True)
class Ratio:
    """How many times faster `of` is than `over`; `at_least` is what the project claims of it, if anything."""

    of: str
    over: str
    at_least: float | None = None


def make_row(
    title: str, contest: Contest, unit: str, ratios: Sequence[Ratio] = (), notes: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    """The row of a contest that has run, as the file of results has it; `more` are further entries."""
    seconds = contest.seconds
    ways = {name: figures([UNITS[unit](each) for each in values]) for name, values in seconds.items()}
    for name, way in ways.items():
        if name in contest.first:
            way["first_call_s"] = rounded(contest.first[name])
        if name in contest.memory:
            way["memory_bytes"] = contest.memory[name]
    ways |= {name: {"missing": why} for name, why in contest.missing.items()}
    ways = {name: ways[name] for name in sorted(ways, key=contest.names.index)}
    row = {"title": title, "unit": unit, "ways": ways}
    found = [_compare(ratio, seconds, contest.missing) for ratio in ratios]
    return row | ({"ratios": found} if found else {}) | ({"notes": list(notes)} if notes else {}) | more


def figures(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and largest of the rounds, and each of them."""
    values = [rounded(value) for value in values]
    return {"median": rounded(statistics.median(values)), "min": min(values), "max": max(values), "rounds": values}


def claim(what: str, value: float | None, at_least: float | None = None, at_most: float | None = None) -> dict:
    """A figure of which the project claims that it is at least, or at most, so much; None for one not measured."""
    limit = {"at_least": at_least} if at_most is None else {"at_most": at_most}
    if value is None:
        return {"what": what, **limit, "missing": "not measured"}
    reached = value >= at_least if at_most is None else value <= at_most
    return {"what": what, "value": rounded(value), **limit, "reached": reached}


def median_of(contest: Contest, name: str) -> float | None:
    """Median seconds for a unit of a way's work; None where it has none."""
    values = contest.seconds.get(name)
    return statistics.median(values) if values else None


def rounded(value: float) -> float:
    """Five significant digits: more of them would be the machine's noise."""
    return float(f"{value:.5g}")


def _compare(ratio: Ratio, seconds: Mapping[str, Sequence[float]], missing: Mapping[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {"of": ratio.of, "over": ratio.over}
    limit = {} if ratio.at_least is None else {"at_least": ratio.at_least}
    absent = [name for name in (ratio.of, ratio.over) if not seconds.get(name)]
    if absent:
        return row | limit | {"missing": "; ".join(f"{name}: {missing.get(name, 'not timed')}" for name in absent)}
    # By round: what slowed a round slowed both ways.
    found = figures([b / a for a, b in zip(seconds[ratio.of], seconds[ratio.over], strict=False)])
    reached = {} if ratio.at_least is None else {"reached": found["median"] >= ratio.at_least}
    return row | found | limit | reached
