"""LARS against its formula, parameter by parameter and in float64."""

import pytest
import torch

from training.lars import LARS


def slow(weights, gradients_of, lr, momentum, decay, steps, trust=0.001, eps=1e-8):
    """The published algorithm on lists of arrays."""
    weights = [weight.clone() for weight in weights]
    speed = [torch.zeros_like(weight) for weight in weights]
    for step in range(steps):
        for i, gradient in enumerate(gradients_of(step)):
            size, slope = weights[i].square().sum().sqrt(), gradient.square().sum().sqrt()
            change = gradient + decay * weights[i]
            if size > 0 and slope > 0:
                change = change * trust * size / (slope + decay * size + eps)
            speed[i] = momentum * speed[i] + change
            weights[i] = weights[i] - lr(step) * speed[i]
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_the_formula(decay, momentum):
    draws = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (7,), (2, 3, 3, 3), (5,)]
    weights = [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes]
    weights[3].zero_()  # as a bias before its first step
    gradients = [[torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes] for _ in range(4)]
    gradients[2][1].zero_()
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = LARS(parameters, lr=0.5, momentum=momentum, weight_decay=decay)
    rates = [0.5, 0.4, 0.2, 0.1]
    for step in range(4):
        optimizer.param_groups[0]["lr"] = rates[step]
        for parameter, gradient in zip(parameters, gradients[step], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    expected = slow(weights, lambda step: gradients[step], lambda step: rates[step], momentum, decay, 4)
    for parameter, weight in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=1e-14)


def test_a_step_is_in_proportion_to_the_weights_not_to_the_gradient():
    steps = []
    for scale in (1.0, 1000.0):
        parameter = torch.nn.Parameter(torch.full((10,), 2.0))
        parameter.grad = scale * torch.ones(10)
        LARS([parameter], lr=1.0, momentum=0.0).step()
        steps.append((2.0 - parameter.detach()).norm() / 2.0 / 10**0.5)
    assert steps == pytest.approx([0.001, 0.001], rel=1e-4)


def test_a_plain_group_is_moved_by_sgd_without_weight_decay():
    """Beside a group that is adapted, whose steps are as without it."""
    draws = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, generator=draws, dtype=torch.float64) for _ in range(2)]
    adapted, plain = (torch.nn.Parameter(weight.clone()) for weight in weights)
    optimizer = LARS([{"params": [adapted]}, {"params": [plain], "plain": True}], lr=0.5, weight_decay=0.1)
    gradients = [torch.randn(2, 3, generator=draws, dtype=torch.float64) for _ in range(3)]
    speed, by_hand = torch.zeros(3, dtype=torch.float64), weights[1].clone()
    for pair in gradients:
        adapted.grad, plain.grad = pair.clone().unbind()
        optimizer.step()
        speed = 0.9 * speed + pair[1]
        by_hand = by_hand - 0.5 * speed
    torch.testing.assert_close(plain.detach(), by_hand)
    (expected,) = slow(weights[:1], lambda step: gradients[step][:1], lambda step: 0.5, 0.9, 0.1, 3)
    torch.testing.assert_close(adapted.detach(), expected, rtol=1e-12, atol=1e-14)


def test_parameters_without_gradient_stay():
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    used.grad = torch.ones(3)
    LARS([used, unused], lr=1.0).step()
    assert torch.equal(unused.detach(), torch.ones(3))
    assert not torch.equal(used.detach(), torch.ones(3))


def test_its_state_is_resumed():
    parameter = torch.nn.Parameter(torch.ones(3))
    first = LARS([parameter], lr=1.0)
    parameter.grad = torch.ones(3)
    first.step()
    second = LARS([parameter], lr=1.0)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[parameter]["momentum_buffer"], first.state[parameter]["momentum_buffer"])
