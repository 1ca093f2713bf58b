"""What the trainer looks at: the loss, the spread of the features, and the time that is left."""

import dataclasses
import math
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_aug.images import Stored
from loss import HEAD_LOSSES, STEAL_LOSSES
from models import projection_head
from simclr import SimCLR
from tests.conftest import Applied
from tests.networks import FP32, small_encoder
from training.monitor import Watch, spread_of
from training.recipe import Recipe
from training.run import Run
from utils import Precision, UserError, seeded
from victim import Victim


def watch(folder, device="cpu", steps=4, recipe=Recipe(), **more):  # noqa: B008 -- frozen
    run = Run(folder, Precision("fp32", torch.device(device)))
    run.start()
    return Watch(run, recipe, 2, [recipe.batch_size] * steps, 0.1, **more)


def test_spread_is_the_mean_deviation_of_unit_rows(tmp_path):
    expected = []
    with watch(tmp_path) as epoch:
        for seed in range(4):
            features = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) + seed
            unit = torch.stack([row / row.norm() for row in features])
            expected.append(sum(unit[:, c].std(correction=0).item() for c in range(5)) / 5)
            epoch.add(torch.tensor(float(seed)), features)
        loss, spread = epoch.close()
    assert loss == pytest.approx(1.5)
    assert spread == pytest.approx(sum(expected) / 4)


def test_evenly_spread_rows_have_the_spread_that_collapse_is_measured_by(tmp_path):
    with watch(tmp_path) as epoch:
        for seed in range(4):
            features = torch.randn(2000, 64, generator=torch.Generator().manual_seed(seed))
            epoch.add(torch.tensor(0.0), features)
        assert epoch.close()[1] == pytest.approx(64**-0.5, rel=0.01)
        assert epoch.even == 64**-0.5


def test_a_loss_without_a_gradient_says_so(tmp_path, images):
    """SoftNN with the floor of the 2022 formula, on answers that a defence has moved far away."""

    def with_floor(copy, victim):
        share = torch.exp(-STEAL_LOSSES["softnn"](copy, victim))
        return -torch.log(1e-9 + share)

    victim = Victim(small_encoder(seed=0), defences=[Applied(lambda answers: answers + 1000)])
    loss = dataclasses.replace(STEAL_LOSSES["mse"], function=with_floor)
    job = SimCLR(small_encoder(), loss, Recipe(epochs=2, batch_size=4), Run(tmp_path / "floor", FP32))
    with pytest.raises(UserError, match=r"the loss is 20\.7\d and its gradient is 0 for every weight, .* give another"):
        job.steal(Stored(images), victim)
    job = SimCLR(small_encoder(), STEAL_LOSSES["softnn"], job.recipe, Run(tmp_path / "without", FP32))
    before = [weight.detach().clone() for weight in job.model.parameters()]
    job.steal(Stored(images), Victim(small_encoder(seed=0), defences=[Applied(lambda answers: answers + 1000)]))
    assert any(not torch.equal(a, b) for a, b in zip(before, job.model.parameters(), strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_loss_that_is_not_finite_is_named_by_its_step(device, tmp_path):
    """On a GPU later, when the losses are next looked at, but by the same step."""
    seen = []

    def look():
        with watch(tmp_path, device) as epoch:
            for loss in (1.0, math.nan, 1.0, 1.0):
                epoch.add(torch.tensor(loss), torch.randn(4, 3))
                seen.append(loss)
            epoch.close()

    with pytest.raises(UserError, match=r"loss is nan at step 2 of 4 in epoch 3"):
        look()
    assert len(seen) == (1 if device == "cpu" else 4)


def test_collapse_stops_at_the_end_of_the_epoch(tmp_path):
    with watch(tmp_path) as epoch:
        for _ in range(4):
            epoch.add(torch.tensor(1.0), torch.ones(8, 5) + 1e-6 * torch.randn(8, 5))
        with pytest.raises(
            UserError, match=r"collapsed to nearly a point in epoch 3: their spread is .* 0.45 is to be expected"
        ):
            epoch.close()


def test_features_are_measured_by_what_they_match(tmp_path):
    """As close together as those have not collapsed, closer have."""
    matched = torch.ones(8, 5) + 1e-3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    target = spread_of(matched).item()
    for features in (matched, torch.ones(8, 5)):
        with watch(tmp_path, target_spread=target) as epoch:
            epoch.add(torch.tensor(1.0), features)
            if features is matched:
                assert epoch.close()[1] == pytest.approx(target)
            else:
                with pytest.raises(UserError, match="collapsed"):
                    epoch.close()


def test_a_batch_of_one_image_has_no_spread_to_judge(tmp_path):
    with watch(tmp_path) as epoch:
        epoch.add(torch.tensor(1.0), torch.ones(1, 5))
        assert epoch.close() == (1.0, 0.0)


def test_an_interrupted_epoch_goes_on_with_what_it_had_seen(tmp_path):
    """The means are those of all its steps, whichever process made them."""
    features = [torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with watch(tmp_path) as whole:
        for step, rows in enumerate(features):
            whole.add(torch.tensor(float(step)), rows)
    with watch(tmp_path) as first:
        for step, rows in enumerate(features[:3]):
            first.add(torch.tensor(float(step)), rows)
    with watch(tmp_path, seen=first.so_far()) as second:
        assert second.begun == 3
        second.add(torch.tensor(3.0), features[3])
        assert second.close() == whole.close()


def test_the_time_left_is_that_of_the_whole_run_at_the_pace_so_far(tmp_path):
    """Epoch 3 of 10, 4 steps each; this process began with the first of them 20 seconds ago."""
    recipe = Recipe(epochs=10)
    with watch(tmp_path, recipe=recipe, clock=(time.perf_counter() - 20, 2 * 4)) as epoch:
        for _ in range(2):
            epoch.add(torch.tensor(1.0), torch.randn(8, 5))
        # 10 seconds a step, 40 steps in all, of which 10 are done.
        assert epoch.time_left() in ("05:00", "05:01")
    with watch(tmp_path, recipe=recipe) as fresh:
        assert fresh.time_left() == "00:00"  # nothing is known before the first step


def test_print_freq_prints_every_so_many_steps(tmp_path, capsys):
    with watch(tmp_path, steps=5, recipe=Recipe(print_freq=2)) as epoch:
        for step in range(5):
            epoch.add(torch.tensor(float(step)), torch.randn(8, 5))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch: ")]
    assert [line.split("  ")[0] for line in lines] == ["Epoch: [2][0/5]", "Epoch: [2][2/5]", "Epoch: [2][4/5]"]
    assert lines[1].endswith("Loss 2.0000 (1.0000)")


@pytest.fixture
def steal(tmp_path, images):
    """Steals by mse what a victim with these defences answers; the events of the run."""

    def run(epochs=12, lr=1e-2, **victim):
        recipe = Recipe(epochs, 12, lr, 0.0, flat_epochs=epochs, log_every_n_steps=1)
        job = SimCLR(small_encoder(), STEAL_LOSSES["mse"], recipe, Run(tmp_path, FP32))
        job.steal(Stored(images), Victim(small_encoder(seed=0), **victim))
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    return run


def test_spread_is_a_tensorboard_scalar(steal):
    scalars = steal()
    assert len(scalars["spread"]) == len(scalars["step/spread"]) == 12
    assert all(0 < value < 1 for value in scalars["spread"])
    assert scalars["step/spread"] == pytest.approx(scalars["spread"])  # one step an epoch here


def test_a_copy_of_a_victim_that_answers_the_same_to_everything_is_not_stopped(steal):
    scalars = steal(epochs=100, lr=0.3, defences=[Applied(lambda answers: 5 * torch.ones_like(answers))])
    assert scalars["spread"][-1] < 0.01 / 32**0.5


def test_a_head_that_collapses_is_stopped(tmp_path):
    """The mean squared error between views is least for a constant head."""
    with seeded(0):
        head = projection_head(32, 8)
    rows = torch.rand(2 * 16, 32, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(2000, 16, 1e-2, 0.0, flat_epochs=2000)
    job = SimCLR(head, HEAD_LOSSES["mse"], recipe, Run(tmp_path, FP32))
    with pytest.raises(UserError, match="collapsed"):
        job.train_head(rows)
    assert Run(tmp_path, FP32).lines()  # the epochs before it are kept
