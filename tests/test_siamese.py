"""SimSiam, BYOL and MoCo: what their companions compute, against steps written out; how they go on and collapse."""

import copy
import functools
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import linear_eval
import run
import steal
from data_aug.augment import apply_views, draw_views, rows_of
from data_aug.datasets import DATASETS
from data_aug.images import Stored
from data_aug.recipes import VIEW_RECIPES
from loss import TRAIN_LOSSES
from models import load_encoder, projection_head, read_checkpoint
from simclr import SimCLR
from tests.conftest import made
from tests.networks import FP32, losses, same, small_encoder, trainer, weights
from tests.test_training import Killed, kill_in_epoch
from training.recipe import Recipe
from training.run import Run
from training.siamese import BYOL, SIAMESE_LOSSES, MoCo
from utils import UserError, generator, seeded

WIDTH = 16


def encoder(seed=1):
    """A small encoder with the head that its loss asks for, here one with a BatchNorm."""
    model = small_encoder(WIDTH, seed)
    with seeded(seed):
        model.backbone.fc = projection_head(model.dim, WIDTH, "mlp-bn")
    return model


def plainly(network, inputs):
    return network(inputs)


def pictures(count, seed=0):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def companion_state(folder):
    return read_checkpoint(folder / "checkpoint.pth.tar")["companion"]


# ---- what a companion gives ----


def test_simsiam_predicts_from_standardised_projections():
    """Each view by itself; the running statistics are those of two batches."""
    model, views = encoder().train(), (pictures(6), pictures(6, 1))
    companion = TRAIN_LOSSES["simsiam"].make_companion(model, 6, 6).train()
    by_hand = copy.deepcopy(model)
    shown, predictions, targets = companion.outputs(model, views, plainly)
    rows = []
    for view in views:
        z = by_hand.backbone.fc(by_hand(view))
        rows.append((z - z.mean(dim=0)) / torch.sqrt(z.var(dim=0, correction=0) + 1e-5))
    torch.testing.assert_close(shown, torch.cat(rows), rtol=1e-4, atol=1e-5)
    assert torch.equal(targets, shown)
    first, norm, _, last = companion.predictor
    assert (first.out_features, first.bias, last.out_features) == (WIDTH // 4, None, WIDTH)
    hidden = [F.batch_norm(F.linear(z, first.weight), None, None, norm.weight, norm.bias, True) for z in rows]
    expected = torch.cat([F.linear(F.relu(part), last.weight, last.bias) for part in hidden])
    torch.testing.assert_close(predictions, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.state_dict()["backbone.bn1.running_mean"], by_hand.backbone.bn1.running_mean)


def test_no_gradient_reaches_what_is_predicted():
    for name in ("simsiam", "byol"):
        model = encoder().train()
        companion = TRAIN_LOSSES[name].make_companion(model, 6, 6).train()
        _, predictions, targets = companion.outputs(model, (pictures(6), pictures(6, 1)), plainly)
        targets = targets.detach().requires_grad_()
        TRAIN_LOSSES[name](predictions, targets).backward()
        assert targets.grad is None, name
        assert model.backbone.conv1.weight.grad.abs().max() > 0


def test_byols_target_is_the_mean_of_the_encoders_that_it_followed():
    """The share that is kept by the published formula, weight by weight, over a run of five steps."""
    model = encoder()
    companion = BYOL(model, 6, 6, ema=0.9)
    expected = {name: value.clone() for name, value in model.named_parameters()}
    draws = torch.Generator().manual_seed(0)
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=draws)
        companion.after_step(model, step / 5)
        tau = 1 - (1 - 0.9) * (math.cos(math.pi * step / 5) + 1) / 2
        for name, parameter in model.named_parameters():
            expected[name] = tau * expected[name] + (1 - tau) * parameter.detach()
    for name, parameter in companion.target.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
        assert not parameter.requires_grad


def test_byols_target_sees_the_batch_as_the_encoder_does():
    """In training mode: by the batch's statistics, and with running statistics of its own."""
    model, views = encoder().train(), (pictures(6), pictures(6, 1))
    companion = BYOL(model, 6, 6).train()
    projections, predictions, targets = companion.outputs(model, views, plainly)
    torch.testing.assert_close(targets, projections)  # of the same weights, before the first step
    expected = torch.cat([companion.predictor(part) for part in projections.chunk(2)])
    torch.testing.assert_close(predictions, expected)
    assert companion.target.backbone.bn1.num_batches_tracked == 2
    companion.eval()
    assert not torch.allclose(companion.outputs(model, views, plainly)[2], targets, rtol=1e-2)


def test_biases_and_norms_of_byol_are_neither_decayed_nor_adapted():
    model = encoder()
    matrices, plain = BYOL(model, 6, 6).groups(model)
    assert {weight.ndim for weight in matrices["params"]} == {2, 4}
    assert {weight.ndim for weight in plain["params"]} == {1}
    assert (plain["plain"], plain["weight_decay"]) == (True, 0.0)
    of_predictor = 6  # two layers and a BatchNorm, a weight and a bias each
    assert len(matrices["params"]) + len(plain["params"]) == len([*model.parameters()]) + of_predictor


@pytest.mark.parametrize(("queue", "keys"), [(7, 3), (6, 3), (4, 4), (5, 12)])
def test_the_queue_has_the_last_keys(queue, keys):
    """Against a list from whose head the oldest are taken; more keys than places leave the last ones."""
    model = encoder()
    with seeded(0):
        companion = MoCo(model, 100, 4, ema=1.0, queue=queue, bn_groups=1)
    expected = [*companion.queue.clone()]
    for step in range(6):
        new = torch.randn(keys, WIDTH, generator=torch.Generator().manual_seed(step))
        companion._keys = new
        companion.after_step(model, 0.0)
        expected = [*expected, *new][-queue:]
        start = int(companion.oldest)
        assert torch.equal(companion.queue.roll(-start, dims=0), torch.stack(expected))
    assert MoCo(model, 3, 4, queue=50, bn_groups=1).queue.shape == (3, WIDTH)
    torch.testing.assert_close(MoCo(model, 9, 4, bn_groups=1).queue.norm(dim=1), torch.ones(9))


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_mocos_keys_are_normalised_with_other_images_than_their_queries(groups):
    """Each image's row is as batch norm over its group makes it; groups by the places in the batch, written out."""
    size = 12 if groups != 4 else 16
    model, views = encoder().train(), (pictures(size), pictures(size, 1))
    companion = MoCo(model, 50, size, queue=5, bn_groups=groups).train()
    by_hand = copy.deepcopy(model)
    shown, queries, keys = companion.outputs(model, views, plainly)
    assert torch.equal(shown, queries)
    assert torch.equal(keys[size:], companion.queue)
    of_query = [place % groups for place in range(size)]
    of_key = [(place + place // groups) % groups for place in range(size)]
    for rows, view, group in ((queries, views[0], of_query), (keys[:size], views[1], of_key)):
        for name in range(groups):
            places = [place for place in range(size) if group[place] == name]
            assert len(places) == size // groups
            expected = by_hand.project(view[places])
            expected = F.normalize(expected, dim=1) if rows is not queries else expected
            torch.testing.assert_close(rows[places], expected, rtol=1e-3, atol=1e-4)
    if size % groups**2 == 0:  # the images of a query's group are dealt evenly to the groups of keys
        pairs = Counter(zip(of_query, of_key, strict=True))
        assert set(pairs.values()) == {size // groups**2}
        assert len(pairs) == groups**2


def test_a_batch_without_such_groups_is_refused_in_one_line():
    for size, groups in ((12, 8), (8, 8), (10, 4)):
        with pytest.raises(UserError, match=f"a batch of {size} has no {groups} equal groups") as caught:
            MoCo(encoder(), 50, size, bn_groups=groups)
        assert "\n" not in str(caught.value)


# ---- trained by the loop ----


def batch_of(images, epoch=0):
    """The views of the whole set in an epoch, in the epoch's order, one tensor for each view."""
    order = torch.randperm(len(images), generator=generator(0, "order", epoch))
    table = draw_views(2 * len(images), 32, 32, 32, generator(0, "views", epoch), VIEW_RECIPES["simclr-cifar"])
    return apply_views(images[order].repeat(2, 1, 1, 1), table[rows_of(order, 2, len(images))]).chunk(2)


@pytest.mark.parametrize("name", SIAMESE_LOSSES)
def test_two_steps_are_those_written_out(name, tmp_path, images):
    """Two epochs of one batch by SGD: the encoder, and the companion with what follows it."""
    model = encoder()
    job = trainer(tmp_path, model, name, batch_size=12, optimizer="sgd", lr=0.05, momentum=0.5, flat_epochs=0)
    by_hand, companion = copy.deepcopy(model), copy.deepcopy(job.companion)
    job.train(Stored(images))
    by_hand.train(), companion.train()
    trained = [*by_hand.parameters(), *(weight for weight in companion.parameters() if weight.requires_grad)]
    speed = [torch.zeros_like(weight) for weight in trained]
    heads = {id(weight) for weight in companion.predictor.parameters()} if name == "simsiam" else set()
    for epoch, rate in enumerate((0.05, 0.025)):  # of a cosine over two epochs
        _, *compared = companion.outputs(by_hand, batch_of(images, epoch), plainly)
        loss = TRAIN_LOSSES[name](*compared)
        assert losses(tmp_path)[epoch] == pytest.approx(loss.item(), rel=1e-3)
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for weight, gradient, fast in zip(trained, gradients, speed, strict=True):
                decay = 0.0 if name == "byol" and weight.ndim == 1 else 1e-4
                fast.mul_(0.5).add_(gradient + decay * weight)
                weight -= (0.05 if id(weight) in heads else rate) * fast
        if name != "simsiam":
            companion.after_step(by_hand, epoch / 2)
    for found, expected in ((weights(tmp_path), by_hand), (companion_state(tmp_path), companion)):
        assert found.keys() == expected.state_dict().keys()
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-2, atol=2e-4, msg=key)


@pytest.mark.parametrize("name", SIAMESE_LOSSES)
def test_resumed_training_is_bit_identical_with_its_companion(name, tmp_path, images):
    def job(folder, **more):
        return trainer(tmp_path / folder, encoder(), name, epochs=4, **more)

    job("whole").train(Stored(images))
    with pytest.raises(Killed):
        kill_in_epoch(job("cut"), epoch=2).train(Stored(images))
    before = companion_state(tmp_path / "cut")
    job("cut", resume=True).train(Stored(images))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert same(companion_state(tmp_path / "whole"), companion_state(tmp_path / "cut"))
    assert not same(before, companion_state(tmp_path / "cut"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_collapse_is_named(tmp_path, images):
    """Projections that are all the same but for rounding, as without SimSiam's last BatchNorm they may be."""
    model = small_encoder(WIDTH)
    job = trainer(tmp_path, model, "simsiam", lr=1e-6)
    job.companion.norm = torch.nn.Identity()
    with torch.no_grad():
        model.backbone.fc[-1].weight.mul_(1e-6)
    with pytest.raises(UserError, match="collapsed to nearly a point in epoch 1") as caught:
        job.train(Stored(images))
    assert "\n" not in str(caught.value)


# ---- as a user runs them ----

SHAPES = ("--dataset", "shapes", "--arch", "resnet10w32", "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """The embedded data set takes a second to draw: once is enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "shapes", functools.cache(DATASETS["shapes"]))
        yield


def test_a_victim_by_byol_learns_and_is_stolen(call, tmp_path):
    """Some seconds of training beat the untrained encoder; one command each trains, steals and judges."""
    train = ("--losstype", "byol", "--num-train", "512", "-b", "32", "--ema", "0.9", "--epochs", "6")
    fast = ("--optimizer", "adam", "--lr", "0.002", "--wd", "1e-4", "--warmup-epochs", "0")
    code, out, err = call(run, *SHAPES, *train, *fast)
    assert code == 0, err
    victim = made(out)
    assert companion_state(tmp_path / victim.rpartition("/")[0]).keys() > {"predictor.0.weight"}
    judge = ("--dataset-test", "shapes", "-n", "500", "--num-test", "500", "--device", "cpu")
    scores = {}
    for kind in ("victim", "random"):
        named = ("--victim", victim) if kind == "victim" else SHAPES[2:4]
        code, _, err = call(linear_eval, *judge, "--modeltype", kind, *named)
        assert code == 0, err
        scores[kind] = json.loads((tmp_path / "checkpoints/results.jsonl").read_text().splitlines()[-1])
    assert scores["victim"]["top1_converged"] > scores["random"]["top1_converged"] + 3
    copied = ("--datasetsteal", "shapes", "--num_queries", "64", "--epochs", "1", "-b", "16", "--losstype", "mse")
    code, out, err = call(steal, "--victim", victim, "--archstolen", "resnet10w32", *copied, "--device", "cpu")
    assert code == 0, err
    assert load_encoder(made(out))(torch.rand(2, 3, 32, 32)).shape == (2, 256)


@pytest.mark.parametrize("name", SIAMESE_LOSSES)
def test_what_they_cannot_be_combined_with_is_refused(name, refused):
    for flags in (("--recipe", "released"), ("--watermark", "True")):
        assert f"{flags[0]} has no effect with the loss {name}" in refused(run, *SHAPES, "--losstype", name, *flags)
    assert name in refused(steal, *SHAPES, "--losstype", name)


@pytest.mark.parametrize("name", SIAMESE_LOSSES)
def test_without_their_companion_they_are_refused(name, tmp_path):
    model = encoder()
    with pytest.raises(UserError, match=r"give SimCLR what loss.make_companion makes"):
        SimCLR(model, TRAIN_LOSSES[name].bind({}), Recipe(epochs=1), Run(tmp_path, FP32)).train(
            Stored((255 * pictures(8)).byte())
        )
