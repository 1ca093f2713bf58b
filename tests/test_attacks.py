"""What is sent to the victim, what the copy is shown, which answer belongs to which row; and what that costs."""

import dataclasses

import pytest
import torch

from attacks import ATTACKS, Answered, Plan, choose_queries, queries_of
from loss import STEAL_LOSSES
from models import build_copy, read_checkpoint
from simclr import SimCLR
from training import Training
from utils import Precision, Run, UserError, generator, seeded
from victim import Victim, image_digests

FP32 = Precision("fp32", torch.device("cpu"))


@pytest.fixture
def draws():
    return generator(0, "test")


# ---- which images ----


def test_the_first_images_or_random_ones_by_seed(write_npz):
    root = write_npz("svhn", train=50).parent
    first = choose_queries("svhn", "cifar10", root, 20)
    assert first.indices.tolist() == list(range(20))
    drawn = [choose_queries("svhn", "cifar10", root, 20, "random", seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].indices, drawn[1].indices)
    assert not torch.equal(drawn[0].indices, drawn[2].indices)
    for query_set in (first, *drawn):
        assert len(query_set.indices.unique()) == 20
        everything = choose_queries("svhn", "cifar10", root, 50)
        assert torch.equal(query_set.images, everything.images[query_set.indices])
        assert torch.equal(query_set.labels, everything.labels[query_set.indices])
        assert torch.equal(query_set.record()["query_indices"], query_set.indices)


def test_more_images_than_there_are(write_npz):
    root = write_npz("svhn", train=50).parent
    with pytest.raises(UserError, match=r"takes 51 images, the train split of svhn has 50 .* lower --num_queries"):
        choose_queries("svhn", "cifar10", root, 51)


# ---- what is sent and shown ----


def test_plain_queries_are_the_images(images, draws):
    assert queries_of(images, Plan(), draws) is images
    assert torch.equal(queries_of(images, Plan(n_views=3), draws), images.repeat(3, 1, 1, 1))


def test_augmented_queries_are_views_of_8_bits_in_view_major_order(draws):
    """Images of one colour each, whose views keep the order of the colours' mean brightness on average."""
    plain = torch.arange(6, dtype=torch.uint8)[:, None, None, None].mul(50).expand(-1, 3, 32, 32).contiguous()
    sent = queries_of(plain, Plan(n_views=40, queryaug=True), draws)
    assert (sent.dtype, sent.shape) == (torch.uint8, (240, 3, 32, 32))
    brightness = sent.float().mean(dim=(1, 2, 3)).view(40, 6)
    assert (brightness.mean(dim=0).diff() > 0).all()
    assert brightness[:, 3].std() > 1  # each view has its own draws


def test_without_useaug_the_copy_sees_what_was_sent(images, draws):
    plan = Plan(n_views=2, queryaug=True)
    sent = queries_of(images, plan, draws)
    answers = torch.arange(24.0)[:, None]
    index = torch.tensor([7, 2, 5])
    _, shown, targets = Answered(images, sent, answers, plan).batch(index, draws)
    rows = [7, 2, 5, 19, 14, 17]
    assert torch.equal(shown, sent[rows].float() / 255)
    assert targets[:, 0].tolist() == rows


@pytest.mark.parametrize("plain_first", [False, True])
def test_with_useaug_every_row_of_an_image_has_its_one_answer(plain_first, images, draws):
    plan = Plan(useaug=True, copy_views=3, plain_first=plain_first)
    assert plan.views == 3 + plain_first
    index = torch.tensor([7, 2, 5, 0])
    _, shown, targets = Answered(images, images, torch.arange(12.0)[:, None], plan).batch(index, draws)
    assert targets[:, 0].tolist() == [7, 2, 5, 0] * plan.views
    assert torch.equal(shown[:4], images[index] / 255) == plain_first
    views = shown.view(plan.views, 4, 3, 32, 32)
    assert all(not torch.equal(views[a], views[b]) for a in range(plan.views) for b in range(a))


def test_with_useaug_and_an_answer_for_each_view_they_are_paired(images, draws):
    plan = Plan(n_views=2, queryaug=True, useaug=True, copy_views=2)
    sent = queries_of(images, plan, draws)
    _, shown, targets = Answered(images, sent, torch.arange(24.0)[:, None], plan).batch(torch.tensor([3, 1]), draws)
    assert len(shown) == 4
    assert targets[:, 0].tolist() == [3, 1, 15, 13]


@pytest.mark.parametrize("useaug", [False, True])
def test_the_prototype_is_the_mean_answer(useaug, images, draws):
    plan = Plan(n_views=5, queryaug=True, prototype=True, useaug=useaug, copy_views=3)
    answers = torch.rand(60, 4, generator=draws)
    held = Answered(images, queries_of(images, plan, draws), answers, plan)
    _, shown, targets = held.batch(torch.tensor([11, 4]), draws)
    expected = torch.stack([answers[[i + 12 * view for view in range(5)]].mean(dim=0) for i in (11, 4)])
    assert len(shown) == 2 * plan.views
    torch.testing.assert_close(targets, expected.repeat(plan.views, 1))


def test_rows_and_answers_that_cannot_be_paired_are_named():
    assert "give --n-views 1" in Plan(n_views=2, plain_first=True).mismatch
    assert "give --copy-views 2, or --prototype" in Plan(n_views=2, useaug=True, copy_views=3).mismatch
    for plan in (Plan(), Plan(n_views=3), Plan(n_views=3, useaug=True, copy_views=3), Plan(useaug=True, copy_views=9)):
        assert plan.mismatch is None
    assert Plan(n_views=10, prototype=True, useaug=True, copy_views=5).mismatch is None


# ---- what each published attack costs ----


class Recorded(Victim):
    """A victim that also keeps the images that it was sent."""

    def answer(self, images, account="default", total=None):
        self.sent = [*getattr(self, "sent", []), *image_digests(images)]
        return super().answer(images, account, total)


def attack(name, encoder, images, folder, **values):
    """Runs an attack's preset on the images for two epochs; the victim."""
    preset = {key: value for key, value in ATTACKS[name].items() if key not in ("archstolen", "num_queries")}
    loss = STEAL_LOSSES[preset.pop("losstype", "infonce")]
    fields = {field.name for field in dataclasses.fields(Training)}
    assert preset.keys() <= fields
    training = Training(**{"epochs": 2, "batch_size": 4, "lr": 1e-3, "weight_decay": 0.0, **preset, **values})
    with seeded(1):
        copy = build_copy("resnet10w32", 256)
    victim = Recorded(encoder)
    SimCLR(copy, loss, training, Run(folder), FP32).steal(images, victim)
    return victim


# Queries, of how many distinct images, and how many of them are the plain images, for N images.
COSTS = {
    "direct": lambda n: (n, n, n),
    "conventional": lambda n: (n, n, n),
    "cont-steal": lambda n: (n, n, 0),  # one random view of each
    "stolenencoder": lambda n: (n, n, n),  # augmentations are the copy's own business
    "rda": lambda n: (10 * n, 10 * n, 0),  # images x crops
}


@pytest.mark.parametrize("name", ATTACKS)
def test_queries_are_those_of_the_methods_description(name, encoder, images, tmp_path):
    victim = attack(name, encoder, images, tmp_path)
    plain = set(image_digests(images))
    cost = victim.ledger.queries, victim.ledger.distinct, sum(digest in plain for digest in victim.sent)
    assert cost == COSTS[name](12)
    assert read_checkpoint(tmp_path / "checkpoint.pth.tar")["ledger"]["default"]["queries"] == cost[0]


@pytest.mark.parametrize("crops", [2, 5])
def test_rda_costs_images_times_crops_whatever_the_copy_is_shown(crops, encoder, images, tmp_path):
    victim = attack("rda", encoder, images, tmp_path, n_views=crops, copy_views=3)
    assert victim.ledger.queries == 12 * crops


def test_cont_steal_as_released_asks_for_new_views_in_every_epoch(encoder, images, tmp_path):
    victim = attack("cont-steal", encoder, images, tmp_path, recipe="released", epochs=3)
    assert (victim.ledger.queries, victim.ledger.distinct) == (36, 36)
