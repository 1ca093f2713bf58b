"""The table and the picture of what an experiment measured."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from evaluation.rows import unpacked
from evaluation.statistics import mcnemar, paired_interval, rate_interval
from files.writing import atomic_path

Rows = Sequence[Mapping]
HEAD = (
    *("defence", "attack", "seeds", "test images", "copy", "difference", "copy, kNN", "user", "user's loss"),
    *("queries (distinct)", "AUC, such a stream", "watermark", "p (Holm)", "found"),
)
NOTE = """\
[a, b]: 95 % interval of a mean over the seeds (Student's t) or, of a single seed, of a share of the test images (exact,
binomial). difference: the copy's accuracy less that of the same attack without a defence, or of the best attack without
a defence, on the same test images, with its interval for paired shares and McNemar's p, uncorrected for the number of
lines; over several seeds the mean, the mean ends, and the largest p. user: the accuracy of a user's task, which may
have fewer classes than the copy's and so a higher chance: compare it with the user's loss, the accuracy without a
defence less that with it, on the same test images. AUC, such a stream: of undefended streams of the attack's kind, as
long as a user's, by detect.py, and not of the line's own queries; with an interval as if streams were independent.
p (Holm): the largest p-value of a copy's tests of
ownership, corrected for all copies of the table; over several seeds the largest. found: copies called stolen. Controls,
whose attacker stole nothing of the victim's, are not tested."""


def results_table(rows: Rows) -> str:
    """A Markdown table: a line for each defence, strength and attack; accuracies are means over the seeds."""
    keys = dict.fromkeys((row["point"], row["attack"].name) for row in rows)
    cells = {key: [row for row in rows if (row["point"], row["attack"].name) == key] for key in keys}
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for key, same in cells.items():
        other = _reference(key, cells)
        against = f"{_against(same, cells[other])} to {other[1]}, {other[0]}" if other else ""
        lines.append("| " + " | ".join([str(key[0]), key[1], *_cells(same, against)]) + " |")
    return "\n".join([*lines, "", NOTE])


def _cells(rows: Rows, against: str) -> list[str]:
    """The figures of rows that differ in the seed only."""
    first, copies = rows[0], [row["copy"] for row in rows]
    verified = [row["verified"] for row in rows if "verified" in row]
    worst = _figures(verified, "p_holm")
    return [
        str(len(rows)),
        " ".join(f"{figure:,}" for figure in _figures(copies[:1], "test_images")),
        mean_words(copies, "top1_converged"),
        against,
        mean_words(copies, "knn"),
        mean_words([first["user"]], "top1_converged"),
        _loss_words(first["user"]),
        " ".join(
            form.format(figure)
            for name, form in (("queries", "{:,}"), ("distinct", "({:,})"))
            for figure in _figures(copies[:1], name)
        ),
        _auc_words(first.get("detection", {}), f"auc_{first['attack'].stream}"),
        mean_words(verified, "accuracy"),
        f"{max(worst):.2g}" if worst else "",
        _found_words(verified),
    ]


def _loss_words(user: Mapping) -> str:
    """What a defence costs the user in points, with its interval and McNemar's p; empty where the row does not say."""
    pair = [{**user, "right": user.get(name), "test_digest": "the same"} for name in ("clean_right", "right")]
    return paired_difference([tuple(pair)]) if user.get("defence") else ""


def _auc_words(detection: Mapping, name: str) -> str:
    """An AUC with its interval; empty where it was not measured."""
    area, low, high = (_figures([detection], key) for key in (name, f"{name}_low", f"{name}_high"))
    ends = f" [{low[0]:.2f}, {high[0]:.2f}]" if low and high else ""
    return f"{area[0]:.2f}{ends}" if area else ""


def _found_words(verified: Rows) -> str:
    """How many of the copies are called stolen, in words; empty where none was tested."""
    decided = [row["found"] for row in verified if row.get("found") is not None]
    return f"{sum(decided)} of {len(verified)}" if decided else "undecided" if verified else ""


def _figures(rows: Rows, name: str) -> list[float]:
    """The numbers of that name, of the rows that have any: a probe such as kNN has no converged accuracy."""
    return [row[name] for row in rows if isinstance(row.get(name), int | float)]


def mean_words(rows: Rows, name: str) -> str:
    """The mean of a share in percent, with its interval, see NOTE; empty without values."""
    values = _figures(rows, name)
    if not values:
        return ""
    mean, images = statistics.fmean(values), _figures(rows, "test_images")
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        low, high = max(0, mean - half), min(100, mean + half)
    elif images:
        low, high = (100 * end for end in rate_interval(round(mean / 100 * images[0]), images[0]))
    else:
        return f"{mean:.1f}"
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


# ---- pairs -----------------------------------------------------------------------------------------------------------


def _reference(key: tuple, cells: Mapping[tuple, Rows]) -> tuple | None:
    """What a line is compared with: its attack without a defence, or the best attack without one; else the best line.

    Lines are (point, attack's name). None for the line that would be compared with itself.
    """
    known = [other for other, rows in cells.items() if _figures([row["copy"] for row in rows], "top1_converged")]
    free = [other for other in known if other[0].defence == "none"]
    twin = [other for other in free if other[1] == key[1] and other != key]
    best = max(twin or free or known, key=lambda other: _accuracy(cells[other]), default=key)
    return best if key in known and best != key else None


def _accuracy(rows: Rows) -> float:
    return statistics.fmean(_figures([row["copy"] for row in rows], "top1_converged"))


def _against(rows: Rows, others: Rows) -> str:
    """`paired_difference` of copies of the same seeds; the difference of the means where no images are the same."""
    by_seed = {row["seed"]: row["copy"] for row in others}
    pairs = [(row["copy"], by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    return paired_difference(pairs) or f"{_accuracy(rows) - _accuracy(others):+.1f}"


def paired_difference(pairs: Sequence[tuple[Mapping, Mapping]]) -> str:
    """The mean difference of pairs of evaluations, with its interval and McNemar's p: see NOTE.

    Empty where no pair is of the same test images.
    """
    right = [[_right(one) for one in pair] for pair in pairs if len({one.get("test_digest") for one in pair}) == 1]
    right = [pair for pair in right if not any(one is None for one in pair)]
    if not right:
        return ""
    p_values, differences = zip(*(mcnemar(*pair) for pair in right), strict=True)
    low, high = np.mean([paired_interval(*pair) for pair in right], axis=0)
    return f"{statistics.fmean(differences):+.1f} [{low:+.1f}, {high:+.1f}], p {max(p_values):.2g}"


def _right(row: Mapping) -> np.ndarray | None:
    """Which test images the row's encoder is right on; None where the row does not say."""
    try:
        return unpacked(row["right"], row["test_images"])
    except (KeyError, TypeError, ValueError):
        return None


# ---- picture ---------------------------------------------------------------------------------------------------------


def picture(rows: Rows, path: Path) -> None:
    """For each attack run against every defence: the user's accuracy by the copy's, a line through the strengths.

    Rows without these accuracies are left out; where none is left there is no picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if len(_figures([row["copy"], row["user"]], "top1_converged")) == 2]
    attacks = list(dict.fromkeys(row["attack"].name for row in rows if not row["attack"].against))
    if not attacks:
        return
    defences = list(dict.fromkeys(row["point"].defence for row in rows))
    colours = dict(zip(defences, itertools.cycle(pyplot.colormaps["tab20"].colors), strict=False))
    figure, axes = pyplot.subplots(1, len(attacks), figsize=(6 * len(attacks), 5), layout="constrained", squeeze=False)
    for axis, attack in zip(axes[0], attacks, strict=True):
        for defence in defences:
            points = _curve([row for row in rows if (row["attack"].name, row["point"].defence) == (attack, defence)])
            style = {"marker": "o", "markersize": 4, "color": colours[defence], "label": defence}
            axis.plot(*zip(*[point[:2] for point in points], strict=True), **style)
            for x, y, strength in points:
                if strength is not None:
                    axis.annotate(f"{strength:g}", (x, y), fontsize=6, xytext=(2, 2), textcoords="offset points")
        axis.set(xlabel="copy's accuracy (%)", ylabel="user's accuracy (%)", title=attack)
    axes[0][-1].legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _curve(rows: Rows) -> list[tuple[float, float, float | None]]:
    """(copy's accuracy, user's accuracy, strength), means over the seeds, in the order of the strengths."""
    points = []
    for point in dict.fromkeys(row["point"] for row in rows):
        same = [row for row in rows if row["point"] == point]
        accuracy = statistics.fmean(row["copy"]["top1_converged"] for row in same)
        points.append((accuracy, same[0]["user"]["top1_converged"], point.strength))
    return points
