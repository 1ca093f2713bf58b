"""The tests behind a claim of theft (one-sided, each with an effect size), and how well such claims can be told.

Scores are tensors or sequences of numbers, a number for each image or for each encoder. Intervals are of 95 %.
"""

from collections.abc import Sequence

import numpy as np
import scipy  # its parts are imported where they are used first: a training does not wait for them
from torch import Tensor

Scores = Tensor | Sequence[float]
Interval = tuple[float, float]
NORMAL_95 = 1.959963984540054  # the normal deviate with 2.5 % above it
SMALLEST_DEVIATION = 1e-9  # of other encoders' scores, where these are all equal


def welch(a: Scores, b: Scores) -> float:
    """The p-value of Welch's t-test that the mean of a (N,) is greater than that of b (M,).

    Where neither varies: 0 for a greater mean, else 1.
    """
    a, b = _array(a), _array(b)
    if a.std() == b.std() == 0:
        return 0.0 if a.mean() > b.mean() else 1.0
    return float(scipy.stats.ttest_ind(a, b, equal_var=False, alternative="greater").pvalue)


def paired_t(a: Scores, b: Scores) -> float:
    """The p-value of the paired t-test that the mean of a (N,) is greater than that of b (N,), of the same images.

    Where the differences do not vary: 0 for a greater mean, else 1.
    """
    differences = _array(a) - _array(b)
    if np.ptp(differences) == 0:
        return 0.0 if differences[0] > 0 else 1.0
    return float(scipy.stats.ttest_1samp(differences, 0, alternative="greater").pvalue)


def kolmogorov_smirnov(a: Scores, b: Scores) -> float:
    """The p-value of Kolmogorov and Smirnov's test that scores a (N,) are greater than scores b (M,); of many."""
    return float(scipy.stats.ks_2samp(_array(a), _array(b), alternative="less", method="asymp").pvalue)


def sign_test(wins: int, losses: int) -> float:
    """The p-value of the binomial test that wins are more frequent than losses; 1 without any."""
    return float(scipy.stats.binomtest(wins, wins + losses, 0.5, "greater").pvalue) if wins + losses else 1.0


def mcnemar(right_a: Scores, right_b: Scores) -> tuple[float, float]:
    """McNemar's exact two-sided p-value for two classifiers on the same images, and their accuracies' difference.

    right_a, right_b: which images each classifies correctly, (N,) of booleans. The images that exactly one of them
    classifies correctly are a binomial sample, by default of 1/2 (McNemar, 1947). The difference, a less b, is in
    percentage points; `paired_interval` is its interval.
    """
    n, only_a, only_b = _discordant(right_a, right_b)
    p = scipy.stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    return float(p), 100 * (only_a - only_b) / n


def paired_interval(right_a: Scores, right_b: Scores) -> Interval:
    """The interval of the difference of two accuracies on the same images (N,), a less b, in percentage points.

    Wald's with half an image added to each of the four cells (Agresti & Min, Statistics in Medicine 24, 2005).
    """
    n, only_a, only_b = _discordant(right_a, right_b)
    total, difference = n + 2, only_a - only_b
    half = NORMAL_95 * (only_a + only_b + 1 - difference**2 / total) ** 0.5
    return 100 * max(-1.0, (difference - half) / total), 100 * min(1.0, (difference + half) / total)


def _discordant(right_a: Scores, right_b: Scores) -> tuple[int, int, int]:
    """The number of images, and of those that only a, or only b, classifies correctly. ValueError for other shapes."""
    a, b = (_array(right).astype(bool) for right in (right_a, right_b))
    if a.shape != b.shape or not a.size:
        raise ValueError(f"answers to {a.shape} and {b.shape} images are not paired")
    return a.size, int((a & ~b).sum()), int((b & ~a).sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of a family of tests (Scandinavian Journal of Statistics 6, 1979), in the order given.

    Those below a level are the tests that pass, with at most that probability of any false one among them.
    """
    p = _array(p_values)
    order = p.argsort(kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]), 1)
    return adjusted.tolist()


def rate_interval(hits: int, number: int) -> Interval:
    """The interval of a rate in [0, 1] of which `hits` of `number` were seen (Clopper & Pearson, 1934); 0 to 1 of none.

    0 of 3: 0 to 0.71.
    """
    if not number:
        return 0.0, 1.0
    low, high = scipy.stats.binomtest(hits, number).proportion_ci(0.95, method="exact")
    return float(low), float(high)


def further_draw(value: float, others: Scores) -> float:
    """The p-value of the test that a value is greater than a further draw from the distribution of others (K,), K > 1.

    The t-test of a single value against a sample, (value - mean) / (deviation * sqrt(1 + 1 / K)) with K - 1 degrees of
    freedom, which assumes a normal distribution. Where the others are all equal: 0 for a greater value, else 1.
    """
    others = _array(others)
    spread = others.std(ddof=1) * (1 + 1 / len(others)) ** 0.5
    if spread == 0:
        return 0.0 if value > others[0] else 1.0
    return float(scipy.stats.t.sf((value - others.mean()) / spread, len(others) - 1))


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
    from sklearn.metrics import roc_auc_score, roc_curve  # here, for the same reason as scipy's parts

    truth = np.repeat([1, 0], [len(guilty), len(innocent)])
    scores = np.concatenate([_array(guilty), _array(innocent)])
    false, found, _ = roc_curve(truth, scores, drop_intermediate=False)
    return list(zip(false.tolist(), found.tolist(), strict=True)), float(roc_auc_score(truth, scores))


def auc_interval(guilty: Scores, innocent: Scores) -> Interval:
    """The interval of `roc`'s area for scores (N,) of the guilty and (M,) of the innocent; N and M are above 1.

    By the variance of DeLong et al. (Biometrics 44, 1988): of the share of the innocent that each of the
    guilty exceeds, and of the guilty that exceed each of the innocent. Where neither varies, as at an area of 0 or 1,
    it is 0, which says nothing. Then by Clopper and Pearson: min(N, M) pairs without a common encoder are as many
    independent trials, each with the area as its probability.
    """
    guilty, innocent = _array(guilty), _array(innocent)
    wins = (guilty[:, None] > innocent) + 0.5 * (guilty[:, None] == innocent)
    area = wins.mean()
    variance = wins.mean(axis=1).var(ddof=1) / len(guilty) + wins.mean(axis=0).var(ddof=1) / len(innocent)
    if variance == 0:
        pairs = min(len(guilty), len(innocent))
        low, high = rate_interval(round(area * pairs), pairs)
        return min(low, float(area)), max(high, float(area))
    half = NORMAL_95 * variance**0.5
    return float(max(0, area - half)), float(min(1, area + half))


def hits_at(guilty: Scores, innocent: Scores, rate: float) -> int:
    """How many of the guilty (N,) reach the lowest threshold that at most this share of the innocent (M,) reaches.

    With fewer than 1 / rate innocent scores that is no one of them: the guilty above all of the innocent.
    """
    found = max(found for false, found in roc(guilty, innocent)[0] if false <= rate + 1e-12)
    return round(found * len(guilty))


# ---- an encoder among others -----------------------------------------------------------------------------------------


def against(score: Scores, value: float, others: Sequence[Scores], values: Scores) -> dict[str, float]:
    """effect, p_t and p_encoders of scores (N,) and their summary, against other encoders' of the same images."""
    figures = {}
    if len(others):
        rows = [_array(other) for other in others]
        figures["effect"] = cohens_d(score, np.concatenate(rows))
        figures["p_t"] = paired_t(score, sum(rows) / len(rows))
    if len(others) > 1:
        figures["p_encoders"] = further_draw(value, values)
    return figures


def z_scores(values: np.ndarray) -> np.ndarray:
    """By how many deviations each row (N, S) is above the mean of the other N - 1 rows, column by column; N > 2.

    No row has a part in what it is compared with, so all N are treated alike. A deviation counts as 1e-9 at least.
    """
    z = np.empty(values.shape)
    for row in range(len(values)):
        others = np.delete(values, row, axis=0)
        z[row] = (values[row] - others.mean(axis=0)) / np.maximum(others.std(axis=0, ddof=1), SMALLEST_DEVIATION)
    return z


def rank_p(totals: Scores) -> float:
    """The share of numbers (N,) that are at least the first, itself among them: a p-value of 1 / N or more.

    If the first is a further draw of the same kind as the others, it is at most a with a probability of at most a,
    whatever the distribution, provided that the numbers treat all N alike (Vovk et al., 2005: conformal prediction).
    """
    totals = _array(totals)
    return float((totals >= totals[0] - 1e-9 * (1 + abs(totals[0]))).mean())


def _array(scores: Scores) -> np.ndarray:
    return np.asarray(scores, dtype=np.float64)


def _in_deviations(difference: float, deviation: float) -> float:
    if deviation == 0:
        return float(np.sign(difference) * np.inf) if difference else 0.0
    return float(difference / deviation)
