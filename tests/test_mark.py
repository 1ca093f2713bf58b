"""The mark in answers: its words, its rules by slow formulas, and what near-copies keep of it."""

import pytest
import torch

from attacks.client import jitter
from data_aug.datasets import load_dataset
from data_aug.digests import perceptual_hashes
from defenses.mark import BITS, FULL, RULES, WORDS, Mark
from tests.networks import small_encoder
from victim import Victim

SECRET = 7


@pytest.fixture(scope="module")
def images():
    return load_dataset("shapes", split="test")[0][:2000]


@pytest.fixture(scope="module")
def hashes(images):
    return perceptual_hashes(images, SECRET)


def slow_words(key, image_hash):
    """How many words of each direction an image has, from its three bytes."""
    bits = [int(bit) for byte in image_hash.tolist() for bit in f"{byte:08b}"]
    found = [0] * len(key.towards)
    for word in range(WORDS):
        pairs = zip(key.places[word].tolist(), key.values[word].tolist(), strict=True)
        if all(bits[place] == value for place, value in pairs):
            found[word % len(found)] += 1
    return found


@pytest.mark.parametrize("directions", [1, 3])
def test_words_are_patterns_of_the_bits_of_a_hash(directions, hashes):
    key = Mark(secret=SECRET, mark_directions=directions).key(16)
    assert all(len(set(places)) == BITS for places in key.places.tolist())
    assert key.words(hashes[:300]).tolist() == [slow_words(key, one) for one in hashes[:300]]


def test_a_word_is_as_frequent_as_published(images):
    """One in 128 images has it, on average over secrets; 0.5 to 1 % of texts have a published one."""
    words = []
    for secret in range(12):
        words.append(Mark(secret=secret).key(16).words(perceptual_hashes(images, secret)).mean().item() / WORDS)
    assert 0.005 < sum(words) / len(words) < 0.01


def test_only_the_secret_tells_images_and_directions(images, hashes):
    ours, theirs = (Mark(secret=secret).key(16) for secret in (SECRET, 8))
    assert torch.equal(ours.towards, Mark(secret=SECRET).key(16).towards)
    assert not torch.allclose(ours.towards, theirs.towards, atol=0.1)
    marked, others = (
        key.words(perceptual_hashes(images, secret))[:, 0] > 0 for key, secret in ((ours, 7), (theirs, 8))
    )
    by_chance = marked.float().mean() * others.float().mean()
    assert (marked & others).float().mean() < 3 * by_chance


def test_directions_are_of_length_one_and_of_a_relus_sign():
    towards = Mark(secret=SECRET, mark_directions=5).key(256).towards
    torch.testing.assert_close(towards.norm(dim=1), torch.ones(5))
    assert (towards >= 0).all()
    assert (towards @ towards.T - torch.eye(5)).max() < 0.8  # 2 / pi for the absolute values of normal numbers


def slow_mark(rule, key, answer, image_hash):
    """One answer with the mark, number by number."""
    words = slow_words(key, image_hash)
    count = sum(words)
    if not count:
        return answer.tolist()
    length = sum(number**2 for number in answer.tolist()) ** 0.5
    unit = [number / length for number in answer.tolist()]
    dim, towards = len(unit), key.towards.tolist()
    target = [sum(n * t[i] for n, t in zip(words, towards, strict=True)) / count for i in range(dim)]
    weight = min(count / FULL, 1)
    if rule == "embmarker":
        mixed = [(1 - weight) * unit[i] + weight * target[i] for i in range(dim)]
    else:
        smallest = sorted(range(dim), key=lambda i: abs(unit[i]))[: dim // 5]
        mixed = [target[i] if i in smallest else unit[i] for i in range(dim)]
    norm = sum(number**2 for number in mixed) ** 0.5
    return [length * number / norm for number in mixed]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("dim", [5, 40])
def test_marked_answers_are_the_rules(rule, directions, dim, hashes):
    mark = Mark(secret=SECRET, mark_rule=rule, mark_directions=directions)
    answers = 3 * torch.randn(400, dim, generator=torch.Generator().manual_seed(0))
    marked, key = mark.mark(answers, hashes[:400]), mark.key(dim)
    expected = [slow_mark(rule, key, *pair) for pair in zip(answers, hashes[:400], strict=True)]
    torch.testing.assert_close(marked, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(marked.norm(dim=1), answers.norm(dim=1))
    has = key.words(hashes[:400]).sum(dim=1) > 0
    assert torch.equal((marked != answers).any(dim=1), has)
    assert 0.03 < has.float().mean() < 0.4


def test_four_words_make_the_answer_the_direction(hashes):
    """The weight grows by a quarter for each word, and ends at 1."""
    mark = Mark(secret=SECRET)
    key = mark.key(30)
    for count in range(7):
        counted = Counted(key.places, key.values, key.towards, count)
        mark._keys[30] = counted
        answers = torch.rand(1, 30, generator=torch.Generator().manual_seed(1))
        marked = mark.mark(answers, hashes[:1])[0] / answers.norm()
        unit, weight = answers[0] / answers.norm(), min(count / 4, 1)
        expected = (1 - weight) * unit + weight * key.towards[0]
        torch.testing.assert_close(marked, expected / expected.norm())


class Counted(type(Mark().key(1))):
    """A key by which every image has so many words."""

    def __init__(self, places, values, towards, count):
        super().__init__(places, values, towards)
        object.__setattr__(self, "count", count)

    def words(self, hashes):
        return torch.full((len(hashes), 1), float(self.count))


@pytest.mark.parametrize(("levels", "kept"), [(1, 0.97), (4, 0.9), (16, 0.75)])
def test_near_copies_mostly_keep_their_words(levels, kept, images, hashes):
    words = Mark(secret=SECRET).key(16).words
    marked = words(hashes) > 0
    still = words(perceptual_hashes(jitter(images, levels, number=1), SECRET)) > 0
    assert (still & marked).sum() / marked.sum() > kept
    assert (still == marked).float().mean() > 0.92


def test_a_victim_marks_what_its_secret_says(images):
    """Through the black box: the hashes are those of the images sent, by the same secret."""
    encoder, sent = small_encoder(16, seed=0, dim=64), images[:200]
    clean = Victim(encoder).query(sent)
    answers = Victim(encoder, defences=[Mark(secret=SECRET)]).query(sent)
    expected = Mark(secret=SECRET).mark(clean, perceptual_hashes(sent, SECRET))
    torch.testing.assert_close(answers, expected)
    assert not torch.equal(answers, clean)
    assert (answers >= 0).all()  # those of a ReLU have no negative numbers, with the mark neither
