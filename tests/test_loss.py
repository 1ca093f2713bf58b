"""Each loss against its formula written out in float64 loops: values and gradients."""

import math

import pytest
import torch

from loss import STEAL_LOSSES, TRAIN_LOSSES, nt_xent

SIZES = [(2, 3), (5, 8), (16, 32)]


def features(images, dim, views=1, scale=1.0, seed=0):
    """Non-negative rows, as representations after a ReLU are."""
    draw = torch.Generator().manual_seed(seed)
    copy, victim = (scale * torch.rand(views * images, dim, generator=draw) for _ in range(2))
    return copy, victim


def slow_nt_xent(rows, images, temperature):
    total = 0.0
    for i in range(len(rows)):
        cosine = [torch.dot(rows[i], row) / rows[i].norm() / row.norm() for row in rows]
        denominator = sum(torch.exp(cosine[j] / temperature) for j in range(len(rows)) if j != i)
        positives = [p for p in range(len(rows)) if p != i and p % images == i % images]
        terms = [-torch.log(torch.exp(cosine[p] / temperature) / denominator) for p in positives]
        total = total + sum(terms) / len(terms)
    return total / len(rows)


def slow_infonce(copy, victim, temperature=0.07, views=1):
    return slow_nt_xent(torch.cat([copy, victim]), len(copy) // views, temperature)


def slow_mse(copy, victim):
    return sum((a - b) ** 2 for a, b in zip(copy.flatten(), victim.flatten(), strict=True)) / copy.numel()


def slow_softce(copy, victim):
    total = 0.0
    for a, b in zip(copy, victim, strict=True):
        target = torch.exp(b) / torch.exp(b).sum()
        total = total - (target * torch.log(torch.exp(a) / torch.exp(a).sum())).sum()
    return total / len(copy)


def slow_wasserstein(copy, victim):
    total = 0.0
    for a, b in zip(copy, victim, strict=True):
        for c in range(len(a)):
            total = total + torch.abs(a[: c + 1].sum() / (a.sum() + 1e-14) - b[: c + 1].sum() / (b.sum() + 1e-14))
    return total / len(copy)


def slow_softnn(copy, victim, temperature=100.0, views=1):
    rows, images = torch.cat([copy, victim]), len(copy) // views
    total = 0.0
    for i in range(len(rows)):
        near = [torch.exp(-((rows[i] - row) ** 2).sum() / temperature) for row in rows]
        everyone = sum(near[j] for j in range(len(rows)) if j != i)
        positive = sum(near[j] for j in range(len(rows)) if j != i and j % images == i % images)
        total = total - torch.log(1e-9 + positive / everyone)
    return total / len(rows)


SLOW = {
    "infonce": slow_infonce,
    "mse": slow_mse,
    "softce": slow_softce,
    "wasserstein": slow_wasserstein,
    "softnn": slow_softnn,
}


def test_every_loss_has_a_slow_formula():
    assert set(SLOW) == set(STEAL_LOSSES)


def assert_agree(fast, slow, copy, victim, **options):
    """Value and gradient of the float32 loss against the formula in float64."""
    copy32 = copy.clone().requires_grad_()
    copy64 = copy.double().requires_grad_()
    value, expected = fast(copy32, victim, **options), slow(copy64, victim.double(), **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(value, copy32)
    (expected_gradient,) = torch.autograd.grad(expected, copy64)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("name", SLOW)
def test_matches_the_formula(name, scale, size):
    copy, victim = features(*size, scale=scale)
    assert_agree(STEAL_LOSSES[name], SLOW[name], copy, victim)


@pytest.mark.parametrize("name", ["infonce", "softnn"])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 10.0])
def test_temperature_and_views(name, temperature):
    copy, victim = features(6, 8, views=2)
    assert_agree(STEAL_LOSSES[name], SLOW[name], copy, victim, temperature=temperature, views=2)


@pytest.mark.parametrize("images", [2, 7])
@pytest.mark.parametrize("views", [2, 3])
def test_training_infonce_matches_the_formula(images, views):
    rows = torch.randn(images * views, 16, generator=torch.Generator().manual_seed(1))
    value = TRAIN_LOSSES["infonce"](rows, views=views, temperature=0.07)
    expected = slow_nt_xent(rows.double(), images, 0.07)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_training_infonce_is_lowest_for_equal_views():
    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    assert nt_xent(torch.cat([rows, rows])) < nt_xent(torch.cat([rows, rows.roll(1, 0)]))


@pytest.mark.parametrize("name", SLOW)
def test_shuffled_answers_change_the_loss(name):
    copy, victim = features(16, 32)
    assert not torch.isclose(STEAL_LOSSES[name](copy, victim), STEAL_LOSSES[name](copy, victim.roll(1, 0)), rtol=1e-4)


@pytest.mark.parametrize("distance", [1e3, 1e6])
def test_softnn_survives_distances_whose_exponential_underflows(distance):
    """The formula itself divides 0 by 0 here; its limit is the nearest row's share."""
    copy = distance * torch.eye(4)
    copy.requires_grad_()
    value = STEAL_LOSSES["softnn"](copy, copy.detach() * 1.0001)
    (gradient,) = torch.autograd.grad(value, copy)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert value.item() == pytest.approx(-math.log(1 + 1e-9), abs=1e-3)
    # Every row nearest to another image's row: the share is 0 and only the formula's 1e-9 is left.
    wrong = STEAL_LOSSES["softnn"](copy.detach(), copy.detach().roll(1, 0))
    assert wrong.item() == pytest.approx(-math.log(1e-9), rel=1e-3)


def test_softnn_far_from_the_origin_keeps_its_precision():
    copy, victim = features(8, 16)
    options = {"temperature": 1.0}
    assert_agree(STEAL_LOSSES["softnn"], SLOW["softnn"], copy + 100, victim + 100, **options)


def test_softnn_makes_no_float64():
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (_assert_single(t), t)[1], lambda t: t):
        copy, victim = features(8, 16)
        STEAL_LOSSES["softnn"](copy.requires_grad_(), victim)


def _assert_single(tensor):
    assert tensor.dtype != torch.float64
