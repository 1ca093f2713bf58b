"""Where a suspect stands among encoders that are independent of the victim: z-scores, their combinations, p, verdicts.

Of a suspect and its K references each in turn is compared with the K others. No encoder has a part in what it is
compared with, so that a suspect is treated as a reference is, and its place among these K + 1 gives a p-value: if an
innocent suspect is one more encoder of the references' kind, p is at most a with a probability of at most a, whatever
the distribution of scores. The smallest p-value is 1 / (K + 1), and by Holm for n suspects n / (K + 1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluation.statistics import auc_interval, hits_at, holm, rank_p, rate_interval, roc, z_scores
from ranking.probe_images import contested_values
from ranking.scores import Reading

CONTESTED = 0.2  # share of the unseen images by which encoders are compared in the score `contested`
COMBINED = ("maximum", "sum")  # of a suspect's z-scores; a score that it lacks counts as none
FALSE_RATES = (0.01, 0.05)  # at which the share of stolen suspects that are found is given


@dataclass
class Standing:
    """A suspect among the references: by name its scores, their z-scores, these combined, and the p-values of those.

    z is by how many of the references' deviations a score is above their mean. p_holm and verdict are of the
    combination that decides. doubted: whatever the scores, nothing is decided.
    """

    scores: dict[str, float]
    z: dict[str, float]
    combined: dict[str, float]
    p: dict[str, float]
    p_holm: float = 1.0
    verdict: str = ""
    doubted: bool = False


def common_scores(readings: Sequence[Reading], names: Sequence[str]) -> list[str]:
    """The scores, of those named, that all readings have."""
    return [name for name in names if all(_has(reading, name) for reading in readings)]


def _has(reading: Reading, name: str) -> bool:
    return reading.common is not None if name == "contested" else name in reading.scores


def stand(reading: Reading, references: Sequence[Reading], names: Sequence[str]) -> Standing:
    """The standing of an encoder among K > 1 references, which have all scores named; it may lack some, but not all."""
    names = common_scores([reading], names)
    values = np.column_stack([_values(name, [reading, *references]) for name in names])
    z = z_scores(values)
    combined = {"maximum": z.max(axis=1), "sum": z.sum(axis=1)}
    return Standing(
        dict(zip(names, values[0].tolist(), strict=True)),
        dict(zip(names, z[0].tolist(), strict=True)),
        {how: float(totals[0]) for how, totals in combined.items()},
        {how: rank_p(totals) for how, totals in combined.items()},
    )


def _values(name: str, readings: Sequence[Reading]) -> np.ndarray:
    if name == "contested":
        return contested_values(torch.stack([reading.common for reading in readings]), CONTESTED).numpy()
    return np.array([reading.scores[name] for reading in readings])


# ---- verdicts --------------------------------------------------------------------------------------------------------


def give_verdicts(standings: Sequence[Standing], references: int, combine: str, level: float) -> None:
    """Fill in p by Holm and the verdict of every suspect: stolen where that p is below the level.

    Where it cannot be below it with so few references, a suspect above all references is undecided.
    """
    reachable = references >= references_needed(len(standings), level)
    for one, p in zip(standings, holm([one.p[combine] for one in standings]), strict=True):
        above_all = one.p[combine] * (references + 1) < 1.5
        open_ = one.doubted or (above_all and not reachable)
        one.p_holm, one.verdict = p, "undecided" if open_ else "stolen" if p < level else "no proof of theft"


def references_needed(suspects: int, level: float) -> int:
    """The fewest references with which a suspect can be found among so many: K with suspects / (K + 1) below level."""
    return math.floor(suspects / level + 1e-9)


# ---- rates, where the truth is known ---------------------------------------------------------------------------------


def true_rates(standings: Mapping[str, Standing | None], truth: Mapping[str, bool]) -> dict[str, dict[str, float]]:
    """How well stolen suspects are told from the others by each z-score and each combination, by its name.

    auc, and tpr_1 and tpr_5: the share in [0, 1] of stolen suspects that are found where 1 or 5 % of the others are
    (`hits_at`), each with `_low` and `_high`, the ends of its 95 % interval. An interval of a share is for the
    threshold as it is: that another draw of innocent suspects would move the threshold is not in it. A suspect that has
    no score is never found. standings and truth are by suspect's name.
    """
    known = [(standings[name], stolen) for name, stolen in truth.items()]
    names = dict.fromkeys(name for one, _ in known if one for name in (*one.z, *COMBINED))
    rates = {}
    for name in sorted(names, key=lambda name: name in COMBINED):
        guilty, innocent = split_scores(known, name)
        figures = {"auc": roc(guilty, innocent)[1]}
        if min(len(guilty), len(innocent)) > 1:
            figures["auc_low"], figures["auc_high"] = auc_interval(guilty, innocent)
        for rate in FALSE_RATES:
            hits, key = hits_at(guilty, innocent, rate), f"tpr_{round(100 * rate)}"
            low, high = rate_interval(hits, len(guilty))
            figures |= {key: hits / len(guilty), f"{key}_low": low, f"{key}_high": high}
        rates[name] = figures
    return rates


def split_scores(known: Sequence[tuple[Standing | None, bool]], name: str) -> tuple[list[float], list[float]]:
    """A score's values of the stolen suspects and of the others; where there is none, one below all."""
    values = [({**one.z, **one.combined}.get(name) if one else None, stolen) for one, stolen in known]
    least = min((value for value, _ in values if value is not None), default=0.0) - 1
    values = [(least if value is None else value, stolen) for value, stolen in values]
    return [value for value, stolen in values if stolen], [value for value, stolen in values if not stolen]
