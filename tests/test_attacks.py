"""Which images an attack asks about, what does not go together, and what each published attack costs."""

import pytest
import torch

import steal
from attacks import ATTACKS, Attack
from attacks.queries import QueryChoice, choose_queries
from data_aug.images import Stored
from loss import STEAL_LOSSES
from models import read_checkpoint
from simclr import SimCLR
from tests.networks import FP32, small_encoder
from training.objective import Loss
from training.recipe import Recipe
from training.run import Run
from utils import UserError, generator
from victim import Victim, image_digests

CPU = torch.device("cpu")


@pytest.fixture
def draws():
    return generator(0, "test")


@pytest.fixture
def encoder():
    return small_encoder(16, seed=0)


# ---- which images ----


def test_the_first_images_or_random_ones_by_seed(write_npz):
    root = write_npz("svhn", train=50).parent
    choices = {order: QueryChoice(datasetsteal="svhn", query_order=order) for order in ("first", "random")}
    first = choose_queries(choices["first"], "cifar10", root, 20)
    assert first[2].query_indices.tolist() == list(range(20))
    drawn = [choose_queries(choices["random"], "cifar10", root, 20, seed) for seed in (0, 0, 1)]
    indices = [record.query_indices for _, _, record in drawn]
    assert torch.equal(indices[0], indices[1])
    assert not torch.equal(indices[0], indices[2])
    everything, labels, _ = choose_queries(choices["first"], "cifar10", root, 50)
    for images, its_labels, record in (first, *drawn):
        chosen = record.query_indices
        assert len(images) == len(chosen.unique()) == 20
        assert torch.equal(images.tensor, everything.tensor[chosen])
        assert torch.equal(its_labels, labels[chosen])
        assert record.query_set == {"dataset": "svhn", "split": "train", "images": 20}


@pytest.mark.parametrize("order", ["first", "random"])
def test_an_attacker_who_chooses_has_all_images(order, write_npz):
    root = write_npz("svhn", train=50).parent
    choice = QueryChoice(datasetsteal="svhn", query_order=order)
    images, labels, record = choose_queries(choice, "cifar10", root, 20, everything=True)
    assert len(images) == len(labels) == len(record.query_indices.unique()) == record.query_set["images"] == 50


def test_more_images_than_there_are(write_npz):
    root = write_npz("svhn", train=50).parent
    with pytest.raises(UserError, match=r"takes 51 images, the train split of svhn has 50 .* lower --num_queries"):
        choose_queries(QueryChoice(datasetsteal="svhn"), "cifar10", root, 51)


@pytest.mark.parametrize(
    ("attack", "images"),
    [
        (Attack(), 100),
        (Attack(n_views=3), 33),
        (Attack(repeat=4), 25),
        (Attack(repeat=2, n_views=5), 10),
        (Attack(sybils=3, shared=20), 60),
        (Attack(sybils=2, shared=4, repeat=5, n_views=2), 8),
    ],
    ids=str,
)
def test_how_many_images_a_budget_covers(attack, images):
    """All queries fit into it, and with another image they would not."""
    assert attack.images(100) == images

    def cost(count):
        return attack.repeat * (count * attack.n_views + (attack.sybils - 1) * attack.shared)

    assert cost(images) <= 100 < cost(images + 1)


# ---- what does not go together ----


def test_rows_and_answers_that_cannot_be_paired_are_refused():
    mse, stolenencoder = STEAL_LOSSES["mse"], STEAL_LOSSES["stolenencoder"]
    with pytest.raises(UserError, match=r"give --n-views 1$"):
        Attack(n_views=2, plain_first=True).check(stolenencoder)
    with pytest.raises(UserError, match="give --copy-views 2, or --prototype"):
        Attack(n_views=2, useaug=True, copy_views=3).check(mse)
    with pytest.raises(UserError, match="--n-views 1 is too few, give 2 or more"):
        Attack().check(STEAL_LOSSES["symmetrized"])
    with pytest.raises(UserError, match="--copy-views 1 is too few, give 2 or more"):
        Attack(useaug=True).check(STEAL_LOSSES["symmetrized"])
    for attack in (
        Attack(),
        Attack(n_views=3),
        Attack(n_views=3, useaug=True, copy_views=3),
        Attack(useaug=True, copy_views=9),
        Attack(n_views=10, prototype=True, useaug=True, copy_views=5),
    ):
        attack.check(mse)
    Attack(n_views=10, prototype=True, useaug=True, copy_views=5, plain_first=True).check(stolenencoder)


@pytest.mark.parametrize("more", [{"n_views": 2}, {"sybils": 2, "shared": 5}, {"queryaug": True}], ids=str)
def test_an_attacker_who_chooses_sends_plain_images_as_one_account(more):
    with pytest.raises(UserError, match="--max-coverage chooses plain images for one account"):
        Attack(max_coverage=5.0, **more).check(STEAL_LOSSES["mse"])


# ---- what each published attack costs ----


class Recorded(Victim):
    """A victim that also keeps the digests of the images that it was sent."""

    def query(self, images, account="default", gather=None):
        self.sent = [*getattr(self, "sent", []), *image_digests(images)]
        return super().query(images, account, gather)


def command_of(name, *line):
    """What steal.py puts into force for an attack."""
    return steal.parse(["--attack", name, *map(str, line)])


def attack_by(name, encoder, images, folder, *line):
    """Runs an attack as steal.py would, on the images for two epochs; the victim."""
    command = command_of(name, "--epochs", 2, "-b", 4, *line)
    victim = Recorded(encoder)
    job = SimCLR(small_encoder(), command[Loss], command[Recipe], Run(folder, FP32))
    job.steal(Stored(images), victim, command[Attack])
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
    victim = attack_by(name, encoder, images, tmp_path)
    plain = set(image_digests(images))
    cost = victim.ledger.queries, victim.ledger.distinct, sum(digest in plain for digest in victim.sent)
    assert cost == COSTS[name](12)
    assert read_checkpoint(tmp_path / "checkpoint.pth.tar")["ledger"]["default"]["queries"] == cost[0]


@pytest.mark.parametrize("crops", [2, 5])
def test_rda_costs_images_times_crops_whatever_the_copy_is_shown(crops, encoder, images, tmp_path):
    victim = attack_by("rda", encoder, images, tmp_path, "--n-views", crops, "--copy-views", 3)
    assert victim.ledger.queries == 12 * crops


def test_cont_steal_as_released_asks_for_new_views_in_every_epoch(encoder, images, tmp_path):
    victim = attack_by("cont-steal", encoder, images, tmp_path, "--recipe", "released", "--epochs", 3)
    assert (victim.ledger.queries, victim.ledger.distinct) == (36, 36)


# Loss, its temperature, batch size, learning rate, weight decay and optimizer as published or as in the 2022 code.
PUBLISHED = {
    "direct": ("infonce", 0.07, 256, 3e-4, 1e-4, "adam"),
    "conventional": ("mse", None, 64, 3e-4, 1e-4, "adam"),
    "cont-steal": ("contsteal", 0.5, 32, 3e-4, 0.0, "adam"),
    "stolenencoder": ("stolenencoder", None, 64, 1e-3, 5e-4, "sgd"),
    "rda": ("rda", 0.07, 100, 1e-3, 0.0, "adam"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_puts_its_published_settings_into_force(name):
    command = command_of(name)
    recipe, bound = command[Recipe], command[Loss].values
    found = command.losstype, bound.get("temperature"), recipe.batch_size, recipe.lr
    assert (*found, recipe.weight_decay, recipe.optimizer) == PUBLISHED[name]
    given = command_of(name, "--lr", 0.5, "--wd", 0.25)
    assert (given[Recipe].lr, given[Recipe].weight_decay) == (0.5, 0.25)
    for key, value in ATTACKS[name].items():
        assert getattr(command, key) == value
