"""Dataset inference on representations made up for it: where it must separate, and where it must not."""

import math

import pytest
import torch

from defenses.dataset_inference import halves, log_likelihoods
from evaluation.statistics import cohens_d, welch
from utils import UserError, generator


def test_halves_are_disjoint_and_random():
    first, second = halves(101, seed=1)
    assert len(first) == len(second) == 50
    assert len({*first.tolist(), *second.tolist()}) == 100
    assert first.tolist() != sorted(first.tolist())
    assert torch.equal(first, halves(101, seed=1)[0])
    assert not torch.equal(first, halves(101, seed=2)[0])
    first, second = halves(101, 20)
    assert len({*first.tolist(), *second.tolist()}) == 20


@pytest.mark.parametrize(
    ("count", "number", "message"),
    [
        (101, 102, "was trained on 101 images, give 101 or less"),
        (101, 3, "too few for dataset inference: give --num-train 4 or more"),
        (3, None, "3 training images are too few for dataset inference: try --method watermark"),
    ],
)
def test_halves_of_too_many_or_too_few_are_refused(count, number, message):
    with pytest.raises(UserError, match=message):
        halves(count, number)


def test_one_component_is_a_normal_density_of_directions():
    """Against the formula: means and variances of the unit rows, with scikit-learn's floor of 1e-6."""
    fitted, seen = torch.randn(2, 40, 5, dtype=torch.float64, generator=generator(0, "test"))
    unit = [rows / rows.norm(dim=1, keepdim=True) for rows in (fitted, seen)]
    mean, variance = unit[0].mean(dim=0), unit[0].var(dim=0, correction=0) + 1e-6
    expected = (-0.5 * ((unit[1] - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi))).sum(dim=1)
    torch.testing.assert_close(log_likelihoods(fitted, seen, components=1)[0], expected)


def test_the_length_of_a_representation_does_not_count():
    fitted, seen = torch.randn(2, 40, 5, generator=generator(0, "test"))
    lengths = torch.rand(40, 1, generator=generator(1, "test")) + 0.5
    (plain,) = log_likelihoods(fitted, seen, components=3)
    (scaled,) = log_likelihoods(fitted, seen * lengths, components=3)
    torch.testing.assert_close(plain, scaled)


def test_the_mixture_follows_from_the_seed():
    fitted, seen = torch.rand(2, 60, 5, generator=generator(0, "test"))
    first, again, other = (log_likelihoods(fitted, seen, components=8, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def p_value(trained, unseen, seed):
    first, second = halves(len(trained), seed=seed)
    return welch(*log_likelihoods(trained[first], trained[second], unseen, components=4, seed=seed))


def test_images_that_an_encoder_knows_are_told_from_others():
    """What it knows it holds nearer to what is common to its classes."""
    draws = generator(0, "test")
    classes = torch.randn(4, 16, generator=draws)
    trained = classes.repeat(50, 1) + 0.3 * torch.randn(200, 16, generator=draws)
    unseen = classes.repeat(50, 1) + 0.4 * torch.randn(200, 16, generator=draws)
    assert p_value(trained, unseen, seed=0) < 1e-6
    first, second = halves(200)
    assert cohens_d(*log_likelihoods(trained[first], trained[second], unseen, components=4)) > 0.5


def test_images_that_an_encoder_does_not_know_are_not_told_from_others():
    """Over 40 draws from one distribution a test at the level 0.2 errs 8 times, give or take 2.5.

    Halves that overlapped would be found each time: the mixture is fitted to what it is tested on.
    """
    p_values = []
    for seed in range(40):
        draws = generator(seed, "test")
        centres = torch.randn(4, 16, generator=draws)
        rows = centres.repeat(100, 1) + 0.4 * torch.randn(400, 16, generator=draws)
        p_values.append(p_value(rows[:200], rows[200:], seed))
    assert 1 <= sum(p < 0.2 for p in p_values) <= 17
