"""What holds for every defence on the black box, their lists and their settings; see also test_defence_formulas.py."""

import inspect
import math
import re

import pytest
import torch
from torch import nn

from defenses import DEFENCES, DefenceChoice, parse_defences, use_defences
from defenses.buckets import CELLS
from defenses.mark import RULES
from defenses.poisoning import detection_figures
from defenses.transform import KINDS
from models.simclr import SimCLREncoder
from settings import Parser, settings_of
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
CASES = [(name, {}) for name in DEFENCES if name not in ("transform", "mark")]
CASES += [("mark", {"mark_rule": rule}) for rule in RULES]
CASES += [("transform", {"transform": kind}) for kind in KINDS]
CASES += [("noise", {"consistent_noise": True})]
CASES += [("buckets", {"bucket_cells": cells}) for cells in CELLS if cells != "hyperplanes"]
RANDOM = [case for case in CASES if case[0] not in ("rounding", "topk", "truncate", "entropy", "detection")]
every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=str)


def victim_with(names, secret=7, **settings):
    """A victim with these defences, each with those of the settings that are its, in which it is strong."""
    made = []
    for name in names.split(","):
        known = settings_of(DEFENCES[name])
        values = {key: value for key, value in {**STRONG, **settings}.items() if key in known}
        made.append(DEFENCES[name](secret=secret, **values))
    victim = Victim(SimCLREncoder(Pixels(), "pixels"), defences=made)
    wanted = max(defence.owner_images for defence in made)
    if wanted:
        victim.prepare(random_images(min(wanted, 100), seed=9))
    return victim


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
    assert same == ((name, settings) not in RANDOM or settings == {"consistent_noise": True} or name == "mark")


@every_case
def test_no_answer_is_the_clean_one(images, name, settings):
    answers = ask(victim_with(name, **{**settings, "poison_threshold": 0.0}), images)
    clean = represent(images)
    if name == "detection":  # it only watches
        assert torch.equal(answers, clean)
        return
    if name == "mark":  # it changes few
        changed = (answers != clean).any(dim=1)
        assert 0 < changed.sum() < len(answers) / 2
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
            for part in thing:
                yield from reachable(part)
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
    assert any(isinstance(thing, DEFENCES[name]) for thing in found)
    assert not [thing for thing in found if isinstance(thing, torch.Tensor | nn.Module | torch.Generator)]


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
    with pytest.raises(UserError, match=f"unknown defence '.*': choose from {', '.join(DEFENCES)},") as caught:
        parse_defences(text)
    assert "\n" not in str(caught.value)


def test_a_repeated_name_is_refused():
    with pytest.raises(UserError, match="'noise,topk,noise' names a defence twice"):
        parse_defences("noise,topk,noise")


def parser():
    return Parser("defences", [DefenceChoice, *DEFENCES.values()])


def test_defences_take_the_settings_that_are_theirs():
    line = "--defence noise,poisoning,rounding --sigma 0.25 --decimals 3 --secret 5"
    noise, poisoning, rounding = use_defences(parser().parse(line.split()), "mse", seed=1)
    assert (noise.mu, noise.sigma, noise.consistent_noise) == (5.0, 0.25, False)
    assert (poisoning.sigma, poisoning.poison_memory, poisoning.poison_threshold) == (0.25, 10_000, 0.8)
    assert rounding.decimals == 3
    assert {noise.secret, poisoning.secret, rounding.secret} == {5}
    assert use_defences(parser().parse([]), "mse", seed=1) == []


@pytest.mark.parametrize(
    ("line", "losstype", "names"),
    [
        ("--defence", "infonce", "poisoning"),
        ("--defence True", "mse", "noise"),
        ("--defence True", "softnn", "poisoning"),
        ("--defence False", "infonce", ""),
        ("--defence rounding --entropy", "mse", "rounding entropy"),
        ("--entropy True", "mse", "entropy"),
        ("--defence entropy,noise --entropy True", "mse", "entropy noise"),
    ],
)
def test_which_defences_a_line_puts_into_force(line, losstype, names):
    """As in 2022, --defence True depends on what it is against; without --secret the seed is the secret."""
    made = use_defences(parser().parse(line.split()), losstype, seed=4)
    assert [type(defence).__name__.lower() for defence in made] == names.split()
    assert {defence.secret for defence in made} <= {4}


def test_new_defences_have_seen_nothing():
    """What a command puts into force is made anew for each victim."""
    first, second = (use_defences(parser().parse(["--defence", "detection"]), "mse", seed=0) for _ in range(2))
    Victim(SimCLREncoder(Pixels(), "pixels"), defences=first).query(random_images(5))
    assert first[0].scores()
    assert not second[0].scores()


def test_a_flag_means_the_same_wherever_it_is_taken():
    flags = {}
    for defence in DEFENCES.values():
        for name, declared in settings_of(defence).items():
            meaning = declared.default, declared.text
            assert flags.setdefault(name, meaning) == meaning
            assert declared.text


# Of each setting: values in range, at its ends where it has any, and values that are refused.
RANGES = {
    ("noise", "mu"): ([-3.0, 0.0, 1e9], [math.nan, math.inf, -math.inf]),
    ("noise", "sigma"): ([0.0, 2.0], [-0.5, math.nan, math.inf]),
    ("noise", "consistent_noise"): ([True, False], []),
    ("poisoning", "sigma"): ([0.0, 2.0], [-1.0, math.nan, math.inf]),
    ("poisoning", "poison_memory"): ([1, 10**6], [0, -1]),
    ("poisoning", "poison_threshold"): ([0.0, 1.0], [1.5, -0.1, math.nan]),
    ("rounding", "decimals"): ([0, 6], [-1, 7]),
    ("topk", "top_k"): ([1, DIM], [0, -1]),
    ("truncate", "dimensions"): ([1, DIM], [0, -1]),
    ("mark", "mark_rule"): ([*RULES], ["warden", ""]),
    ("mark", "mark_directions"): ([1, 7], [0, -1]),
    ("transform", "transform"): ([*KINDS], ["spin", ""]),
    ("buckets", "bucket_bits"): ([1, 10], [0, 25]),  # 24 bits: 16 million buckets
    ("buckets", "bucket_cells"): ([*CELLS], ["squares", ""]),
    ("buckets", "bucket_lambda"): ([1e-9, 0.1], [0.0, -1.0, math.nan, math.inf]),
    ("buckets", "bucket_alpha"): ([1e-3, 10.0], [1e-7, -1.0, math.nan, math.inf]),
    ("buckets", "bucket_beta"): ([1e-3, 100.0], [0.0, 101.0, -1.0, math.nan]),
    ("detection", "detection_memory"): ([1, 10**6], [0, -1]),
    ("detection", "detection_bits"): ([1, 10], [0, 25]),
}
VALUES = [(*key, value) for key, (good, _) in RANGES.items() for value in good]
BAD = [(*key, value) for key, (_, bad) in RANGES.items() for value in bad]


def test_every_setting_of_a_defence_has_a_row():
    assert RANGES.keys() == {(name, key) for name, defence in DEFENCES.items() for key in settings_of(defence)}


@pytest.mark.parametrize(("name", "setting", "value"), VALUES, ids=str)
def test_values_in_range_are_taken(name, setting, value, images):
    victim = victim_with(name, **{setting: value})
    assert getattr(victim.defences[0], setting) == value
    assert victim.query(images[:3]).isfinite().all()


@pytest.mark.parametrize(("name", "setting", "value"), BAD, ids=str)
def test_values_out_of_range_are_refused_with_flag_and_value(name, setting, value, capsys):
    """By the class, and in a command line before anything is done."""
    flag = f"--{setting.replace('_', '-')}"
    with pytest.raises(UserError, match=re.escape(f"{flag} {value} ")) as caught:
        victim_with(name, **{setting: value})
    assert "\n" not in str(caught.value)
    capsys.readouterr()
    with pytest.raises((UserError, SystemExit)) as caught:
        use_defences(parser().parse([f"{flag}={value}", "--defence", name]), "mse", 0)
    said = str(caught.value) if isinstance(caught.value, UserError) else capsys.readouterr().err
    assert flag in said


def test_the_most_bits_of_a_hash_table_are_taken():
    """Not asked: a table of 16 million buckets is made at the first query."""
    assert DEFENCES["buckets"](bucket_bits=24).bucket_bits == DEFENCES["detection"](detection_bits=24).detection_bits


def test_what_is_more_than_an_answer_has_is_refused():
    for name, setting in (("topk", "top_k"), ("truncate", "dimensions")):
        flag = f"--{setting.replace('_', '-')}"
        with pytest.raises(UserError, match=f"{flag} {DIM + 1} .* {DIM}") as caught:
            victim_with(name, **{setting: DIM + 1})
        assert "\n" not in str(caught.value)


def test_an_unknown_map_is_refused_with_the_choice():
    with pytest.raises(UserError, match=r"--transform spin .*orthogonal.*binary"):
        victim_with("transform", transform="spin")


@pytest.mark.parametrize("kind", [True, False])
def test_queries_of_one_kind_have_no_detection_figures(kind):
    with pytest.raises(UserError, match="all queries are of one kind"):
        detection_figures(torch.rand(5), torch.full((5,), kind), 0.8)
