"""What the trainer looks at: the loss, and the spread of the features."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from loss import STEAL_LOSSES
from models import build_encoder
from monitor import Watch
from simclr import SimCLR, Training
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
    with pytest.raises(UserError, match=r"collapsed to nearly one point in epoch 3: their spread is .* evenly spread"):
        epoch.close(0.1, bar)


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


def test_a_copy_that_collapses_is_stopped(steal, tmp_path):
    """A victim that answers the same to everything."""
    with pytest.raises(UserError, match="collapsed"):
        steal(epochs=50, defences=[lambda answers, images, account: 5 * torch.ones_like(answers)])
    assert Run(tmp_path).records()  # the epochs before it are kept
