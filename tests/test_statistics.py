"""The statistics of verdicts and of comparisons, by slow formulas, other libraries and repeated draws."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from evaluation.statistics import (
    auc_interval,
    cohens_d,
    distance_from,
    further_draw,
    holm,
    mcnemar,
    paired_interval,
    paired_t,
    rate_interval,
    roc,
    sign_test,
    welch,
)

A = [0.61, 0.7, 0.43, 0.92, 0.55, 0.81]
B = [0.52, 0.31, 0.66, 0.4]


# ---- tests over images ----


def test_welch_is_the_formula():
    """t over the two means' standard errors, with Welch's degrees of freedom."""
    parts = [np.var(x, ddof=1) / len(x) for x in (A, B)]
    t = (np.mean(A) - np.mean(B)) / math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (A, B), strict=True))
    assert welch(A, torch.tensor(B, dtype=torch.float64)) == pytest.approx(stats.t.sf(t, freedom))
    assert welch(A, B) < 0.1 < 0.9 < welch(B, A)
    assert (welch([1, 1], [1, 1]), welch([1, 1], [2, 2]), welch([2, 2], [1, 1])) == (1, 1, 0)


def test_paired_t_is_the_formula():
    """The mean difference over its standard error, with N - 1 degrees of freedom."""
    b = [0.5, 0.66, 0.44, 0.8, 0.53, 0.75]
    differences = np.array(A) - b
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(6))
    assert paired_t(A, torch.tensor(b, dtype=torch.float64)) == pytest.approx(stats.t.sf(t, 5))
    assert paired_t(A, b) + paired_t(b, A) == pytest.approx(1)
    assert (paired_t([1, 2], [1, 2]), paired_t([1, 2], [2, 3]), paired_t([2, 3], [1, 2])) == (1, 1, 0)


def test_pairing_finds_what_images_that_differ_would_hide():
    draws = np.random.default_rng(0)
    images = draws.normal(0, 1, 200)
    a, b = images + draws.normal(0.05, 0.1, 200), images + draws.normal(0, 0.1, 200)
    assert paired_t(a, b) < 0.001 < 0.1 < welch(a, b)


@pytest.mark.parametrize(("wins", "losses"), [(7, 3), (3, 7), (5, 0)])
def test_sign_test_counts_the_ways(wins, losses):
    n = wins + losses
    assert sign_test(wins, losses) == pytest.approx(sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n)


# ---- two classifiers on the same images ----


def answers(both, only_a, only_b, neither):
    a = torch.tensor([1] * (both + only_a) + [0] * (only_b + neither)).bool()
    b = torch.tensor([1] * both + [0] * only_a + [1] * only_b + [0] * neither).bool()
    return a, b


@pytest.mark.parametrize(("only_a", "only_b"), [(12, 2), (2, 12), (5, 5), (1, 0), (0, 7)])
def test_mcnemar_counts_the_ways(only_a, only_b):
    """Twice the smaller tail of a fair coin's throws, at most 1; the images on which both agree do not count."""
    n, few = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(few + 1)) / 2**n
    p, difference = mcnemar(*answers(20, only_a, only_b, 16))
    assert p == pytest.approx(min(1, 2 * tail))
    assert p == pytest.approx(mcnemar(*answers(0, only_a, only_b, 0))[0])
    assert difference == pytest.approx(100 * (only_a - only_b) / (36 + n))


def test_equal_answers_do_not_differ():
    a, _ = answers(20, 0, 0, 16)
    assert mcnemar(a, a) == (1, 0)
    low, high = paired_interval(a, a)
    assert -10 < low < 0 < high < 10
    with pytest.raises(ValueError, match="not paired"):
        mcnemar(a, a[:-1])


def test_the_paired_interval_is_the_formula():
    """(c - b) / (n + 2) with half an image more in each of the cells, and the standard error of such a difference."""
    a, b, c, d = 20.5, 12.5, 2.5, 16.5
    n = a + b + c + d
    error = math.sqrt(b + c - (b - c) ** 2 / n) / n
    expected = [100 * ((b - c) / n + sign * 1.959964 * error) for sign in (-1, 1)]
    assert paired_interval(*answers(20, 12, 2, 16)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("shares", "n"), [((0.6, 0.1, 0.1, 0.2), 60), ((0.5, 0.3, 0.05, 0.15), 200)])
def test_the_paired_interval_holds_the_truth_in_19_of_20_draws(shares, n):
    draws = np.random.default_rng(0).multinomial(n, shares, 400)
    truth = 100 * (shares[1] - shares[2])
    held = [low <= truth <= high for low, high in (paired_interval(*answers(*counts)) for counts in draws)]
    assert 0.92 <= np.mean(held) <= 0.98


# ---- tests over encoders ----


def test_a_further_draw_passes_as_often_as_the_level_says():
    """Against 5,000 samples of four and one more from the same distribution."""
    draws = np.random.default_rng(0).normal(3, 2, (5_000, 5))
    p_values = np.array([further_draw(row[0], row[1:]) for row in draws])
    for level in (0.05, 0.5):
        assert (p_values < level).mean() == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 5_000))
    assert further_draw(2, [1, 1]) == 0
    assert further_draw(1, [1, 1]) == sign_test(0, 0) == 1


def test_holm_steps_down():
    """The smallest p-value times 4, the next times 3, ...; none less than the one before, none above 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_accusation():
    """Of ten innocents without it: 1 - 0.95^10, four in ten."""
    draws = np.random.default_rng(0).random((2_000, 10))
    assert (draws < 0.05).any(axis=1).mean() > 0.35
    assert np.mean([min(holm(row)) < 0.05 for row in draws]) == pytest.approx(0.05, abs=0.02)


# ---- effect sizes, rates, the ROC ----


def test_effect_sizes_are_the_formulas():
    squares = sum(((np.array(x) - np.mean(x)) ** 2).sum() for x in (A, B))
    assert cohens_d(A, B) == pytest.approx((np.mean(A) - np.mean(B)) / math.sqrt(squares / (len(A) + len(B) - 2)))
    assert cohens_d(A, B) == -cohens_d(B, A)
    assert distance_from(A, 0.5) == pytest.approx((np.mean(A) - 0.5) / np.std(A, ddof=1))
    assert cohens_d([1, 1], [1, 1]) == 0
    assert cohens_d([2, 2], [1, 1]) == math.inf


def test_no_accusation_of_three_innocents_says_little():
    assert rate_interval(0, 3) == (0, pytest.approx(1 - 0.025 ** (1 / 3)))
    assert round(rate_interval(0, 3)[1], 2) == 0.71
    assert rate_interval(0, 0) == (0, 1)


@pytest.mark.parametrize(("hits", "number"), [(1, 4), (3, 3), (17, 20)])
def test_a_rates_interval_ends_where_either_tail_is_a_fortieth(hits, number):
    low, high = rate_interval(hits, number)
    assert stats.binom.sf(hits - 1, number, low) == pytest.approx(0.025, rel=1e-6)
    assert high == 1 if hits == number else stats.binom.cdf(hits, number, high) == pytest.approx(0.025, rel=1e-6)


def test_roc_counts_pairs_and_shares():
    guilty, innocent = [0.9, 0.6, 0.55], [0.6, 0.5]
    points, area = roc(guilty, innocent)
    pairs = [(g > i) + 0.5 * (g == i) for g in guilty for i in innocent]
    assert area == pytest.approx(sum(pairs) / 6)
    expected = [(0, 0), (0, 1 / 3), (1 / 2, 2 / 3), (1 / 2, 1), (1, 1)]
    assert np.allclose(points, expected)


def test_the_interval_of_an_area_is_that_of_a_bootstrap():
    draws = np.random.default_rng(0)
    guilty, innocent = draws.normal(1, 1, 60), draws.normal(0, 1, 80)
    areas = []
    for _ in range(2_000):
        again, others = draws.choice(guilty, 60), draws.choice(innocent, 80)
        areas.append(stats.mannwhitneyu(again, others).statistic / (60 * 80))
    low, high = auc_interval(guilty, innocent)
    assert (low, high) == pytest.approx(np.quantile(areas, [0.025, 0.975]), abs=0.015)
    assert low < roc(guilty, innocent)[1] < high


def test_an_area_of_1_among_few_encoders_is_not_certain():
    """Three pairs of three: the area may be 0.29, as for a rate of 3 in 3."""
    assert auc_interval([3, 4, 5], [0, 1, 2]) == (rate_interval(3, 3)[0], 1)
    assert auc_interval([0, 1, 2], [3, 4, 5, 6]) == (0, rate_interval(0, 3)[1])
    low, high = auc_interval([1, 1], [1, 1])
    assert low < 0.5 < high
