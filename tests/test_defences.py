"""What holds for every defence on the black box, their lists and their settings; see also test_defence_formulas.py."""

import inspect
import math

import pytest
import torch
from torch import nn

from defenses import DEFENCES, build_defences, parse_defences, settings_of
from defenses.transform import KINDS
from models.simclr import SimCLREncoder
from utils import UserError, seeded
from victim import Victim

DIM = 24


class Pixels(nn.Module):
    """The smallest backbone: the representation of an image of 2 x 4 is its pixels, stretched to [-2, 2]."""

    dim = DIM

    def __init__(self):
        super().__init__()
        with seeded(0):
            self.fc = nn.Linear(DIM, 8, bias=False)

    def represent(self, images):
        return 4 * images.flatten(1) - 2


def represent(images):
    return 4 * (images.flatten(1).float() / 255) - 2


def random_images(count, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 2, 4), dtype=torch.uint8, generator=draws)


def stream():
    """48 images, every third of which is nearly, every twelfth exactly, the one four before it."""
    images = random_images(48)
    shift = random_images(48, seed=1) // 6
    for row in range(6, 48, 3):
        images[row] = images[row - 4] // 2 + 64 + shift[row] if row % 12 else images[row - 4]
    return images


# Settings in which each defence does much to answers of 24 numbers.
STRONG = {
    "mu": 5.0,
    "sigma": 0.5,
    "poison_memory": 20,
    "poison_threshold": 0.8,
    "decimals": 1,
    "top_k": 5,
    "dimensions": 7,
    "bucket_bits": 4,
    "bucket_alpha": 5.0,
    "bucket_beta": 30.0,
}
CASES = [(name, {}) for name in DEFENCES if name != "transform"]
CASES += [("transform", {"transform": kind}) for kind in KINDS]
CASES += [("noise", {"consistent_noise": True})]
RANDOM = [case for case in CASES if case[0] not in ("rounding", "topk", "truncate", "entropy", "detection")]
every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=str)


def victim_with(names, secret=7, **settings):
    defences = build_defences(names.split(","), {**STRONG, **settings}, secret)
    return Victim(SimCLREncoder(Pixels(), "pixels"), defences=defences)


@pytest.fixture
def images():
    return stream()


def ask(victim, images, size=None, account="default"):
    return torch.cat([victim.query(part, account) for part in images.split(size or len(images))])


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_every_defence_is_tested():
    assert {name for name, _ in CASES} == set(DEFENCES)


@every_case
def test_answers_do_not_depend_on_how_the_stream_is_cut(images, name, settings):
    whole = ask(victim_with(name, **settings), images)
    for size in (1, 5):
        torch.testing.assert_close(ask(victim_with(name, **settings), images, size), whole, rtol=1e-4, atol=1e-5)


@every_case
def test_only_the_secret_repeats_a_draw(images, name, settings):
    answers = ask(victim_with(name, **settings), images)
    assert torch.equal(ask(victim_with(name, **settings), images), answers)
    other = ask(victim_with(name, secret=8, **settings), images)
    assert torch.equal(other, answers) == ((name, settings) not in RANDOM)


@every_case
def test_what_one_account_asks_changes_nothing_for_another(images, name, settings):
    alone = ask(victim_with(name, **settings), images, account="b")
    victim, parts = victim_with(name, **settings), []
    for part in images.split(6):
        ask(victim, part.flip(0), account="a")
        parts.append(victim.query(part, "b"))
    torch.testing.assert_close(torch.cat(parts), alone, rtol=1e-4, atol=1e-5)


@every_case
def test_accounts_have_draws_of_their_own(images, name, settings):
    victim = victim_with(name, **settings)
    same = torch.equal(ask(victim, images, account="a"), ask(victim, images, account="b"))
    assert same == ((name, settings) not in RANDOM or settings == {"consistent_noise": True})


@every_case
def test_no_answer_is_the_clean_one(images, name, settings):
    answers = ask(victim_with(name, **{**settings, "poison_threshold": 0.0}), images)
    clean = represent(images)
    if name == "detection":  # it only watches
        assert torch.equal(answers, clean)
        return
    if name == "poisoning":  # the first query has nothing before it
        assert torch.equal(answers[0], clean[0])
        answers, clean = answers[1:], clean[1:]
    assert all(answer.shape != h.shape or not torch.equal(answer, h) for answer, h in zip(answers, clean, strict=True))


@every_case
def test_what_is_public_of_a_victim_holds_no_numbers_of_the_encoder(images, name, settings):
    victim = victim_with(name, **settings)
    ask(victim, images)

    def reachable(thing):
        if isinstance(thing, list | tuple | set):
            for one in thing:
                yield from reachable(one)
        elif isinstance(thing, dict):
            yield from reachable([*thing, *thing.values()])
        elif isinstance(thing, int | float | str | bytes | None):
            return
        else:
            yield thing
            names = [key for key in dir(thing) if not key.startswith("_")]
            if not inspect.isroutine(thing) and not isinstance(thing, torch.Tensor | nn.Module):
                yield from reachable([getattr(thing, key) for key in names])

    found = list(reachable(victim))
    assert any(isinstance(one, DEFENCES[name]) for one in found)
    assert not [one for one in found if isinstance(one, torch.Tensor | nn.Module | torch.Generator)]


def test_no_image_gets_an_empty_answer():
    for name, settings in CASES:
        victim = victim_with(name, **settings)
        assert victim.query(random_images(4)[:0]).shape == (0, victim.dim)


# ---- lists of them, and their settings -------------------------------------------------------------------------------


def test_defences_of_a_list_are_applied_in_its_order(images):
    noise = ask(victim_with("noise"), images)
    torch.testing.assert_close(ask(victim_with("noise,rounding"), images), noise.round(decimals=1))
    rounded = represent(images).round(decimals=1)
    torch.testing.assert_close(ask(victim_with("rounding,noise"), images), rounded + noise - represent(images))


def test_lists_are_read_as_they_stand():
    assert parse_defences(" noise , topk") == ["noise", "topk"]
    assert parse_defences("topk,noise") == ["topk", "noise"]


@pytest.mark.parametrize("text", ["", "nois", "noise,,topk", "noise,watermark", "Noise"])
def test_unknown_names_are_refused_with_the_choice(text):
    with pytest.raises(UserError, match=r"unknown defence '.*': choose from noise, poisoning, .*buckets") as caught:
        parse_defences(text)
    assert "\n" not in str(caught.value)


def test_a_repeated_name_is_refused():
    with pytest.raises(UserError, match="'noise,topk,noise' names a defence twice"):
        parse_defences("noise,topk,noise")


def test_defences_take_the_settings_that_are_theirs():
    given = {"sigma": 0.25, "mu": None, "decimals": 3, "losstype": "mse"}
    noise, poisoning, rounding = build_defences(["noise", "poisoning", "rounding"], given, secret=5)
    assert (noise.mu, noise.sigma, noise.consistent_noise) == (5.0, 0.25, False)
    assert (poisoning.sigma, poisoning.poison_memory, poisoning.poison_threshold) == (0.25, 10_000, 0.8)
    assert rounding.decimals == 3
    assert {noise.secret, poisoning.secret, rounding.secret} == {5}
    assert build_defences([], given) == []


def test_a_flag_means_the_same_wherever_it_is_taken():
    flags = {}
    for defence in DEFENCES.values():
        for name, one in settings_of(defence).items():
            text = one.metadata["help"]
            assert flags.setdefault(name, (one.default, text)) == (one.default, text)
            assert text


BAD = [
    ("noise", {"sigma": -0.5}, "--sigma -0.5"),
    ("noise", {"sigma": math.nan}, "--sigma nan"),
    ("noise", {"sigma": math.inf}, "--sigma inf"),
    ("noise", {"mu": math.nan}, "--mu nan"),
    ("noise", {"mu": -math.inf}, "--mu -inf"),
    ("poisoning", {"sigma": -1.0}, "--sigma -1.0"),
    ("poisoning", {"sigma": math.inf}, "--sigma inf"),
    ("poisoning", {"poison_memory": 0}, "--poison-memory 0"),
    ("poisoning", {"poison_threshold": 1.5}, "--poison-threshold 1.5"),
    ("poisoning", {"poison_threshold": -0.1}, "--poison-threshold -0.1"),
    ("rounding", {"decimals": -1}, "--decimals -1"),
    ("rounding", {"decimals": 7}, "--decimals 7"),
    ("topk", {"top_k": 0}, "--top-k 0"),
    ("topk", {"top_k": DIM + 1}, f"--top-k {DIM + 1} .* {DIM}"),
    ("truncate", {"dimensions": 0}, "--dimensions 0"),
    ("truncate", {"dimensions": DIM + 1}, f"--dimensions {DIM + 1} .* {DIM}"),
    ("transform", {"transform": "spin"}, "--transform spin .*orthogonal.*binary"),
    ("buckets", {"bucket_bits": 0}, "--bucket-bits 0"),
    ("buckets", {"bucket_bits": 25}, "--bucket-bits 25"),
    ("buckets", {"bucket_lambda": 0.0}, "--bucket-lambda 0.0"),
    ("buckets", {"bucket_alpha": 1e-7}, "--bucket-alpha 1e-07"),
    ("buckets", {"bucket_alpha": math.inf}, "--bucket-alpha inf"),
    ("buckets", {"bucket_beta": 0.0}, "--bucket-beta 0.0"),
    ("buckets", {"bucket_beta": 101.0}, "--bucket-beta 101.0"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD, ids=str)
def test_bad_settings_are_refused_with_flag_and_value(name, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        victim_with(name, **settings)
    assert "\n" not in str(caught.value)
