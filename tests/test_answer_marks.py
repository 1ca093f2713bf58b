"""Evidence from marks in answers: figures by slow formulas, honest p-values, and copies that are found."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from attacks import Attack
from data_aug.datasets import DATASETS, load_dataset
from data_aug.digests import digest_tensor, perceptual_hashes
from data_aug.images import Stored
from defenses.mark import RULES, Mark
from defenses.transform import AFFINE, Transform
from evaluation import answer_marks
from evaluation.answer_marks import cosines_by_words, judge_map, judge_words, measure_map, measure_words
from evaluation.candidates import Candidate, OwnershipTest, asked_images
from evaluation.statistics import cohens_d, further_draw, kolmogorov_smirnov, paired_t
from evaluation.verdict import caveat, judge_all, verdict_table
from tests.networks import FP32, small_encoder, trainer
from utils import UserError
from victim import Victim

DIM, SECRET = 64, 3
VICTIM = {"settings": {"dataset": "shapes"}}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer other secrets, in less time: p-values of 1 / 80 at least. And the images are drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_marks, "OTHERS", 79)
        patch.setitem(DATASETS, "shapes", functools.cache(DATASETS["shapes"]))
        yield


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A victim of a second or two and two independent encoders, of 1,000 shapes each."""
    made = []
    for seed in (0, 1, 2):
        model = small_encoder(16, seed=seed, dim=DIM)
        job = trainer(tmp_path_factory.mktemp("victim"), model, batch_size=50, lr=2e-3, epochs=2 - (seed > 0))
        job.train(Stored(load_dataset("shapes", split="train")[0][1000 * seed : 1000 * (seed + 1)]))
        made.append(model.eval())
    return made


def candidates_of(encoders, suspects):
    """The victim, suspects, independent encoders and the control, as verify.py has them."""
    victim, *others = encoders
    parts = [("victim", victim, VICTIM), *(("suspect", one, {}) for one in suspects)]
    parts += [("independent", one, {}) for one in others]
    parts += [("untrained", small_encoder(seed=9, dim=DIM).eval(), {})]
    return [Candidate(kind, Path(f"{kind}.pth"), checkpoint, one) for kind, one, checkpoint in parts]


def verdicts(method, defence, encoders, suspects, **values):
    """Candidates judged as verify.py judges them, and what was counted."""
    test = OwnershipTest(method=method, defence=defence, **{"num_test": 1000, **values})
    candidates = candidates_of(encoders, suspects)
    prepare = {"mark": measure_words, "transform": measure_map}[method]
    measure, counts = prepare(test, Path("datasets"), candidates, FP32, 0)
    for candidate in candidates:
        candidate.measured = measure(candidate)
    judge_all(test, candidates)
    return candidates, counts


class Copy(nn.Module):
    """What a thief's encoder is that has learned a share of the mark: the answers, mixed with those without it."""

    def __init__(self, encoder, mark, share):
        super().__init__()
        self.encoder, self.marker, self.share, self.dim = encoder, mark, share, encoder.dim

    def forward(self, images):
        h = self.encoder(images)
        return h + self.share * (self.marker.mark(h, perceptual_hashes(images, self.marker.secret)) - h)


# ---- mark ----


def test_cosines_are_of_images_with_a_words_direction_less_those_of_images_without_any():
    draws = torch.Generator().manual_seed(0)
    unit = F.normalize(torch.randn(300, 8, generator=draws), dim=1)
    hashes = perceptual_hashes(load_dataset("shapes", split="test")[0][:300], SECRET)
    key = Mark(secret=SECRET, mark_directions=2).key(8)
    words = key.words(hashes).tolist()
    plain = [
        [(row @ towards).item() for towards in key.towards] for row, n in zip(unit, words, strict=True) if not any(n)
    ]
    means = [sum(column) / len(plain) for column in zip(*plain, strict=True)]
    marked = [
        (row @ key.towards[r]).item() - means[r]
        for row, counts in zip(unit, words, strict=True)
        for r in range(2)
        if counts[r]
    ]
    found = cosines_by_words(unit, key, hashes)
    assert found[0].tolist() == pytest.approx(marked, abs=1e-6)
    assert found[1].tolist() == pytest.approx([row[r] - means[r] for row in plain for r in range(2)], abs=1e-6)
    assert found[1].mean().item() == pytest.approx(0, abs=1e-6)


def test_words_are_judged_by_published_figures_by_other_keys_and_among_encoders():
    draws = torch.Generator().manual_seed(0)

    def reading(gain):
        marked = gain + torch.randn(90, generator=draws)
        return marked, torch.randn(300, generator=draws), torch.cat([marked.mean()[None], 0.1 * torch.randn(39)])

    own, *others = (reading(gain) for gain in (2, 0.1, -0.1))
    alone, figures = judge_words(own, []), judge_words(own, others)
    assert alone.keys() == {"cosine_difference", "l2_difference", "effect", "p_ks", "p_keys"}
    assert alone["cosine_difference"] == pytest.approx(own[0].mean().item())
    assert alone["l2_difference"] == pytest.approx(-2 * own[0].mean().item())
    assert alone["effect"] == pytest.approx(cohens_d(own[0], own[1]))
    assert alone["p_ks"] == stats.ks_2samp(own[0], own[1], alternative="less", method="asymp").pvalue < 1e-6
    assert alone["p_keys"] == 1 / 40
    assert figures["effect"] == pytest.approx(cohens_d(own[0], torch.cat([rows for rows, *_ in others])))
    assert figures["p_t"] == pytest.approx(paired_t(own[0], (others[0][0] + others[1][0]) / 2))
    assert figures["p_encoders"] == pytest.approx(
        further_draw(own[0].mean(), [rows.mean() for rows, *_ in others]), rel=1e-4
    )
    assert kolmogorov_smirnov(own[1], own[0]) > 0.5  # one-sided


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("directions", [1, 4])
def test_a_copy_that_learned_a_part_of_the_mark_is_found_and_others_are_not(rule, directions, encoders):
    mark = Mark(secret=SECRET, mark_rule=rule, mark_directions=directions)
    copies = [Copy(encoder, mark, 0.4) for encoder in encoders[:2]]  # the second began as another encoder
    candidates, counts = verdicts("mark", mark, encoders[:1], copies)
    assert [one.found for one in candidates] == [True, True, True, False]  # the last is the control
    assert counts["test_images"] == 1000
    assert 30 < counts["marked_images"] < 400
    victim, copy, *_ = candidates
    assert victim.figures["cosine_difference"] > 1.5 * copy.figures["cosine_difference"] > 0.05
    assert "p_keys" in verdict_table(candidates)
    assert caveat(copy.figures) == ""
    innocent = verdicts("mark", mark, encoders[:1], encoders)[0]
    assert [one.found for one in innocent] == [True, False, False, False, False]


def test_the_mark_is_judged_beside_independent_encoders_too(encoders):
    mark = Mark(secret=4)
    candidates = verdicts("mark", mark, encoders, [Copy(encoders[0], mark, 0.4)])[0]
    assert [one.found for one in candidates] == [True, True, False, False, False]
    assert {"p_t", "p_encoders", "p_keys", "p_ks"} < candidates[1].figures.keys()


def test_another_secret_finds_nothing(encoders):
    marked = Copy(encoders[0], Mark(secret=SECRET), 1.0)
    copy = verdicts("mark", Mark(secret=SECRET + 1), encoders, [marked])[0][1]
    assert copy.figures["p_keys"] > 0.05
    assert not copy.found


def test_an_innocent_encoder_has_each_rank_with_the_same_probability(encoders):
    """Over secrets; unlike the published test, which takes what images with a word have in common for a mark."""
    ranks, published = [], []
    test = OwnershipTest(method="mark", num_test=300)
    for secret in range(40):
        candidates = candidates_of(encoders, [])
        here = dataclasses.replace(test, defence=Mark(secret=secret))
        figures = judge_words(measure_words(here, Path("datasets"), candidates, FP32, 0)[0](candidates[1]), [])
        ranks.append(figures["p_keys"])
        published.append(figures["p_ks"])
    assert stats.kstest(ranks, "uniform").pvalue > 0.01
    assert sum(p <= 0.05 for p in ranks) <= 6  # of 40, expected 2
    assert sum(p <= 0.05 for p in published) > sum(p <= 0.05 for p in ranks)


def test_few_images_with_a_word_are_named(encoders, capsys):
    verdicts("mark", Mark(secret=SECRET), encoders, [], num_test=60)
    assert "of 60 images have a word of the mark, which is few: judge by more images" in capsys.readouterr().out
    with pytest.raises(UserError, match="of 2 images have a word of the mark: judge by more images"):
        verdicts("mark", Mark(secret=SECRET), encoders, [], num_test=2)


def test_the_images_that_accounts_asked_about_are_those_of_the_records(encoders):
    images = load_dataset("shapes", split="test")[0]
    asked = {"query_digests": digest_tensor(images[5:25])}
    suspect, unknown = (Candidate("suspect", Path("s"), checkpoint, None) for checkpoint in (asked, {}))
    test = OwnershipTest(method="mark", asked="shapes")
    assert torch.equal(asked_images(test, "shapes", Path("datasets"), [suspect, unknown]), images[5:25])
    everything = asked_images(test, "shapes", Path("datasets"), [unknown])
    assert torch.equal(everything, images[: len(everything)])
    assert len(everything) == len(images) - 1000


# ---- transform ----


@pytest.fixture(scope="module")
def stolen(encoders, tmp_path_factory):
    """A copy of what an account was answered, by the map of this kind."""

    def steal(defence):
        copy = small_encoder(seed=5, dim=DIM)
        job = trainer(tmp_path_factory.mktemp("copy"), copy, losstype="mse", epochs=8, batch_size=50, lr=5e-3)
        images = load_dataset("shapes", split="train")[0][3000:4000]
        job.steal(Stored(images), Victim(encoders[0], defences=[defence]), Attack())
        return copy.eval()

    return steal


@pytest.mark.parametrize("kind", ["wet", "orthogonal"])
def test_a_copy_of_an_accounts_answers_is_found_by_its_map_and_others_are_not(kind, encoders, stolen):
    transform = Transform(secret=SECRET, transform=kind)
    copy = stolen(transform)
    (victim, found, *rest), counts = verdicts("transform", transform, encoders, [copy], num_test=300)
    assert counts == {"test_images": 300, "account": "default"}
    assert (victim.found, found.found) == (True, True)
    assert victim.figures["cosine"] == pytest.approx(1, abs=1e-4)
    assert found.figures["p_maps"] == 1 / 80
    assert [one.found for one in rest] == [False] * 3
    other = verdicts("transform", transform, encoders, [copy], num_test=300, account="another")[0][1]
    assert not other.found


@pytest.mark.parametrize("kind", [kind for kind in AFFINE if "pad" not in kind and kind != "add"])
def test_the_victims_own_answers_are_found_whatever_the_map(kind, encoders):
    transform = Transform(secret=SECRET, transform=kind)
    victim, *rest = verdicts("transform", transform, encoders, [], num_test=100)[0]
    assert victim.found
    assert not any(one.found for one in rest)


def test_a_map_is_judged_by_published_figures_by_other_maps_and_among_encoders():
    draws = torch.Generator().manual_seed(0)

    def reading(mean):
        cosines = mean + 0.1 * torch.rand(200, generator=draws)
        return cosines, torch.cat([cosines.mean()[None], 0.1 * torch.rand(39, generator=draws)])

    own, *others = (reading(mean) for mean in (0.6, 0.2, 0.1))
    alone, figures = judge_map(own, []), judge_map(own, others)
    cosine = own[0].mean().item()
    assert alone == {
        "cosine": cosine,
        "l2": pytest.approx(2 - 2 * cosine),
        "effect": pytest.approx((cosine - own[1][1:].mean().item()) / own[1][1:].std().item(), rel=1e-4),
        "p_maps": 1 / 40,
    }
    assert figures["effect"] == pytest.approx(cohens_d(own[0], torch.cat([rows for rows, _ in others])))
    assert figures["p_t"] == pytest.approx(paired_t(own[0], (others[0][0] + others[1][0]) / 2))
    assert figures["p_encoders"] == pytest.approx(further_draw(cosine, [rows.mean() for rows, _ in others]), rel=1e-4)


def test_what_cannot_be_judged_is_one_line(encoders):
    with pytest.raises(UserError, match="--transform binary cannot be undone"):
        verdicts("transform", Transform(transform="binary"), encoders, [])
    narrow = small_encoder(seed=4, dim=DIM // 2)
    for method, defence in (("mark", Mark()), ("transform", Transform())):
        with pytest.raises(UserError, match=f"gives representations of 32 numbers, the victim's answers have {DIM}"):
            verdicts(method, defence, encoders, [narrow], num_test=100)
