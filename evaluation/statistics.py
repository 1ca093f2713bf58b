"""The tests behind a claim of theft (one-sided, each with an effect size), and the ROC that judges such claims.

Scores are tensors or sequences of numbers, a number for each image or for each encoder.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

Scores = Tensor | Sequence[float]


def welch(a: Scores, b: Scores) -> float:
    """The p-value of Welch's t-test that the mean of a (N,) is greater than that of b (M,).

    Where neither varies: 0 for a greater mean, else 1.
    """
    a, b = _array(a), _array(b)
    if a.std() == b.std() == 0:
        return 0.0 if a.mean() > b.mean() else 1.0
    return float(stats.ttest_ind(a, b, equal_var=False, alternative="greater").pvalue)


def sign_test(wins: int, losses: int) -> float:
    """The p-value of the binomial test that wins are more frequent than losses; 1 without any."""
    return float(stats.binomtest(wins, wins + losses, 0.5, "greater").pvalue) if wins + losses else 1.0


def further_draw(value: float, others: Scores) -> float:
    """The p-value of the test that a value is greater than a further draw from the distribution of others (K,), K > 1.

    The t-test of a single value against a sample, (value - mean) / (deviation * sqrt(1 + 1 / K)) with K - 1 degrees of
    freedom, which assumes a normal distribution. Where the others are all equal: 0 for a greater value, else 1.
    """
    others = _array(others)
    spread = others.std(ddof=1) * (1 + 1 / len(others)) ** 0.5
    if spread == 0:
        return 0.0 if value > others[0] else 1.0
    return float(stats.t.sf((value - others.mean()) / spread, len(others) - 1))


def cohens_d(a: Scores, b: Scores) -> float:
    """The effect size: the mean of a (N,) less that of b (M,), in pooled standard deviations (Cohen, 1988, ch. 2)."""
    a, b = _array(a), _array(b)
    variance = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    return _in_deviations(a.mean() - b.mean(), variance**0.5)


def distance_from(a: Scores, value: float) -> float:
    """The effect size against a fixed value: the mean of a (N,) less the value, in standard deviations of a."""
    a = _array(a)
    return _in_deviations(a.mean() - value, a.std(ddof=1))


def roc(guilty: Scores, innocent: Scores) -> tuple[list[tuple[float, float]], float]:
    """The ROC of scores (N,) of the guilty against scores (M,) of the innocent.

    Returns for each threshold, from the highest, the shares in [0, 1] of the innocent and of the guilty that reach it,
    and the area under that curve: 1 when every guilty score exceeds every innocent score, 0.5 by chance.
    """
    truth = np.repeat([1, 0], [len(guilty), len(innocent)])
    scores = np.concatenate([_array(guilty), _array(innocent)])
    false, found, _ = roc_curve(truth, scores, drop_intermediate=False)
    return list(zip(false.tolist(), found.tolist(), strict=True)), float(roc_auc_score(truth, scores))


def _array(scores: Scores) -> np.ndarray:
    return np.asarray(scores, dtype=np.float64)


def _in_deviations(difference: float, deviation: float) -> float:
    if deviation == 0:
        return float(np.sign(difference) * np.inf) if difference else 0.0
    return float(difference / deviation)
