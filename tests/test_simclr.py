"""The trainer: what it computes in a step, its schedule, its resumption, and its ledger's arithmetic."""

import copy
import itertools
import math

import pytest
import torch

from data_aug.augment import random_views
from defenses import build_defences
from loss import STEAL_LOSSES, TRAIN_LOSSES, nt_xent
from models import SimSiamHeads, build_copy, build_encoder, load_encoder, read_checkpoint
from simclr import SimCLR
from tests.conftest import Applied
from training import Training, learning_rate
from utils import Precision, Run, UserError, generator, seeded
from victim import Victim

FP32 = Precision("fp32", torch.device("cpu"))


def settings(**values):
    return Training(**{"epochs": 2, "batch_size": 4, "lr": 1e-3, "weight_decay": 1e-4, **values})


def small(out_dim=None, seed=1):
    with seeded(seed):
        return build_encoder("resnet10w32", out_dim)


def trainer(folder, model=None, losstype="infonce", resume=False, **values):
    """A trainer for the encoder with a head that is given, or for a copy without one of a victim that answers 256."""
    loss = (TRAIN_LOSSES if model is not None and model.has_head else STEAL_LOSSES)[losstype]
    values.setdefault("n_views", loss.min_views)
    with seeded(0):
        companion = SimSiamHeads(256, 32) if loss.predictor else None
    config = {"kind": "stolen"}
    return SimCLR(
        model or small(), loss, settings(**values), Run(folder), FP32, config, resume=resume, companion=companion
    )


def weights(folder):
    return read_checkpoint(folder / "checkpoint.pth.tar")["state_dict"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- the schedule ----


def test_standard_schedule_ends_near_zero_and_never_rises():
    training = settings(epochs=100, lr=1.0)
    rates = [learning_rate(training, epoch, steps_per_epoch=35) for epoch in range(100)]
    assert rates[:11] == [1.0] * 11
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert rates[11] == pytest.approx(0.5 * (1 + math.cos(math.pi / 90)))
    assert rates[99] < 1e-3


def test_released_schedule_is_that_of_2022():
    """The 2022 code's figures: 35 batches give 0 in epoch 45, the full rate in 80, 43 % in 99; 195 0.2 % in 199."""
    training = settings(epochs=100, lr=1.0, recipe="released")
    assert learning_rate(training, 45, 35) == pytest.approx(0, abs=1e-9)
    assert learning_rate(training, 80, 35) == pytest.approx(1)
    assert learning_rate(training, 99, 35) == pytest.approx(0.43, abs=0.005)
    assert learning_rate(settings(epochs=200, lr=1.0, recipe="released"), 199, 195) == pytest.approx(0.002, abs=5e-4)


def test_flat_epochs():
    assert learning_rate(settings(epochs=5, lr=1.0, flat_epochs=1), 1, 9) == 1.0
    assert learning_rate(settings(epochs=5, lr=1.0, flat_epochs=1), 3, 9) == pytest.approx(0.5)
    assert learning_rate(settings(epochs=5, lr=1.0), 4, 9) == 1.0


# ---- training ----


def test_training_step_is_the_loss_of_two_views_and_adam(tmp_path, images):
    """One epoch of one batch against the same step written out."""
    model = small(out_dim=16)
    expected = copy.deepcopy(model)
    trainer(tmp_path, model, epochs=1, batch_size=12).train(images)

    order = torch.randperm(12, generator=generator(0, "order", 0))
    views = random_views(images[order].repeat(2, 1, 1, 1), 32, generator(0, "views", 0))
    expected.train()
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3, weight_decay=1e-4)
    loss = nt_xent(expected.project(views), temperature=0.07)
    loss.backward()
    optimizer.step()
    state = weights(tmp_path)
    for name, parameter in expected.named_parameters():
        # Adam's first step is lr times the gradient's sign, and rounding turns the sign of a gradient near zero.
        differs = (state[name] - parameter.detach()).abs() > 2e-4
        assert differs.float().mean() < 0.02, name
    assert Run(tmp_path).records()[0]["loss"] == pytest.approx(loss.item(), rel=1e-3)


def test_training_lowers_the_loss(tmp_path, images):
    trainer(tmp_path, small(out_dim=16), epochs=8, batch_size=12).train(images)
    losses = [record["loss"] for record in Run(tmp_path).records()]
    assert losses[-1] < losses[0]


def test_same_seed_same_weights_other_seed_others(tmp_path, images):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer(tmp_path / name, small(out_dim=16), seed=seed, epochs=1).train(images)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_checkpoint_reads_back_as_an_encoder(tmp_path, images):
    job = trainer(tmp_path, small(out_dim=16), epochs=1)
    job.train(images)
    loaded = load_encoder(tmp_path / "checkpoint.pth.tar")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images / 255), job.model.eval()(images / 255), rtol=1e-4, atol=1e-5)


RDA = {"n_views": 5, "queryaug": True, "prototype": True, "useaug": True, "copy_views": 3}


class Killed(Exception):
    pass


def kill_in_epoch(job, epoch):
    """As a kill does: the run ends in the middle of an epoch, after the earlier ones were saved."""
    original = job.features

    def run(*args):
        if (
            job.optimizer.param_groups[0]["lr"] == learning_rate(job.training, epoch, 3)
            and len(job.run.records()) == epoch
        ):
            job.steps_left -= 1
            if job.steps_left < 0:
                raise Killed
        return original(*args)

    job.steps_left, job.features = 1, run
    return job


@pytest.mark.parametrize(
    ("losstype", "sent", "more"),
    [("infonce", 12, {"useaug": True}), ("mse", 12, {"useaug": True}), ("symmetrized", 24, {}), ("softnn", 60, RDA)],
)
def test_resumed_attack_is_bit_identical_and_pays_once(losstype, sent, more, tmp_path, images, encoder):
    values = {"losstype": losstype, "epochs": 3, **more}
    trainer(tmp_path / "whole", **values).steal(images, Victim(encoder, budget=sent))
    job = kill_in_epoch(trainer(tmp_path / "cut", **values), epoch=1)
    with pytest.raises(Killed):
        job.steal(images, Victim(encoder, budget=sent))
    assert read_checkpoint(tmp_path / "cut" / "checkpoint.pth.tar")["epoch"] == 1
    victim = Victim(encoder, budget=sent)
    victim.defences.append(Applied())
    trainer(tmp_path / "cut", resume=True, **values).steal(images, victim)
    assert victim.defences[0].seen == 0
    assert victim.ledger.queries == sent
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [record["epoch"] for record in Run(tmp_path / "cut").records()] == [0, 1, 2]
    assert not list((tmp_path / "cut").glob("answers*"))


def test_resuming_a_finished_run_changes_nothing(tmp_path, images, capsys):
    trainer(tmp_path, small(out_dim=16), epochs=1).train(images)
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    trainer(tmp_path, small(out_dim=16), epochs=1, resume=True).train(images)
    assert "has all 1 epochs already" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


def test_resuming_against_a_changed_victim_is_refused(tmp_path, images, encoder):
    trainer(tmp_path, epochs=1).steal(images, Victim(encoder))
    with pytest.raises(UserError, match="victim has changed"):
        trainer(tmp_path, epochs=2, resume=True).steal(images, Victim(small(seed=9)))


# ---- stealing ----


LABELS = torch.arange(12) % 3


@pytest.mark.parametrize("losstype", STEAL_LOSSES)
@pytest.mark.parametrize("n_views", [1, 2])
def test_every_loss_steals_and_each_query_is_made_once(losstype, n_views, tmp_path, images, encoder):
    """With 1 and 2 views, or it refuses in one line before anything is asked or written."""
    victim = Victim(encoder, budget=12 * n_views)
    useaug = STEAL_LOSSES[losstype].plain_first
    job = trainer(tmp_path / "run", losstype=losstype, n_views=n_views, useaug=useaug, copy_views=2)
    before = copy.deepcopy(job.model.state_dict())
    if n_views < STEAL_LOSSES[losstype].min_views or (useaug and n_views > 1):
        with pytest.raises(UserError, match=r"give (2 or more|--n-views 1)$"):
            job.steal(images, victim, LABELS)
        assert victim.ledger.queries == 0
        assert not (tmp_path / "run").exists()
        return
    job.steal(images, victim, LABELS)
    assert victim.ledger.queries == 12 * n_views
    assert victim.ledger.distinct == 12 * n_views
    assert not same(before, weights(tmp_path / "run"))
    assert all(math.isfinite(record["loss"]) for record in Run(tmp_path / "run").records())


@pytest.mark.parametrize("losstype", TRAIN_LOSSES)
@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_every_loss_trains(losstype, n_views, tmp_path, images):
    job = trainer(tmp_path / "run", small(out_dim=16), losstype, n_views=n_views)
    before = copy.deepcopy(job.model.state_dict())
    if n_views < TRAIN_LOSSES[losstype].min_views:
        with pytest.raises(UserError, match="--n-views 1 is too few, give 2 or more"):
            job.train(images, LABELS)
        assert not (tmp_path / "run").exists()
        return
    job.train(images, LABELS)
    assert not same(before, weights(tmp_path / "run"))
    assert all(math.isfinite(record["loss"]) for record in Run(tmp_path / "run").records())


@pytest.mark.parametrize("labels", [None, torch.full((12,), -1)])
def test_losses_that_need_labels_say_so(labels, tmp_path, images, encoder):
    for job, arguments in (
        (trainer(tmp_path / "a", losstype="supcon"), (images, Victim(encoder), labels)),
        (trainer(tmp_path / "b", small(out_dim=16), "supervised"), (images, labels)),
    ):
        with pytest.raises(UserError, match="needs labels and the images have none"):
            (job.train if job.model.has_head else job.steal)(*arguments)
        assert not job.run.folder.exists()


def test_stealing_brings_the_copy_to_the_victim(tmp_path, images, encoder):
    with torch.no_grad():
        for _ in range(30):  # statistics of a network in use, so that answers differ from image to image
            encoder.train()(images / 255)
    victim = Victim(encoder)
    answers = victim.query(images)
    job = trainer(tmp_path, losstype="mse", epochs=30, batch_size=12, lr=3e-3)
    distances = []
    for _ in range(2):
        with torch.no_grad():
            distances.append((job.model.eval()(images / 255) - answers).square().mean().item())
        if len(distances) == 1:
            job.steal(images, victim)
    assert distances[1] < 0.5 * distances[0]


def test_plain_queries_are_the_images_and_the_copy_sees_them(tmp_path, images, encoder):
    """One epoch of one batch by mse against the step written out: no augmentation on either side."""
    model = small()
    expected = copy.deepcopy(model).train()
    trainer(tmp_path, model, losstype="mse", epochs=1, batch_size=12).steal(images, Victim(encoder))
    order = torch.randperm(12, generator=generator(0, "order", 0))
    with torch.no_grad():
        answers = encoder.eval()(images / 255)
    loss = STEAL_LOSSES["mse"](expected(images[order] / 255), answers[order])
    assert Run(tmp_path).records()[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_useaug_augments_the_copys_side_only(tmp_path, images, encoder):
    losses = {}
    for useaug in (False, True):
        victim = Victim(encoder)
        trainer(tmp_path / str(useaug), losstype="mse", useaug=useaug, epochs=1).steal(images, victim)
        losses[useaug] = Run(tmp_path / str(useaug)).records()[0]["loss"]
        plain = Victim(encoder)
        plain.query(images)
        assert victim.ledger.accounts["default"].images == plain.ledger.accounts["default"].images
    assert losses[True] != losses[False]


def test_released_recipe_asks_everything_in_every_epoch(tmp_path, images, encoder):
    for n_views, distinct in ((1, 12), (2, 72)):
        victim = Victim(encoder)
        trainer(tmp_path / str(n_views), epochs=3, recipe="released", n_views=n_views).steal(images, victim)
        assert victim.ledger.queries == 3 * 12 * n_views
        assert victim.ledger.distinct == distinct  # fresh views in every epoch


def test_checkpoint_keeps_the_ledger_and_what_was_queried(tmp_path, images, encoder):
    trainer(tmp_path).steal(images, Victim(encoder))
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert checkpoint["ledger"]["default"]["queries"] == 12
    assert checkpoint["query_digests"].shape == (12, 16)
    assert not any(".fc." in key for key in checkpoint["state_dict"])  # no head that was never trained


@pytest.mark.parametrize("theirs", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("ours", ["resnet18", "resnet34", "resnet50"])
def test_every_combination_of_architectures(ours, theirs, tmp_path, images):
    """Where the widths differ a linear map is trained and kept, and the copy's representation stays its own."""
    with seeded(0):
        victim, model = Victim(build_encoder(theirs)), build_copy(ours, {"resnet50": 2048}.get(theirs, 512))
    untrained = copy.deepcopy(model.state_dict())
    SimCLR(model, STEAL_LOSSES["mse"], settings(epochs=1, batch_size=2), Run(tmp_path), FP32).steal(images[:2], victim)
    loaded = load_encoder(tmp_path / "checkpoint.pth.tar")
    assert loaded.arch == ours
    with torch.no_grad():
        assert loaded(images[:1] / 255).shape == (1, {"resnet50": 2048}.get(ours, 512))
        assert loaded.output(images[:1] / 255).shape == (1, victim.dim)
    assert loaded.has_head == ((ours == "resnet50") != (theirs == "resnet50"))
    if loaded.has_head:
        assert isinstance(loaded.backbone.fc, torch.nn.Linear)
        assert not torch.equal(loaded.backbone.fc.weight, untrained["backbone.fc.weight"])


# ---- refusals ----


def test_batch_larger_than_the_data(tmp_path, images):
    with pytest.raises(UserError, match="batch size 13 is larger than the 12 images"):
        trainer(tmp_path / "run", small(out_dim=16), batch_size=13).train(images)
    assert not (tmp_path / "run").exists()


def test_victim_of_another_width(tmp_path, images):
    with pytest.raises(UserError, match="512 numbers, the copy gives 256"):
        trainer(tmp_path / "run").steal(images, Victim(build_encoder("resnet18")))
    assert not (tmp_path / "run").exists()


def test_budget_below_the_queries_stops_before_training(tmp_path, images, encoder):
    with pytest.raises(UserError, match="exceed the budget of 11"):
        trainer(tmp_path).steal(images, Victim(encoder, budget=11))
    assert not (tmp_path / "checkpoint.pth.tar").exists()


def test_non_finite_loss_stops_at_its_step(tmp_path, images, encoder):
    """The answer to one image of the second epoch's second batch is broken."""
    job = trainer(tmp_path, losstype="mse", epochs=3)
    original, steps = job.features, []

    def run(*args):
        steps.append(1)
        return original(*args) * (math.nan if len(steps) == 5 else 1)

    job.features = run
    with pytest.raises(UserError, match="loss is nan at step 2 of 3 in epoch 2"):
        job.steal(images, Victim(encoder))
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.parametrize("losstype", TRAIN_LOSSES)
def test_bf16_trains(losstype, tmp_path, images):
    precision = Precision("bf16", torch.device("cpu"))
    training = settings(epochs=1, n_views=2)
    job = SimCLR(small(out_dim=16), TRAIN_LOSSES[losstype], training, Run(tmp_path), precision)
    job.train(images[:4], torch.tensor([0, 1, 0, 1]))
    assert weights(tmp_path)["backbone.conv1.weight"].dtype == torch.float32
    assert math.isfinite(Run(tmp_path).records()[0]["loss"])


def test_defended_answers_are_computed_once_and_are_what_the_copy_learns(tmp_path, images, encoder):
    """Whatever the epochs: the copy of a victim that answers 2 to everything ends near 2."""
    for epochs in (1, 30):
        victim = Victim(encoder, budget=12, defences=[Applied(lambda answers: 2 * torch.ones_like(answers))])
        job = trainer(tmp_path / str(epochs), losstype="mse", epochs=epochs, lr=2e-2, flat_epochs=30)
        job.steal(images, victim)
        assert victim.defences[0].seen == victim.ledger.queries == 12
    with torch.no_grad():
        assert job.model.train()(images / 255).mean().item() == pytest.approx(2, abs=0.5)


def test_what_a_defence_remembers_of_released_epochs_is_not_made_up(tmp_path, images, encoder):
    def victim():
        return Victim(encoder, defences=build_defences(["buckets"], {}))

    trainer(tmp_path, recipe="released", epochs=1).steal(images, victim())
    with pytest.raises(UserError, match="drop --resume"):
        trainer(tmp_path, recipe="released", epochs=2, resume=True).steal(images, victim())
    finished = (tmp_path / "checkpoint.pth.tar").read_bytes()
    trainer(tmp_path, recipe="released", epochs=1, resume=True).steal(images, victim())  # nothing is left to do
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == finished


def test_a_killed_attack_on_a_defence_with_a_memory_ends_as_the_whole_one(tmp_path, images, encoder):
    """Poisoning remembers what was asked before the kill: its report and the copy are those of one run."""
    sent = images[[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]
    values = {"losstype": "mse", "epochs": 2}

    def victim():
        return Victim(encoder, budget=12, defences=build_defences(["poisoning"], {"poison_threshold": 0.99999}))

    whole = trainer(tmp_path / "whole", **values)
    whole.steal(sent, victim())
    job = kill_in_epoch(trainer(tmp_path / "cut", **values), epoch=1)
    with pytest.raises(Killed):
        job.steal(sent, victim())
    resumed = trainer(tmp_path / "cut", resume=True, **values)
    resumed.steal(sent, victim())
    assert 0 < whole.extra["met"]["poisoning_poisoned"] == resumed.extra["met"]["poisoning_poisoned"]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
