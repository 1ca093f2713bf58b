"""A ranking as a CSV file, as lines to read and as a row of results."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.rows import rounded
from evaluation.statistics import roc
from files.writing import atomic_path
from ranking.probe_images import contested_values
from ranking.scores import Reading
from ranking.standing import (
    COMBINED,
    CONTESTED,
    FALSE_RATES,
    Standing,
    references_needed,
    split_scores,
    true_rates,
)

TABLE = "ranking.csv"  # in the run's folder
SHOWN = 20  # suspects that are printed, the highest


@dataclass
class Ranked:
    """A suspect by its name, with its standing, or the reason why it has none or lacks a score."""

    name: str
    reason: str = ""
    standing: Standing | None = None


@dataclass
class Result:
    """Suspects from the highest combined score to the lowest, and what they were compared with.

    controls: the standings of the victim and of an untrained encoder among the references. names: of the scores.
    combine: which combination decides, at this level. counts: what was measured by.
    """

    ranked: list[Ranked]
    controls: dict[str, Standing]
    references: list[Reading]
    names: list[str]
    combine: str
    level: float
    counts: dict[str, Any]

    @property
    def standings(self) -> dict[str, Standing | None]:
        return {one.name: one.standing for one in self.ranked}

    def spread(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of a score over the references."""
        values = [reading.scores.get(name) for reading in self.references]
        if name == "contested":
            values = contested_values(torch.stack([reading.common for reading in self.references]), CONTESTED).numpy()
        return float(np.mean(values)), float(np.std(values, ddof=1))


def write_ranking(path: Path, result: Result, truth: Mapping[str, bool]) -> None:
    """Write the suspects, from the highest: scores, z-scores, these combined, p, p by Holm, verdict, reason.

    What a suspect lacks is an empty cell. The column `stolen` is there where truth, by suspect's name, is known.
    """
    z = [f"z_{name}" for name in result.names]
    columns = ["suspect", *result.names, *z, *COMBINED, "p", "p_holm", "verdict", "reason", *["stolen"] * bool(truth)]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        for one in result.ranked:
            row = {"suspect": one.name, "reason": one.reason, "verdict": "not scored", **_cells(one, result.combine)}
            stolen = {"stolen": {True: 1, False: 0}.get(truth.get(one.name), "")} if truth else {}
            table.writerow(rounded({**row, **stolen}))


def _cells(one: Ranked, combine: str) -> dict[str, Any]:
    if one.standing is None:
        return {}
    standing, z = one.standing, {f"z_{name}": value for name, value in one.standing.z.items()}
    p = {"p": standing.p[combine], "p_holm": standing.p_holm, "verdict": standing.verdict}
    return {**standing.scores, **z, **standing.combined, **p}


# ---- in words --------------------------------------------------------------------------------------------------------


def ranking_lines(result: Result, truth: Mapping[str, bool]) -> list[str]:
    """What was compared with what, the highest suspects, and what p means; with truth, how many are found."""
    counts = ", ".join(
        f"{value} {name.replace('_', ' ')}" for name, value in result.counts.items() if name != "dataset"
    )
    shown, lost = result.ranked[:SHOWN], sum(one.standing is None for one in result.ranked)
    verdicts = [one.standing.verdict for one in result.ranked if one.standing]
    lines = [f"ranking on {result.counts['dataset']}: {counts}", *_score_lines(result), *_p_lines(result)]
    lines += [f"the highest {len(shown)} of {len(result.ranked)} suspects:" if len(shown) < len(result.ranked) else ""]
    lines += _table(
        ["suspect", *result.names, *COMBINED, "p", "p_holm", "verdict"], [_line(one, result) for one in shown]
    )
    tally = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    lines.append(f"verdicts at level {result.level:g}: {tally}" + (f", {lost} not scored" if lost else ""))
    return [line for line in lines if line] + (_rate_lines(result, truth) if truth else [])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return [cells[0], "|---" * len(header) + "|", *cells[1:]]


def _line(one: Ranked, result: Result) -> list[str]:
    """A suspect's cells: its z-scores, these combined, p and the verdict, or else the reason."""
    standing = one.standing
    if standing is None:
        return [one.name, *[""] * (len(result.names) + len(COMBINED) + 2), one.reason]
    z = [f"{standing.z[name]:.1f}" if name in standing.z else "" for name in result.names]
    combined = [f"{standing.combined[how]:.1f}" for how in COMBINED]
    return [one.name, *z, *combined, f"{standing.p[result.combine]:.3g}", f"{standing.p_holm:.3g}", standing.verdict]


def _score_lines(result: Result) -> list[str]:
    """A row for each score: of the references, the victim, and an untrained encoder."""
    rows, weak = [], []
    for name in result.names:
        mean, deviation = result.spread(name)
        own = [f"{one.scores[name]:.4g} ({one.z[name]:.1f})" for one in result.controls.values()]
        rows.append([name, f"{mean:.4g}", f"{deviation:.2g}", *own])
        weak += [name] if result.controls["victim"].z[name] < 3 else []
    lines = _table(["score", "references", "deviation", *(f"{kind} (z)" for kind in result.controls)], rows)
    if weak:
        lines.append(
            f"note: by {', '.join(weak)} the victim itself is less than 3 deviations above the references, so these "
            f"find no copies here: leave them out by --scores"
        )
    return lines


def _p_lines(result: Result) -> list[str]:
    """What the p-values are, and whether any can be small enough."""
    references, number = len(result.references), sum(one.standing is not None for one in result.ranked)
    needed = references_needed(number, result.level)
    lines = [
        f"p: the share of the suspect and {references} references whose {result.combine} of z is at least the "
        f"suspect's. It is right for a suspect that, if innocent, is one more encoder of the references' kind. With "
        f"{references} references it is {1 / (references + 1):.3g} or more, by Holm for {number} suspects "
        f"{min(1, number / (references + 1)):.3g} or more"
    ]
    if references < needed:
        lines.append(
            f"so no suspect can be found at level {result.level:g}: that needs {needed} references. A suspect above "
            f"all references is undecided; the order of the suspects stands"
        )
    return lines


def _rate_lines(result: Result, truth: Mapping[str, bool]) -> list[str]:
    rates, stolen = true_rates(result.standings, truth), sum(truth.values())
    keys = ["auc", *(f"tpr_{round(100 * rate)}" for rate in FALSE_RATES)]
    words = [f"TPR at {100 * rate:g} % FPR" for rate in FALSE_RATES]
    rows = [[name, *(_with_interval(figures, key) for key in keys)] for name, figures in rates.items()]
    innocent = len(truth) - stolen
    lines = [
        f"truth: {stolen} stolen, {innocent} others; of {len(result.ranked) - len(truth)} suspects it is not known"
    ]
    if innocent < 1 / min(FALSE_RATES):
        lines.append(
            f"note: of {innocent} innocent suspects 1 % is less than one: the rate there is at no false accusation"
        )
    return [*lines, *_table(["score", "AUC", *words], rows)]


def _with_interval(figures: Mapping[str, float], key: str) -> str:
    interval = f" ({figures[f'{key}_low']:.2f} to {figures[f'{key}_high']:.2f})" if f"{key}_low" in figures else ""
    return f"{figures[key]:.2f}{interval}"


def ranking_row(result: Result, truth: Mapping[str, bool]) -> dict[str, Any]:
    """The figures of a row: counts, what was compared with, verdicts, and with truth the rates and the ROC."""
    verdicts = [one.standing.verdict for one in result.ranked if one.standing]
    row = {"level": result.level, "combine": result.combine, "scores": result.names, **result.counts}
    row |= {"suspects": len(result.ranked), "scored": len(verdicts), "found": verdicts.count("stolen")}
    row |= {"smallest_p": 1 / (len(result.references) + 1)}
    row["references"] = {
        name: dict(zip(("mean", "deviation"), result.spread(name), strict=True)) for name in result.names
    }
    row |= {f"{kind}_z": one.z for kind, one in result.controls.items()}
    if truth:
        rates = true_rates(result.standings, truth)
        known = [(result.standings[name], stolen) for name, stolen in truth.items()]
        row |= {"stolen": sum(truth.values()), **rates[result.combine], "rates": rates}
        row["roc"] = roc(*split_scores(known, result.combine))[0]
    return rounded(row)
