"""The trainer: what it computes in a step, what it asks of a victim and keeps, and what it refuses."""

import copy
import dataclasses
import math

import pytest
import torch

from data_aug.augment import apply_views, draw_views, rows_of
from data_aug.images import Stored, Streamed, Views, open_pictures
from loss import STEAL_LOSSES, TRAIN_LOSSES, nt_xent
from models import build_copy, build_encoder, load_encoder, read_checkpoint
from simclr import SimCLR
from tests.conftest import Applied
from tests.networks import FP32, losses, same, small_encoder, steal, trainer, weights
from training.recipe import Recipe
from training.run import Run
from utils import Precision, UserError, generator, seeded
from victim import Victim, digest_tensor, unpack_digests

LABELS = torch.arange(12) % 3


@pytest.fixture
def encoder():
    return small_encoder(16, seed=0)


# ---- training ----


def views_of(images, index, views, epoch=0, seed=0):
    """The random views of the images at these indices in an epoch: rows of the table that is drawn for all of them."""
    table = draw_views(views * len(images), 32, 32, 32, generator(seed, "views", epoch))
    return apply_views(images[index].repeat(views, 1, 1, 1), table[rows_of(index, views, len(images))])


def test_training_step_is_the_loss_of_two_views_and_adam(tmp_path, images):
    """One epoch of one batch against the same step written out."""
    model = small_encoder(16)
    expected = copy.deepcopy(model)
    trainer(tmp_path, model, epochs=1, batch_size=12).train(Stored(images))

    order = torch.randperm(12, generator=generator(0, "order", 0))
    expected.train()
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3, weight_decay=1e-4)
    loss = nt_xent(expected.project(views_of(images, order, 2)), temperature=0.07)
    loss.backward()
    optimizer.step()
    state = weights(tmp_path)
    for name, parameter in expected.named_parameters():
        # Adam's first step is lr times the gradient's sign, and rounding turns the sign of a gradient near zero.
        differs = (state[name] - parameter.detach()).abs() > 2e-4
        assert differs.float().mean() < 0.02, name
    assert losses(tmp_path)[0] == pytest.approx(loss.item(), rel=1e-3)


def test_training_lowers_the_loss(tmp_path, images):
    trainer(tmp_path, small_encoder(16), epochs=8, batch_size=12).train(Stored(images))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_same_seed_same_weights_other_seed_others(tmp_path, images):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer(tmp_path / name, small_encoder(16), seed=seed, epochs=1).train(Stored(images))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_streamed_images_train_as_stored_ones_do(tmp_path, write_npz):
    pictures = open_pictures(f"npz:{write_npz(train=14)}", tmp_path, "train")
    streamed = Streamed(Views(pictures, "center", 32), torch.arange(2, 14), workers=0)
    (everything,) = streamed.batches([torch.arange(12)], torch.device("cpu"))
    for name, images in (("stored", Stored(everything.images)), ("streamed", streamed)):
        trainer(tmp_path / name, small_encoder(16)).train(images)
    assert same(weights(tmp_path / "stored"), weights(tmp_path / "streamed"))


def test_checkpoint_reads_back_as_an_encoder(tmp_path, images):
    with seeded(1):
        model = build_encoder("resnet10w32", 16)
    job = trainer(tmp_path, model, epochs=1)
    job.train(Stored(images))
    loaded = load_encoder(tmp_path / "checkpoint.pth.tar")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images / 255), job.model.eval()(images / 255), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("losstype", TRAIN_LOSSES)
@pytest.mark.parametrize("views", [1, 2, 3])
def test_every_loss_trains(losstype, views, tmp_path, images):
    job = trainer(tmp_path / "run", small_encoder(16), losstype)
    before = copy.deepcopy(job.model.state_dict())
    if views < TRAIN_LOSSES[losstype].min_views:
        with pytest.raises(UserError, match="--n-views 1 is too few, give 2 or more"):
            job.train(Stored(images), LABELS, views)
        assert not (tmp_path / "run").exists()
        return
    job.train(Stored(images), LABELS, views)
    assert not same(before, weights(tmp_path / "run"))
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))


@pytest.mark.parametrize("losstype", TRAIN_LOSSES)
def test_bf16_trains(losstype, tmp_path, images):
    precision = Precision("bf16", torch.device("cpu"))
    job = trainer(tmp_path, small_encoder(16), losstype, precision=precision, epochs=1)
    job.train(Stored(images[:4]), torch.tensor([0, 1, 0, 1]))
    assert weights(tmp_path)["backbone.conv1.weight"].dtype == torch.float32
    assert math.isfinite(losses(tmp_path)[0])


# ---- stealing ----


@pytest.mark.parametrize("losstype", STEAL_LOSSES)
@pytest.mark.parametrize("n_views", [1, 2])
def test_every_loss_steals_and_each_query_is_made_once(losstype, n_views, tmp_path, images, encoder):
    """With 1 and 2 views, or it refuses in one line before anything is asked or written."""
    victim = Victim(encoder, budget=12 * n_views)
    useaug = STEAL_LOSSES[losstype].plain_first
    job = trainer(tmp_path / "run", losstype=losstype)
    attack = {"n_views": n_views, "useaug": useaug, "copy_views": 2}
    before = copy.deepcopy(job.model.state_dict())
    if n_views < STEAL_LOSSES[losstype].min_views or (useaug and n_views > 1):
        with pytest.raises(UserError, match=r"give (2 or more|--n-views 1)$"):
            steal(job, images, victim, LABELS, **attack)
        assert victim.ledger.queries == 0
        assert not (tmp_path / "run").exists()
        return
    steal(job, images, victim, LABELS, **attack)
    assert victim.ledger.queries == 12 * n_views
    assert victim.ledger.distinct == 12 * n_views
    assert not same(before, weights(tmp_path / "run"))
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))


def test_stealing_brings_the_copy_to_the_victim(tmp_path, images, encoder):
    with torch.no_grad():
        for _ in range(30):  # statistics of a network in use, so that answers differ from image to image
            encoder.train()(images / 255)
    victim = Victim(encoder)
    answers = victim.query(images)
    job = trainer(tmp_path, losstype="mse", epochs=60, batch_size=12, lr=1e-2)
    distances = []
    for _ in range(2):
        with torch.no_grad():
            distances.append((job.model.eval()(images / 255) - answers).square().mean().item())
        if len(distances) == 1:
            steal(job, images, victim)
    assert distances[1] < 0.5 * distances[0]


def test_plain_queries_are_the_images_and_the_copy_sees_them(tmp_path, images, encoder):
    """One epoch of one batch by mse against the step written out: no augmentation on either side."""
    model = small_encoder()
    expected = copy.deepcopy(model).train()
    steal(trainer(tmp_path, model, losstype="mse", epochs=1, batch_size=12), images, Victim(encoder))
    order = torch.randperm(12, generator=generator(0, "order", 0))
    with torch.no_grad():
        answers = encoder.eval()(images / 255)
    loss = STEAL_LOSSES["mse"](expected(images[order] / 255), answers[order])
    assert losses(tmp_path)[0] == pytest.approx(loss.item(), rel=1e-4)


def test_useaug_augments_the_copys_side_only(tmp_path, images, encoder):
    found = {}
    for useaug in (False, True):
        victim = Victim(encoder)
        steal(trainer(tmp_path / str(useaug), losstype="mse", epochs=1), images, victim, useaug=useaug)
        found[useaug] = losses(tmp_path / str(useaug))[0]
        plain = Victim(encoder)
        plain.query(images)
        assert victim.ledger.accounts["default"].images == plain.ledger.accounts["default"].images
    assert found[True] != found[False]


@pytest.mark.parametrize("attack", [{"useaug": True}, {"queryaug": True, "useaug": True, "copy_views": 3}], ids=str)
def test_useaug_shows_the_copy_other_views_in_every_epoch(attack, tmp_path, images, encoder):
    """The views of the epoch's table, never what the victim was sent; without it the same pixels in all epochs."""
    shown = []

    def run(name, **values):
        shown.clear()
        job = trainer(tmp_path / name, losstype="mse", epochs=3, batch_size=12)
        original = job.features
        job.features = lambda network, inputs, views=1: (shown.append(inputs), original(network, inputs, views))[1]
        steal(job, images, Victim(encoder), **values)
        order = [torch.randperm(12, generator=generator(0, "order", epoch)) for epoch in range(3)]
        return order, [*shown]

    views = attack.get("copy_views", 1)
    order, own = run("own", **attack)
    for epoch in range(3):
        torch.testing.assert_close(own[epoch], views_of(images, order[epoch], views, epoch))
    by_image = [epoch.view(views, 12, -1)[:, order[number].argsort()] for number, epoch in enumerate(own)]
    order, sent = run("sent", queryaug=attack.get("queryaug"))
    sent = [epoch.view(12, -1)[order[number].argsort()] for number, epoch in enumerate(sent)]
    assert torch.equal(sent[0], sent[1])
    for number in range(12):
        rows = torch.cat([epoch[:, number] for epoch in by_image] + [sent[0][None, number]])
        assert len(rows.unique(dim=0)) == 3 * views + 1


def test_released_recipe_asks_everything_in_every_epoch(tmp_path, images, encoder):
    for n_views, distinct in ((1, 12), (2, 72)):
        victim = Victim(encoder)
        steal(trainer(tmp_path / str(n_views), epochs=3, recipe="released"), images, victim, n_views=n_views)
        assert victim.ledger.queries == 3 * 12 * n_views
        assert victim.ledger.distinct == distinct  # fresh views in every epoch


def test_checkpoint_keeps_the_ledger_and_what_was_queried(tmp_path, images, encoder):
    steal(trainer(tmp_path), images, Victim(encoder))
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert checkpoint["ledger"]["default"]["queries"] == 12
    assert checkpoint["query_digests"].shape == (12, 16)
    assert not any(".fc." in key for key in checkpoint["state_dict"])  # no head that was never trained


def test_an_attacker_who_chooses_has_the_labels_and_the_record_of_its_choice(tmp_path, images, encoder):
    """8 of 12 images are asked: their labels go with their answers, and the checkpoint says which they were."""
    found = {}

    def loss(copy, victim, labels):
        found.update(zip(labels.tolist(), victim, strict=True))
        return copy.square().mean()

    job = trainer(tmp_path, losstype="supcon", epochs=1)
    job.loss = dataclasses.replace(job.loss, function=loss)
    job.run.record.query_set, job.run.record.query_indices = {"images": 12}, torch.arange(100, 112)
    victim = Victim(encoder, budget=8)
    steal(job, images, victim, torch.arange(12), max_coverage=100.0)
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth.tar")
    asked = (checkpoint["query_indices"] - 100).tolist()
    assert (len(found), victim.ledger.queries, checkpoint["query_set"]) == (8, 8, {"images": 8})
    assert sorted(found) == asked != list(range(8))
    assert torch.equal(checkpoint["query_digests"], digest_tensor(images[asked]))
    assert victim.ledger.accounts["default"].images == set(unpack_digests(checkpoint["query_digests"]))
    answers = Victim(encoder).query(images)
    for label, row in found.items():
        torch.testing.assert_close(row, answers[label], rtol=1e-4, atol=1e-5)


# ResNet-34 is as wide as ResNet-18.
ARCHES = ["resnet18", pytest.param("resnet34", marks=pytest.mark.slow), "resnet50"]


@pytest.mark.parametrize("theirs", ARCHES)
@pytest.mark.parametrize("ours", ARCHES)
def test_every_combination_of_architectures(ours, theirs, tmp_path, images):
    """Where the widths differ a linear map is trained and kept, and the copy's representation stays its own."""
    images = images[:2, :, :16, :16]
    with seeded(0):
        victim, model = Victim(build_encoder(theirs)), build_copy(ours, {"resnet50": 2048}.get(theirs, 512))
    untrained = copy.deepcopy(model.backbone.fc.state_dict())
    recipe = Recipe(epochs=1, batch_size=2, optimizer="sgd", momentum=0.0)  # whose state is small
    steal(SimCLR(model, STEAL_LOSSES["mse"], recipe, Run(tmp_path, FP32)), images, victim)
    loaded = load_encoder(tmp_path / "checkpoint.pth.tar")
    assert loaded.arch == ours
    with torch.no_grad():
        assert loaded(images[:1] / 255).shape == (1, {"resnet50": 2048}.get(ours, 512))
        assert loaded.output(images[:1] / 255).shape == (1, victim.dim)
    assert loaded.has_head == ((ours == "resnet50") != (theirs == "resnet50"))
    if loaded.has_head:
        assert isinstance(loaded.backbone.fc, torch.nn.Linear)
        assert not torch.equal(loaded.backbone.fc.weight, untrained["weight"])


def test_defended_answers_are_computed_once_and_are_what_the_copy_learns(tmp_path, images, encoder):
    """Whatever the epochs: the copy of a victim that answers 2 to everything ends near 2."""
    for epochs in (1, 30):
        victim = Victim(encoder, budget=12, defences=[Applied(lambda answers: 2 * torch.ones_like(answers))])
        job = trainer(tmp_path / str(epochs), losstype="mse", epochs=epochs, lr=6e-2, flat_epochs=30)
        steal(job, images, victim)
        assert victim.defences[0].seen == victim.ledger.queries == 12
    with torch.no_grad():
        assert job.model.train()(images / 255).mean().item() == pytest.approx(2, abs=0.5)


# ---- refusals ----


@pytest.mark.parametrize("labels", [None, torch.full((12,), -1)])
def test_losses_that_need_labels_say_so(labels, tmp_path, images, encoder):
    copy_job = trainer(tmp_path / "a", losstype="supcon")
    with pytest.raises(UserError, match="needs labels and the images have none"):
        steal(copy_job, images, Victim(encoder), labels)
    victim_job = trainer(tmp_path / "b", small_encoder(16), "supervised")
    with pytest.raises(UserError, match="needs labels and the images have none"):
        victim_job.train(Stored(images), labels)
    assert not any(job.run.folder.exists() for job in (copy_job, victim_job))


def test_batch_larger_than_the_data(tmp_path, images):
    with pytest.raises(UserError, match="batch size 13 is larger than the 12 images"):
        trainer(tmp_path / "run", small_encoder(16), batch_size=13).train(Stored(images))
    assert not (tmp_path / "run").exists()


def test_victim_of_another_width(tmp_path, images):
    with pytest.raises(UserError, match="40 numbers, the copy gives 32"):
        steal(trainer(tmp_path / "run"), images, Victim(small_encoder(dim=40)))
    assert not (tmp_path / "run").exists()


def test_budget_below_the_queries_stops_before_training(tmp_path, images, encoder):
    with pytest.raises(UserError, match="exceed the budget of 11"):
        steal(trainer(tmp_path), images, Victim(encoder, budget=11))
    assert not (tmp_path / "checkpoint.pth.tar").exists()
