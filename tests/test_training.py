"""The training loop: its schedule, the order of the images, and how it goes on after an interruption."""

import itertools
import math

import numpy as np
import pytest
import torch

import run
import steal as steal_script
from attacks import Attack, victims
from attacks.queries import queries_sent
from data_aug.augment import apply_views, draw_views
from data_aug.folders import resize
from data_aug.images import Stored
from data_aug.sizes import settle_size
from defenses import DEFENCES
from models import read_checkpoint
from simclr import SimCLR
from tests.conftest import SMALL, Applied
from tests.networks import FP32, losses, same, small_encoder, steal, trainer, weights
from training.loop import index_of_epoch
from training.recipe import Recipe, learning_rate
from training.record import Record
from training.run import Run
from utils import UserError, generator
from victim import Victim


@pytest.fixture
def encoder():
    return small_encoder(16, seed=0)


# ---- the schedule ----


def test_standard_schedule_ends_near_zero_and_never_rises():
    recipe = Recipe(epochs=100, lr=1.0)
    rates = [learning_rate(recipe, epoch, steps_per_epoch=35) for epoch in range(100)]
    assert rates[:11] == [1.0] * 11
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert rates[11] == pytest.approx(0.5 * (1 + math.cos(math.pi / 90)))
    assert rates[99] < 1e-3


def test_released_schedule_is_that_of_2022():
    """The 2022 code's figures: 35 batches give 0 in epoch 45, the full rate in 80, 43 % in 99; 195 0.2 % in 199."""
    recipe = Recipe(epochs=100, lr=1.0, recipe="released")
    assert learning_rate(recipe, 45, 35) == pytest.approx(0, abs=1e-9)
    assert learning_rate(recipe, 80, 35) == pytest.approx(1)
    assert learning_rate(recipe, 99, 35) == pytest.approx(0.43, abs=0.005)
    assert learning_rate(Recipe(epochs=200, lr=1.0, recipe="released"), 199, 195) == pytest.approx(0.002, abs=5e-4)


def test_flat_epochs():
    assert learning_rate(Recipe(epochs=5, lr=1.0, flat_epochs=1), 1, 9) == 1.0
    assert learning_rate(Recipe(epochs=5, lr=1.0, flat_epochs=1), 3, 9) == pytest.approx(0.5)
    assert learning_rate(Recipe(epochs=5, lr=1.0), 4, 9) == 1.0


def test_constant_schedule():
    for name in ("standard", "released"):
        recipe = Recipe(epochs=40, lr=0.2, schedule="constant", recipe=name)
        assert [learning_rate(recipe, epoch, 3) for epoch in range(40)] == [0.2] * 40


@pytest.mark.parametrize("warmup", [0.25, 1, 2.5, 4, 40])
@pytest.mark.parametrize("flat", [0, 3])
def test_warm_up_is_the_mean_of_a_line_over_each_epoch(warmup, flat):
    """A line from 0 that reaches 1 after `warmup` epochs, at 10,000 points of each epoch; then the cosine alone."""
    recipe = Recipe(epochs=20, lr=0.3, flat_epochs=flat, warmup_epochs=warmup)
    begin = max(flat, warmup)
    for epoch in range(20):
        line = np.minimum(1, (epoch + (np.arange(10_000) + 0.5) / 10_000) / warmup).mean()
        fallen = 0.5 * (1 + math.cos(math.pi * max(0, epoch - begin) / max(1, 20 - begin)))
        assert learning_rate(recipe, epoch, 7) == pytest.approx(0.3 * line * fallen, rel=1e-6)


def test_without_warm_up_the_schedules_are_as_before():
    for values in ({}, {"schedule": "constant"}, {"recipe": "released"}):
        warm = Recipe(epochs=30, flat_epochs=5, warmup_epochs=2, **values)
        plain = Recipe(epochs=30, flat_epochs=5, **values)
        rates = [(learning_rate(warm, epoch, 9), learning_rate(plain, epoch, 9)) for epoch in range(30)]
        assert rates[:2] == [(pytest.approx(plain.lr / 4), plain.lr), (pytest.approx(plain.lr * 3 / 4), plain.lr)]
        assert all(a == b for a, b in rates[2:])


@pytest.mark.parametrize("warmup", [0.0, 1.5])
def test_each_epoch_is_trained_at_its_rate(warmup, tmp_path, images):
    job = trainer(tmp_path, small_encoder(16), epochs=4, flat_epochs=0, warmup_epochs=warmup)
    job.train(Stored(images))
    rates = [line["lr"] for line in Run(tmp_path, FP32).lines()]
    assert rates == pytest.approx([learning_rate(job.recipe, epoch, 3) for epoch in range(4)])


# ---- the order of the images ----


@pytest.fixture
def numbered():
    """Twelve images that can be told by their first pixel: image i has 20 * i there."""
    images = torch.zeros(12, 3, 32, 32, dtype=torch.uint8)
    images[:, :, :4] = 20 * torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1)
    images[:, 0, 4:] = torch.randint(0, 256, (12, 28, 32), dtype=torch.uint8, generator=generator(0, "test"))
    return images


def orders(folder, images, encoder, **values):
    """Which images are shown in each step of each epoch, of 3 steps of 4 images, while a copy is trained."""
    job, shown = trainer(folder, losstype="mse", **values), []
    original = job.features

    def spy(network, inputs, views=1):
        shown.append((inputs[:, 0, 0, 0] * 255 / 20).round().long())
        return original(network, inputs, views)

    job.features = spy
    steal(job, images, Victim(encoder))
    return torch.cat(shown).view(-1, 12)


def test_every_epoch_shows_all_images_in_an_order_of_its_own(tmp_path, numbered, encoder):
    found = orders(tmp_path, numbered, encoder, epochs=4)
    assert len(found) == 4
    assert all(order.sort().values.tolist() == list(range(12)) for order in found)
    assert len({tuple(order.tolist()) for order in found}) == 4


def test_the_order_follows_from_the_seed_and_the_epoch(tmp_path, numbered, encoder):
    for seed in (0, 1):
        found = orders(tmp_path / str(seed), numbered, encoder, epochs=3, seed=seed)
        expected = [torch.randperm(12, generator=generator(seed, "order", epoch)) for epoch in range(3)]
        assert torch.equal(found, torch.stack(expected))
    again = orders(tmp_path / "again", numbered, encoder, epochs=3, seed=1)
    assert torch.equal(found, again)


def shown_sizes(job, train):
    """The images, by their first pixel, that each step of a training shows."""
    shown, original = [], job.features
    job.features = lambda network, inputs, views=1: (shown.append(inputs[:, 0, 0, 0]), original(network, inputs))[1]
    train(job)
    return shown


def test_a_copy_sees_all_images_in_each_epoch(tmp_path, numbered, encoder):
    """Two batches of 5 and the two images that they leave over."""
    job = trainer(tmp_path, losstype="mse", epochs=3, batch_size=5)
    shown = shown_sizes(job, lambda job: steal(job, numbered, Victim(encoder)))
    assert [len(part) for part in shown] == [5, 5, 2] * 3
    assert all(len(epoch.unique()) == 12 for epoch in torch.cat(shown).view(3, 12))
    assert [line["lr"] for line in Run(tmp_path, FP32).lines()] == [1e-3] * 3


def test_a_victims_images_beyond_the_last_whole_batch_take_turns(tmp_path, images):
    job = trainer(tmp_path, small_encoder(16), "supervised", epochs=6, batch_size=5)
    shown = shown_sizes(job, lambda job: job.train(Stored(images), torch.arange(12) % 3, views=1))
    assert [len(part) for part in shown] == [5] * 12
    indices = [torch.cat([*index_of_epoch(job.recipe, epoch, 12, drop_last=True)]) for epoch in range(6)]
    assert all(len(epoch.unique()) == 10 for epoch in indices)
    assert len(torch.cat(indices).unique()) == 12


@pytest.mark.parametrize(
    ("count", "sizes"), [(300, [256, 44]), (512, [256, 256]), (513, [256, 256]), (514, [256, 256, 2])]
)
def test_the_last_batch_is_smaller_but_never_a_single_image(count, sizes):
    assert [len(part) for part in index_of_epoch(Recipe(), 0, count)] == sizes


# With 9 images to query, 2 whole batches of 4: the half period, whatever the budget.
@pytest.mark.parametrize(("queries", "sizes"), [(6, [4, 2]), (9, [4, 4])])
def test_the_released_recipe_goes_through_the_query_set_in_its_order(queries, sizes, tmp_path, numbered, encoder):
    job = trainer(tmp_path, losstype="mse", epochs=4, flat_epochs=0, lr=1.0, optimizer="sgd", recipe="released")
    job.run.record.query_set = {"dataset": "tiny", "split": "test", "images": queries, "available": 9}
    shown = shown_sizes(job, lambda job: steal(job, numbered[:queries], Victim(encoder)))
    assert [len(part) for part in shown] == sizes * 4
    expected = (20 * torch.arange(sum(sizes)) / 255).repeat(4)
    torch.testing.assert_close(torch.cat(shown), expected)
    rates = [line["lr"] for line in Run(tmp_path, FP32).lines()]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * epoch / 2)) for epoch in range(4)])


# ---- STL-10 under the released recipe ----


@pytest.fixture
def stl10(write_npz, tmp_path):
    """A data root with a little STL-10 in its own size; its first images, uint8 (16, 3, 96, 96)."""
    with np.load(write_npz("stl10", 16, 8, size=96, folder=tmp_path)) as arrays:
        images = arrays["x_train"]
        np.savez(tmp_path / "stl10.npz", **arrays, x_unlabeled=images)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_released_views_of_stl10_are_cut_from_its_own_size(stl10, tmp_path, call, monkeypatch):
    """A victim's, from 96 x 96 to 32 x 32; the standard recipe makes the images smaller first."""
    shown = []
    original = SimCLR.features
    monkeypatch.setattr(
        SimCLR, "features", lambda job, network, x, views=1: (shown.append(x), original(job, network, x, views))[1]
    )
    line = ("-data", tmp_path, "--dataset", "stl10", *SMALL, "--precision", "fp32", "--epochs", "1", "-b", "16")
    for recipe in ("standard", "released"):
        assert call(run, *line, "--recipe", recipe)[0] == 0
    order = torch.cat([*index_of_epoch(Recipe(batch_size=16), 0, 16)])
    for x, images in zip(shown, (resize(stl10, 32), stl10), strict=True):
        table = draw_views(32, *images.shape[2:], 32, generator(0, "views", 0))
        expected = apply_views(images[order].repeat(2, 1, 1, 1), table[torch.cat([order, order + 16])])
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(("n_views", "side"), [(1, 32), (2, 96)])
def test_released_queries_of_stl10_are_cut_from_its_own_size(n_views, side, stl10, tmp_path):
    """Where views are sent; else the images are made smaller, as the victim takes them."""
    line = f"-data {tmp_path} --datasetsteal stl10 --recipe released --num_queries {6 * n_views} --n-views {n_views}"
    command = steal_script.parse([*line.split(), "--dataset", "cifar10", "--losstype", "mse"])
    settle_size(command)  # as a victim's file does
    images, _, record = victims.choose(command, 6, lambda images: None, FP32)
    assert torch.equal(images.tensor, stl10[:6] if side == 96 else resize(stl10[:6], 32))
    sent = queries_sent(images, command[Attack], generator(0, "query views", 0))
    assert sent.tensor.shape == (6 * n_views, 3, 32, 32)
    assert (record.query_set["images"], record.query_set["available"]) == (6, 16)


# ---- going on after an interruption ----

RDA = {"n_views": 5, "queryaug": True, "prototype": True, "useaug": True, "copy_views": 3}


class Killed(Exception):
    pass


def kill_in_epoch(job, epoch):
    """As a kill does: the run ends in the middle of an epoch, after the earlier ones were saved."""
    original = job.features

    def run(*args):
        if len(job.run.lines()) == epoch:
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
    values = {"losstype": losstype, "epochs": 3}
    steal(trainer(tmp_path / "whole", **values), images, Victim(encoder, budget=sent), **more)
    job = kill_in_epoch(trainer(tmp_path / "cut", **values), epoch=1)
    with pytest.raises(Killed):
        steal(job, images, Victim(encoder, budget=sent), **more)
    assert read_checkpoint(tmp_path / "cut" / "checkpoint.pth.tar")["epoch"] == 1
    victim = Victim(encoder, budget=sent)
    victim.defences.append(Applied())
    steal(trainer(tmp_path / "cut", resume=True, **values), images, victim, **more)
    assert victim.defences[0].seen == 0
    assert victim.ledger.queries == sent
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [line["epoch"] for line in Run(tmp_path / "cut", FP32).lines()] == [0, 1, 2]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob("answers*"))


@pytest.mark.parametrize("losstype", ["infonce", "supervised"])
def test_resumed_training_is_bit_identical(losstype, tmp_path, images):
    """By both kinds of random views."""
    labels = torch.arange(12) % 3

    def job(name, **more):
        return trainer(tmp_path / name, small_encoder(16), losstype, epochs=3, **more)

    job("whole").train(Stored(images), labels)
    with pytest.raises(Killed):
        kill_in_epoch(job("cut"), epoch=1).train(Stored(images), labels)
    job("cut", resume=True).train(Stored(images), labels)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path, images, capsys):
    trainer(tmp_path, small_encoder(16), epochs=1).train(Stored(images))
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    trainer(tmp_path, small_encoder(16), epochs=1, resume=True).train(Stored(images))
    assert "has all 1 epochs already" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


def test_a_finished_copy_that_is_resumed_keeps_its_record(tmp_path, images, encoder):
    """What it cost is known without asking again."""
    whole = trainer(tmp_path)
    steal(whole, images, Victim(encoder, defences=[DEFENCES["rounding"](), DEFENCES["detection"]()]))
    again, victim = trainer(tmp_path, resume=True), Victim(encoder)
    steal(again, images, victim)
    assert victim.ledger.queries == 0
    assert again.run.record.figures() == whole.run.record.figures()
    assert again.run.record.figures()["queries"] == 12
    assert again.run.record.defence_report.keys() == {
        f"detection_{name}" for name in ("nearest", "coverage", "normality")
    }


def test_a_record_of_2025_has_its_defences_report_under_another_name():
    digests = torch.zeros(2, 16, dtype=torch.uint8)
    record = Record.of({"met": {"poisoning_poisoned": 3.0}, "ledger": {}, "query_digests": digests})
    assert record.defence_report == {"poisoning_poisoned": 3.0}
    assert record.state_dict().keys() == {"query_digests", "defence_report"}
    assert Record.of({"met": {"a": 1.0}, "defence_report": {"a": 2.0}}).defence_report == {"a": 2.0}


def test_resuming_against_a_changed_victim_is_refused(tmp_path, images, encoder):
    steal(trainer(tmp_path, epochs=1), images, Victim(encoder))
    with pytest.raises(UserError, match="victim has changed"):
        steal(trainer(tmp_path, epochs=2, resume=True), images, Victim(small_encoder(seed=9)))


def test_what_a_defence_remembers_of_released_epochs_is_not_made_up(tmp_path, images, encoder):
    def victim():
        return Victim(encoder, defences=[DEFENCES["buckets"]()])

    steal(trainer(tmp_path, recipe="released", epochs=1), images, victim())
    with pytest.raises(UserError, match="drop --resume"):
        steal(trainer(tmp_path, recipe="released", epochs=2, resume=True), images, victim())
    finished = (tmp_path / "checkpoint.pth.tar").read_bytes()
    # Nothing is left to do.
    steal(trainer(tmp_path, recipe="released", epochs=1, resume=True), images, victim())
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == finished


def test_a_killed_attack_on_a_defence_with_a_memory_ends_as_the_whole_one(tmp_path, images, encoder):
    """Poisoning remembers what was asked before the kill: its report and the copy are those of one run."""
    sent = images[[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]
    values = {"losstype": "mse", "epochs": 2}

    def victim():
        return Victim(encoder, budget=12, defences=[DEFENCES["poisoning"](poison_threshold=0.99999)])

    whole = trainer(tmp_path / "whole", **values)
    steal(whole, sent, victim())
    job = kill_in_epoch(trainer(tmp_path / "cut", **values), epoch=1)
    with pytest.raises(Killed):
        steal(job, sent, victim())
    resumed = trainer(tmp_path / "cut", resume=True, **values)
    steal(resumed, sent, victim())
    reports = [job.run.record.defence_report["poisoning_poisoned"] for job in (whole, resumed)]
    assert 0 < reports[0] == reports[1]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_non_finite_loss_stops_at_its_step(tmp_path, images, encoder):
    """The answer to one image of the second epoch's second batch is broken."""
    job = trainer(tmp_path, losstype="mse", epochs=3)
    original, steps = job.features, []

    def run(*args):
        steps.append(1)
        return original(*args) * (math.nan if len(steps) == 5 else 1)

    job.features = run
    with pytest.raises(UserError, match="loss is nan at step 2 of 3 in epoch 2"):
        steal(job, images, Victim(encoder))
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
