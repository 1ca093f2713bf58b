"""Which images an attack asks about, what does not go together, and what each published attack costs."""

from pathlib import Path

import pytest
import torch

import steal
from attacks import ATTACKS, Attack
from attacks.answers import Answers
from attacks.queries import QueryChoice, choose_queries, k_centres
from attacks.victims import say_steal
from data_aug.augment import apply_views, draw_views
from data_aug.images import Stored
from data_aug.recipes import VIEW_RECIPES
from loss import STEAL_LOSSES
from models import read_checkpoint
from simclr import SimCLR
from tests.conftest import Applied
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


@pytest.mark.parametrize(
    ("trained_on", "asked"),
    [("svhn", "cifar10"), ("svhn-merged", "cifar10"), ("shapes", "textures"), ("cifar10", "svhn")],
)
def test_the_attack_proposed_next_queries_another_data_set(trained_on, asked, encoder, capsys):
    command = steal.make_parser().parse([])
    say_steal(command, Path("v.pth.tar"), encoder, trained_on)
    assert f"--datasetsteal {asked} " in capsys.readouterr().out


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
        assert record.query_set == {"dataset": "svhn", "split": "train", "images": 20, "available": 50}


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


def test_k_centres_are_each_farthest_from_those_before():
    """By the greedy algorithm written out; also among points of which many are equal."""
    features = torch.randn(60, 3, generator=generator(0, "test"))
    features[40:] = features[:20]
    centres = k_centres(features, 45, seed=5)
    assert len(centres.unique()) == 45
    for place in range(1, 40):
        distances = torch.cdist(features.double(), features[centres[:place]].double()).amin(dim=1)
        torch.testing.assert_close(distances[centres[place]], distances.max(), rtol=1e-4, atol=1e-3)
    assert torch.equal(centres, k_centres(features, 45, seed=5))
    assert not torch.equal(centres, k_centres(features, 45, seed=6))


def test_k_centres_cover_more_than_random_images():
    """Of four tight clusters, one with a hundredth of the points, four centres take one of each."""
    near = torch.randn(400, 2, generator=generator(0, "test")) / 100
    corner = torch.tensor([0] * 200 + [1] * 100 + [2] * 96 + [3] * 4)
    features = near + torch.tensor([[0.0, 0], [0, 5], [5, 0], [5, 5]])[corner]
    for seed in range(5):
        assert sorted(corner[k_centres(features, 4, seed)].tolist()) == [0, 1, 2, 3]


def test_k_centre_queries_are_chosen_in_the_space_given(write_npz):
    root = write_npz("svhn", train=50).parent
    choice = QueryChoice(datasetsteal="svhn", query_order="k-centre")

    def brightness(images):
        return images.float().mean(dim=(1, 2, 3))[:, None]

    images, labels, record = choose_queries(choice, "cifar10", root, 8, seed=3, features=brightness)
    everything, all_labels, _ = choose_queries(QueryChoice(datasetsteal="svhn"), "cifar10", root, 50)
    assert torch.equal(record.query_indices, k_centres(brightness(everything.tensor), 8, seed=3))
    assert torch.equal(images.tensor, everything.tensor[record.query_indices])
    assert torch.equal(labels, all_labels[record.query_indices])


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
        self.sent += image_digests(images)
        return super().query(images, account, gather)


def command_of(name, *line):
    """What steal.py puts into force for an attack."""
    return steal.parse(["--attack", name, *map(str, line)])


def attack_by(name, encoder, images, folder, *line):
    """Runs an attack as steal.py would, on the images for two epochs; the victim."""
    command = command_of(name, "--epochs", 2, "-b", 4, *line)
    victim, asks = Recorded(encoder), command[Attack].asks
    victim.sent = []
    job = SimCLR(small_encoder(None if asks else 16), command[Loss], command[Recipe], Run(folder, FP32))
    job.steal(Stored(images), victim, command[Attack]) if asks else job.train(Stored(images))
    return victim


# Queries, of how many distinct images, and how many of them are the plain images, for N images.
COSTS = {
    "direct": lambda n: (n, n, n),
    "conventional": lambda n: (n, n, n),
    "cont-steal": lambda n: (n, n, 0),  # one random view of each
    "own-simclr": lambda n: (0, 0, 0),
    "stolenencoder": lambda n: (n, n, n),  # augmentations are the copy's own business
    "rda": lambda n: (10 * n, 10 * n, 0),  # images x crops
}


@pytest.mark.parametrize("name", ATTACKS)
def test_queries_are_those_of_the_methods_description(name, encoder, images, tmp_path):
    victim = attack_by(name, encoder, images, tmp_path)
    plain = set(image_digests(images))
    cost = victim.ledger.queries, victim.ledger.distinct, sum(digest in plain for digest in victim.sent)
    assert cost == COSTS[name](12)
    ledger = read_checkpoint(tmp_path / "checkpoint.pth.tar").get("ledger", {"default": {"queries": 0}})
    assert ledger["default"]["queries"] == cost[0]


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
    "conventional": ("mse", None, 32, 3e-4, 0.0, "adam"),
    "cont-steal": ("contsteal", 0.5, 32, 3e-4, 0.0, "adam"),
    "stolenencoder": ("stolenencoder", None, 64, 1e-3, 5e-4, "sgd"),
    "rda": ("rda", 0.07, 100, 1e-3, 1e-4, "adam"),
    "own-simclr": ("infonce", 0.07, 256, 3e-4, 1e-4, "adam"),
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


# The recipe of the views sent and of those that the copy sees (None: not random), and the schedule, as published.
VIEWS = {
    "direct": (None, None, "cosine"),
    "conventional": (None, None, "constant"),
    "cont-steal": ("contsteal", None, "constant"),  # the copy sees what was sent
    "stolenencoder": (None, "stolenencoder", "constant"),
    "rda": ("rda-query", "rda-copy", "constant"),
    "own-simclr": (None, None, "cosine"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_has_its_own_views_and_schedule(name):
    command = command_of(name)
    attack = command[Attack]
    sent = attack.query_views if attack.asks and attack.sends_views else None
    shown = attack.views if attack.useaug else None
    assert (sent, shown, command[Recipe].schedule) == VIEWS[name]
    acting = command.acting()
    assert ("query_views" in acting, "views" in acting) == (sent is not None, shown is not None)


def test_flags_choose_other_views(images, tmp_path):
    """What is sent under `none` are the images; what the copy sees are the views of the recipe named."""
    victim = attack_by("cont-steal", small_encoder(16, seed=0), images, tmp_path, "--query-views", "none")
    assert victim.sent == image_digests(images)
    attack = command_of("rda", "--views", "mild")[Attack]
    answers = Answers(torch.arange(12), Stored(images), Stored(images), torch.rand(12, 4), attack)
    table = answers.draw(generator(0, "views"))
    expected = draw_views(60, 32, 32, 32, generator(0, "views"), VIEW_RECIPES["mild"])
    shown = images.repeat(5, 1, 1, 1)
    assert torch.equal(apply_views(shown, table), apply_views(shown, expected))


@pytest.mark.parametrize("line", [["--query-views", "mild"], ["--views", "mild"]], ids=str)
def test_views_that_nobody_sees_are_refused(line):
    with pytest.raises(UserError, match=f"{line[0]} has no effect without"):
        command_of("direct", *line)


@pytest.mark.parametrize("name", ["direct", "rda"])
def test_answers_are_of_unit_length_before_their_mean_where_the_loss_has_it_so(name, images):
    shown = {"n_views": 2, "queryaug": True, "prototype": True, "useaug": True, "copy_views": 2}
    attack = Attack(**shown, unit_answers=name == "rda")
    rows = 10 * torch.rand(24, 4, generator=generator(0, "test"))
    answers = Answers(torch.arange(12), Stored(images), Stored(images.repeat(2, 1, 1, 1)), rows, attack).to(CPU)
    each = rows / rows.norm(dim=1, keepdim=True) if name == "rda" else rows
    torch.testing.assert_close(answers.targets(torch.arange(12), CPU), (each[:12] + each[12:]) / 2)
    assert command_of(name)[Attack].unit_answers == (name == "rda")


@pytest.mark.parametrize("line", [["--repeat", 2], ["--victimhead", "True"], ["--n-views", 3]], ids=str)
def test_an_attacker_who_asks_nothing_has_no_flags_of_asking(line):
    with pytest.raises(UserError, match=f"{line[0]} has no effect with --attack own-simclr: the victim is not asked"):
        command_of("own-simclr", *line)


def test_an_encoder_of_the_attackers_own_needs_a_loss_without_a_victim():
    with pytest.raises(UserError, match="--attack own-simclr has no victim for the loss mse: give --losstype infonce,"):
        command_of("own-simclr", "--losstype", "mse")
    assert command_of("own-simclr", "--num_queries", 70)[Attack].images(70) == 70


def test_wasserstein_is_refused_before_queries_where_the_copy_may_give_negative_numbers(encoder, images, tmp_path):
    victim = Recorded(encoder)
    recipe = Recipe(epochs=1, batch_size=4)
    job = SimCLR(small_encoder(32), STEAL_LOSSES["wasserstein"], recipe, Run(tmp_path, FP32))
    with pytest.raises(UserError, match="compares histograms, and what a head"):
        job.steal(Stored(images), victim)
    assert victim.ledger.queries == 0


def test_wasserstein_is_refused_where_answers_are_negative(encoder, images, tmp_path):
    victim = Victim(encoder, defences=[Applied(lambda answers: answers - 1)])
    recipe = Recipe(epochs=1, batch_size=4)
    job = SimCLR(small_encoder(), STEAL_LOSSES["wasserstein"], recipe, Run(tmp_path, FP32))
    with pytest.raises(UserError, match="answers have negative numbers: give another --losstype"):
        job.steal(Stored(images), victim)
