"""What is sent to the victim, what the copy is shown, and which answer belongs to which row."""

import numpy as np
import pytest
import torch

from attacks import Attack
from attacks.answers import Answers
from attacks.buy import buy
from attacks.client import Client
from attacks.queries import queries_sent
from data_aug.augment import apply_views, random_views, rows_of
from data_aug.images import Batch, Stored, Streamed, Views, open_pictures, whole
from tests.networks import small_encoder
from utils import generator
from victim import Victim

CPU = torch.device("cpu")


@pytest.fixture
def draws():
    return generator(0, "test")


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
    assert attack.rows == 3 + plain_first
    index = [7, 2, 5, 0]
    shown, targets = step(answers_of(images, images, torch.arange(12.0)[:, None], attack), index, draws)
    assert targets[:, 0].tolist() == [7, 2, 5, 0] * attack.rows
    assert torch.equal(shown[:4], images[index] / 255) == plain_first
    views = shown.view(attack.rows, 4, 3, 32, 32)
    assert all(not torch.equal(views[a], views[b]) for a in range(attack.rows) for b in range(a))


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
    assert len(shown) == 2 * attack.rows
    torch.testing.assert_close(targets, expected.repeat(attack.rows, 1))


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
    for (batch, shown, targets), (other, shown_other, targets_other) in zip(*found.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
        assert torch.equal(batch.images, everything.images[batch.local])
        assert torch.equal(shown, shown_other)
        assert len(shown) == attack.rows * len(batch.local)
        assert targets.dtype == targets_other.dtype == torch.float32
        assert len(targets) == attack.rows * len(batch.index)
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
