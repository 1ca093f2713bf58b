"""What the trainer looks at: the loss, and the spread of the features."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from loss import HEAD_LOSSES, STEAL_LOSSES
from models import build_encoder, projection_head
from monitor import Watch, spread_of
from simclr import SimCLR
from tests.conftest import Applied
from training import Training
from utils import Precision, Run, UserError, seeded
from victim import Victim


@pytest.fixture
def bar():
    with tqdm(disable=True) as shown:
        yield shown


def watch(folder, device="cpu", steps=4):
    run = Run(folder)
    run.start({}, True)
    return Watch(run, 2, steps, 1, torch.device(device))


def test_spread_is_the_mean_deviation_of_unit_rows(tmp_path, bar):
    epoch, expected = watch(tmp_path), []
    for seed in range(4):
        features = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) + seed
        unit = torch.stack([row / row.norm() for row in features])
        expected.append(sum(unit[:, c].std(correction=0).item() for c in range(5)) / 5)
        epoch.add(torch.tensor(float(seed)), features, 0.1, bar)
    loss, spread = epoch.close(0.1, bar)
    assert loss == pytest.approx(1.5)
    assert spread == pytest.approx(sum(expected) / 4)


def test_evenly_spread_rows_have_the_spread_that_collapse_is_measured_by(tmp_path, bar):
    epoch = watch(tmp_path)
    for seed in range(4):
        features = torch.randn(2000, 64, generator=torch.Generator().manual_seed(seed))
        epoch.add(torch.tensor(0.0), features, 0.1, bar)
    assert epoch.close(0.1, bar)[1] == pytest.approx(64**-0.5, rel=0.01)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_loss_that_is_not_finite_is_named_by_its_step(device, tmp_path, bar):
    """On a GPU later, when the losses are next looked at, but by the same step."""
    epoch = watch(tmp_path, device)

    def look():
        for loss in (1.0, math.nan, 1.0, 1.0):
            epoch.add(torch.tensor(loss), torch.randn(4, 3), 0.1, bar)
        epoch.close(0.1, bar)

    with pytest.raises(UserError, match=r"loss is nan at step 2 of 4 in epoch 3"):
        look()


def test_collapse_stops_at_the_end_of_the_epoch(tmp_path, bar):
    epoch = watch(tmp_path)
    for _ in range(4):
        epoch.add(torch.tensor(1.0), torch.ones(8, 5) + 1e-6 * torch.randn(8, 5), 0.1, bar)
    with pytest.raises(
        UserError, match=r"collapsed to nearly one point in epoch 3: their spread is .* 0.45 is to be expected"
    ):
        epoch.close(0.1, bar)


def test_features_are_measured_by_what_they_match(tmp_path, bar):
    """As close together as those have not collapsed, closer have."""
    matched = torch.ones(8, 5) + 1e-3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    epochs = [watch(tmp_path) for _ in range(2)]
    for epoch, features in zip(epochs, (matched, torch.ones(8, 5)), strict=True):
        epoch.matched = spread_of(matched).item()
        epoch.add(torch.tensor(1.0), features, 0.1, bar)
    assert epochs[0].close(0.1, bar)[1] == pytest.approx(epochs[0].matched)
    with pytest.raises(UserError, match="collapsed"):
        epochs[1].close(0.1, bar)


def test_a_batch_of_one_image_has_no_spread_to_judge(tmp_path, bar):
    epoch = watch(tmp_path)
    epoch.add(torch.tensor(1.0), torch.ones(1, 5), 0.1, bar)
    assert epoch.close(0.1, bar) == (1.0, 0.0)


@pytest.fixture
def steal(tmp_path, images, encoder):
    """Steals by mse what a victim with these defences answers; the events of the run."""

    def run(epochs=12, **victim):
        with seeded(1):
            copy = build_encoder("resnet10w32")
        training = Training(epochs, 12, 1e-2, 0.0, flat_epochs=50, log_every_n_steps=1)
        job = SimCLR(copy, STEAL_LOSSES["mse"], training, Run(tmp_path), Precision("fp32", torch.device("cpu")))
        job.steal(images, Victim(encoder, **victim))
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
    scalars = steal(epochs=50, defences=[Applied(lambda answers: 5 * torch.ones_like(answers))])
    assert scalars["spread"][-1] < 0.01 / 16


def test_a_head_that_collapses_is_stopped(tmp_path):
    """The mean squared error between views is least for a constant head."""
    with seeded(0):
        head = projection_head(32, 8)
    rows = torch.rand(2 * 16, 32, generator=torch.Generator().manual_seed(0))
    training = Training(2000, 16, 1e-2, 0.0, n_views=2, flat_epochs=2000)
    job = SimCLR(head, HEAD_LOSSES["mse"], training, Run(tmp_path), Precision("fp32", torch.device("cpu")))
    with pytest.raises(UserError, match="collapsed"):
        job.train_head(rows)
    assert Run(tmp_path).records()  # the epochs before it are kept
