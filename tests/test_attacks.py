"""What is sent to the victim, what the copy is shown, which answer belongs to which row; and what that costs."""

import numpy as np
import pytest
import torch

import steal
from attacks import ATTACKS, Attack
from attacks.answers import Answers
from attacks.buy import buy
from attacks.client import Client
from attacks.queries import QueryChoice, choose_queries, queries_sent
from data_aug.augment import apply_views, random_views, rows_of
from data_aug.images import Batch, Stored, Streamed, Views, open_pictures, whole
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


# ---- what is sent and shown ----


def test_plain_queries_are_the_images(images, draws):
    stored = Stored(images)
    assert queries_sent(stored, Attack(), draws) is stored
    assert torch.equal(queries_sent(stored, Attack(n_views=3, queryaug=False), draws).tensor, images.repeat(3, 1, 1, 1))


def test_views_are_sent_where_an_image_is_asked_about_several_times():
    cases = {(1, None): False, (2, None): True, (2, False): False, (1, True): True}
    for (n_views, queryaug), expected in cases.items():
        assert Attack(n_views=n_views, queryaug=queryaug).sends_views == expected


def test_augmented_queries_are_views_of_8_bits_in_view_major_order(draws):
    """Images of one colour each, whose views keep the order of the colours' mean brightness on average."""
    plain = torch.arange(6, dtype=torch.uint8)[:, None, None, None].mul(50).expand(-1, 3, 32, 32).contiguous()
    sent = queries_sent(Stored(plain), Attack(n_views=40, queryaug=True), draws).tensor
    assert (sent.dtype, sent.shape) == (torch.uint8, (240, 3, 32, 32))
    brightness = sent.float().mean(dim=(1, 2, 3)).view(40, 6)
    assert (brightness.mean(dim=0).diff() > 0).all()
    assert brightness[:, 3].std() > 1  # each view has its own draws


def test_views_are_sent_rounded_to_8_bits(images):
    """By the same draws, and not as cutting the decimals off would have them."""
    sent = queries_sent(Stored(images), Attack(n_views=2), generator(0, "test")).tensor
    again = generator(0, "test")
    exact = 255 * torch.cat([random_views(images, 32, again) for _ in range(2)])
    assert torch.equal(sent, exact.round().byte())
    assert not torch.equal(sent, exact.byte())
    assert (sent - exact).abs().max() <= 0.5
    assert abs((sent - exact).mean()) < 0.01  # cut off, they would be darker by half a step


def answers_of(images, sent, rows, attack):
    """The answers to all of the images, as training uses them."""
    stored = Stored(images)
    sent = stored if sent is images else Stored(sent)
    return Answers(torch.arange(len(images)), stored, sent, rows, attack).to(CPU)


def step(answers, index, draws, share=whole):
    """What the copy is shown of the images at these indices, and the targets, in an epoch with these draws."""
    (batch,) = answers.batches([torch.as_tensor(index)], CPU, share)
    assert batch.index.tolist() == list(index)
    assert torch.equal(batch.local, batch.index[share(len(index))])
    return answers.batch(batch, answers.draw(draws))


def test_without_useaug_the_copy_sees_what_was_sent(images, draws):
    attack = Attack(n_views=2, queryaug=True)
    sent = queries_sent(Stored(images), attack, draws).tensor
    answers = answers_of(images, sent, torch.arange(24.0)[:, None], attack)
    assert answers.draw(draws) is None
    shown, targets = step(answers, [7, 2, 5], draws)
    rows = [7, 2, 5, 19, 14, 17]
    assert torch.equal(shown, sent[rows].float() / 255)
    assert targets[:, 0].tolist() == rows


def test_with_one_view_sent_the_copy_sees_that_view(images, draws):
    attack = Attack(queryaug=True)
    sent = queries_sent(Stored(images), attack, draws).tensor
    shown, targets = step(answers_of(images, sent, torch.arange(12.0)[:, None], attack), [7, 2, 5], draws)
    assert torch.equal(shown, sent[[7, 2, 5]].float() / 255)
    assert not torch.equal(sent, images)
    assert targets[:, 0].tolist() == [7, 2, 5]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("queryaug", [False, True])
def test_with_useaug_the_copy_sees_views_of_its_own(queryaug, views, images, draws):
    """Neither the images nor what was sent, but the images' views by the epoch's table, others in each epoch."""
    attack, index = Attack(n_views=views, queryaug=queryaug, useaug=True, copy_views=views), [7, 2, 5, 0]
    sent = queries_sent(Stored(images), attack, draws).tensor
    answers = answers_of(images, sent, torch.arange(12.0 * views)[:, None], attack)
    epochs = []
    for epoch in range(2):
        shown, _ = step(answers, index, generator(0, "views", epoch))
        table = answers.draw(generator(0, "views", epoch))
        assert len(table) == 12 * views
        expected = apply_views(images[index].repeat(views, 1, 1, 1), table[rows_of(torch.tensor(index), views, 12)])
        assert torch.equal(shown, expected)
        epochs.append(shown)
    rows = rows_of(torch.tensor(index), views, 12)
    for others in (sent[rows] / 255, images[index].repeat(views, 1, 1, 1) / 255):
        assert all((shown != other).any() for epoch in epochs for shown, other in zip(epoch, others, strict=True))
    assert all((first != second).any() for first, second in zip(*epochs, strict=True))


@pytest.mark.parametrize("plain_first", [False, True])
def test_with_useaug_every_row_of_an_image_has_its_one_answer(plain_first, images, draws):
    attack = Attack(useaug=True, copy_views=3, plain_first=plain_first)
    assert attack.views == 3 + plain_first
    index = [7, 2, 5, 0]
    shown, targets = step(answers_of(images, images, torch.arange(12.0)[:, None], attack), index, draws)
    assert targets[:, 0].tolist() == [7, 2, 5, 0] * attack.views
    assert torch.equal(shown[:4], images[index] / 255) == plain_first
    views = shown.view(attack.views, 4, 3, 32, 32)
    assert all(not torch.equal(views[a], views[b]) for a in range(attack.views) for b in range(a))


def test_with_useaug_and_an_answer_for_each_view_they_are_paired(images, draws):
    attack = Attack(n_views=2, queryaug=True, useaug=True, copy_views=2)
    sent = queries_sent(Stored(images), attack, draws).tensor
    shown, targets = step(answers_of(images, sent, torch.arange(24.0)[:, None], attack), [3, 1], draws)
    assert len(shown) == 4
    assert targets[:, 0].tolist() == [3, 1, 15, 13]


@pytest.mark.parametrize("useaug", [False, True])
def test_the_prototype_is_the_mean_answer(useaug, images, draws):
    attack = Attack(n_views=5, queryaug=True, prototype=True, useaug=useaug, copy_views=3)
    rows = torch.rand(60, 4, generator=draws)
    sent = queries_sent(Stored(images), attack, draws).tensor
    shown, targets = step(answers_of(images, sent, rows, attack), [11, 4], draws)
    expected = torch.stack([rows[[i + 12 * view for view in range(5)]].mean(dim=0) for i in (11, 4)])
    assert len(shown) == 2 * attack.views
    torch.testing.assert_close(targets, expected.repeat(attack.views, 1))


def test_answers_are_refined_before_they_are_averaged(images, draws):
    attack = Attack(n_views=2, queryaug=True, prototype=True)
    rows = torch.rand(24, 4, generator=draws)
    sent = queries_sent(Stored(images), attack, draws)
    answers = Answers(torch.arange(12), Stored(images), sent, rows, attack).to(CPU, lambda rows: rows[:, :3].square())
    _, targets = step(answers, [5], draws)
    expected = rows[[5, 17], :3].square().mean(dim=0)
    torch.testing.assert_close(targets, expected.expand(2, 3))


SHOWN = [Attack(), Attack(useaug=True, copy_views=3), Attack(useaug=True, copy_views=2, plain_first=True)]


@pytest.mark.parametrize("attack", SHOWN, ids=str)
@pytest.mark.parametrize("share", [whole, lambda n: slice(n // 2), lambda n: slice(n // 2, n)], ids=["all", "0", "1"])
def test_streamed_and_stored_images_give_the_same_batch(share, attack, write_npz, tmp_path):
    """However the answers are kept: in memory in float32, or in a file in float16."""
    pictures = open_pictures(f"npz:{write_npz(train=30)}", tmp_path, "train")
    streamed = Streamed(Views(pictures, "crop", 24, seed=3), torch.arange(5, 25), workers=0)
    index = torch.randperm(20, generator=generator(0, "test")).split(8)
    (everything,) = streamed.batches([torch.arange(20)], CPU)
    stored = Stored(everything.images)
    victim = Victim(small_encoder(seed=0))
    kinds = {"stored": (stored, np.float32), "streamed": (streamed, np.float16)}
    found = {}
    for name, (images, dtype) in kinds.items():
        client = Client(victim, tmp_path / name, dtype=dtype, batch_size=7)
        answers = buy(client, images, attack, 20, generator(0, "query views")).to(CPU)
        table = answers.draw(generator(0, "views"))
        batches = [(batch, *answers.batch(batch, table)) for batch in answers.batches(index, CPU, share)]
        assert [batch.index.tolist() for batch, _, _ in batches] == [part.tolist() for part in index]
        found[name] = batches
    for (one, shown, targets), (other, shown_other, targets_other) in zip(*found.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert torch.equal(one.images, everything.images[one.local])
        assert torch.equal(shown, shown_other)
        assert len(shown) == attack.views * len(one.local)
        assert targets.dtype == targets_other.dtype == torch.float32
        assert len(targets) == attack.views * len(one.index)
        torch.testing.assert_close(targets, targets_other, rtol=1e-3, atol=1e-6)
        assert torch.equal(targets_other, targets_other.half().float())
    assert victim.ledger.queries == 40
    assert victim.ledger.distinct == 20


def test_shares_of_a_batch_are_the_whole_together(images, draws):
    """Two processes, several views: each is shown its images, both have all targets."""
    for attack in (Attack(n_views=2, queryaug=True), Attack(useaug=True, copy_views=2)):
        sent = queries_sent(Stored(images), attack, draws).tensor
        answers = answers_of(images, sent, torch.rand(len(sent), 4, generator=draws), attack)
        index = [3, 1, 8, 10]
        shown, targets = step(answers, index, generator(0, "t"))
        shares = (lambda n: slice(n // 2), lambda n: slice(n // 2, n))
        halves = [step(answers, index, generator(0, "t"), share) for share in shares]
        assert torch.equal(shown.view(2, 4, -1), torch.cat([half.view(2, 2, -1) for half, _ in halves], dim=1))
        assert all(torch.equal(targets, its_targets) for _, its_targets in halves)


def test_a_batch_has_the_pixels_of_its_images(images):
    """Of a batch of N images with V views sent, V * N views, view-major."""
    attack = Attack(n_views=2, queryaug=False)
    sent = Stored(torch.cat([images, 255 - images]))
    answers = Answers(torch.arange(12), Stored(images), sent, torch.zeros(24, 1), attack)
    (batch,) = answers.batches([torch.tensor([4, 0])], CPU, whole)
    assert isinstance(batch, Batch)
    assert torch.equal(batch.images, torch.cat([images[[4, 0]], 255 - images[[4, 0]]]))


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
