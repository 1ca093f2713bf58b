"""Verifying a theft: the verdicts on encoders that are copies and that are not."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import linalg, stats

import run
import steal
import verify
from data_aug.datasets import load_dataset, take_balanced
from defenses.watermark import WatermarkMLP
from evaluation.alignment import Alignment
from evaluation.candidates import (
    Candidate,
    OwnershipTest,
    dataset_of,
    open_candidates,
    split_probes,
    training_images,
    unseen_images,
)
from evaluation.ownership import _inference_notes, begin_alike, judge_inference, judge_similarity, judge_watermark
from evaluation.statistics import cohens_d, further_draw, holm, paired_t, rate_interval, welch
from evaluation.verdict import judge_all, passes
from files.writing import save_checkpoint
from models import build_encoder, load_encoder, read_checkpoint
from tests.conftest import call_main
from tests.test_watermark import lit
from utils import UserError, seeded
from victim import version_of

SMALL = ("--arch", "resnet10w32", "--device", "cpu", "--precision", "fp32")
FEW = ("--num-test", "80")


def write_npz(path, seed):
    arrays = {}
    for split, number in (("train", 128), ("test", 1040)):
        images, labels = lit(split, number, seed)
        arrays[f"x_{split}"], arrays[f"y_{split}"] = images.permute(0, 2, 3, 1).numpy(), labels.numpy()
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A watermarked victim, copies of it and three independent encoders: names -> checkpoints.

    Two copies are the victim with its weights disturbed, which takes no time; `shuffled` is the victim with the
    dimensions of its representations in another order; `stolen` is a copy by steal.py, of 40 queries of the victim's
    own test images.
    """
    folder = tmp_path_factory.mktemp("verify")
    ours, theirs = write_npz(folder / "ours.npz", 0), write_npz(folder / "theirs.npz", 1)
    train = (*SMALL, "--flat-epochs", "1", "-b", "16", "--lr", "0.002")
    marked = ("--dataset", ours, "--epochs", "4", "--num-train", "112", "--watermark", "True", "--out_dim", "16")
    assert call_main(run, folder, folder, *train, *marked) == 0
    victim = next(folder.rglob("checkpoint.pth.tar"))
    paths = {"victim": victim}
    for seed in (1, 2, 3):
        arguments = ("--dataset", theirs, "--epochs", "1", "--num-train", "32", "--seed", str(seed))
        assert call_main(run, folder, folder, *train, *arguments) == 0
        paths[f"independent{seed}"] = next(folder.rglob(f"victim-*theirs*seed{seed}-*/checkpoint.pth.tar"))
    queries = ("--dataset", ours, "--datasetsteal", ours, "--epochstrain", "4", "--num_queries", "40", "-b", "8")
    copy = ("--victim", victim, "--archstolen", "resnet10w32", "--losstype", "mse", "--epochs", "1")
    assert call_main(steal, folder, folder, *SMALL, *queries, *copy) == 0
    paths["stolen"] = next(victim.parent.glob("stolen-*/checkpoint.pth.tar"))
    for seed in (1, 2):
        state = read_checkpoint(victim)["state_dict"]
        draws = torch.Generator().manual_seed(seed)
        disturbed = {
            key: value + 0.05 * value.std() * torch.randn(value.shape, generator=draws) if value.ndim == 4 else value
            for key, value in state.items()
        }
        paths[f"copy{seed}"] = folder / f"copy{seed}.pth.tar"
        save_checkpoint({"state_dict": disturbed}, paths[f"copy{seed}"])
    order, last = torch.randperm(256, generator=draws), ("conv2", "bn2", "shortcut")
    shuffled = {
        key: value[order] if "layer4.0." in key and key.split(".")[3] in last and value.ndim else value
        for key, value in state.items()
        if ".fc." not in key
    }
    paths["shuffled"] = folder / "shuffled.pth.tar"
    save_checkpoint({"state_dict": shuffled}, paths["shuffled"])
    return folder, paths


@pytest.fixture
def verified(call, encoders):
    """Runs verify.py on encoders by name; returns what it prints."""
    folder, paths = encoders

    def run_verify(method, suspects, independents=(), *arguments):
        named = ("--method", method, "--victim", paths["victim"], "--suspect", *(paths[name] for name in suspects))
        if independents:
            named = (*named, "--independent", *(paths[f"independent{number}"] for number in independents))
        code, out, err = call(verify, *named, *arguments, "--device", "cpu", "--precision", "fp32", folder=folder)
        assert code == 0, err
        return out

    return run_verify


def table_of(out):
    """The table's rows, as dictionaries."""
    header, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:1] == "|"
    )
    return [dict(zip(header, row, strict=True)) for row in rows]


# ---- judging ----


def test_an_images_two_versions_count_once():
    """Ten images: six read right twice, one wrong twice, three once: 6 against 1, not 15 against 5."""
    right = torch.tensor([[1] * 6 + [0] + [1] * 3, [1] * 6 + [0] + [0] * 3]).bool()
    score = torch.linspace(0.3, 0.8, 10)
    figures = judge_watermark((right, score), [])
    assert figures["accuracy"] == pytest.approx(75)
    assert figures["p_binomial"] == pytest.approx(stats.binomtest(6, 7, alternative="greater").pvalue)
    assert figures.keys() == {"accuracy", "effect", "p_binomial"}


def test_an_mlp_that_always_says_the_same_proves_nothing():
    right = torch.stack([torch.ones(500), torch.zeros(500)]).bool()
    assert judge_watermark((right, torch.full((500,), 0.5)), [])["p_binomial"] == 1


def test_tests_against_independent_encoders_are_of_images_and_of_encoders():
    draws = torch.Generator().manual_seed(0)

    def read(mean):
        score = (mean + 0.1 * torch.randn(400, generator=draws)).clamp(0, 1)
        return (torch.stack([score, score]) > 0.5), score

    own, others = read(0.55), [read(mean) for mean in (0.46, 0.53, 0.57)]
    figures = judge_watermark(own, others)
    scores = [score for _, score in others]
    assert figures["p_t"] == pytest.approx(paired_t(own[1], torch.stack(scores).mean(dim=0)))
    assert figures["effect"] == pytest.approx(cohens_d(own[1], torch.cat(scores)))
    shares = [100 * (score > 0.5).double().mean().item() for score in scores]
    assert figures["p_encoders"] == pytest.approx(further_draw(figures["accuracy"], shares), rel=1e-4)
    # Thousands of images tell it from the others; among encoders that differ so much it is one of them.
    assert figures["p_t"] < 0.01 < 0.05 < figures["p_encoders"]
    assert not passes(figures, 0.05)
    assert "p_encoders" not in judge_watermark(own, others[:1])


def test_dataset_inference_is_judged_by_its_effect_among_encoders():
    draws = torch.Generator().manual_seed(0)
    known, *others = (
        (gain + torch.randn(300, generator=draws), torch.randn(300, generator=draws)) for gain in (1, 0, 0)
    )
    figures = judge_inference(known, others)
    assert figures["difference"] == pytest.approx((known[0].mean() - known[1].mean()).item())
    assert figures["p_t"] == pytest.approx(welch(*known))
    assert figures["p_encoders"] == pytest.approx(further_draw(cohens_d(*known), [cohens_d(*one) for one in others]))


def test_similarity_is_judged_by_its_magnitudes_among_encoders():
    draws = torch.Generator().manual_seed(0)
    own, *others = ((mean + 0.1 * torch.rand(300, generator=draws), torch.tensor([mean])) for mean in (0.5, 0.2, 0.1))
    figures = judge_similarity(own, others)
    cosines = [cosines for cosines, _ in others]
    assert figures["centred_cosine"] == pytest.approx(own[0].mean().item())
    assert figures["mutual_information"] == 0.5
    assert figures["effect"] == pytest.approx(cohens_d(own[0], torch.cat(cosines)))
    assert figures["p_t"] == pytest.approx(paired_t(own[0], sum(cosines) / 2))
    assert figures["p_encoders"] == pytest.approx(further_draw(own[0].mean(), [one.mean() for one in cosines]))
    assert "mutual_information" not in judge_similarity((own[0], torch.tensor([])), others)


def case(kind, gain, draws):
    """An encoder under which the victim's training images are likelier by `gain` standard deviations."""
    measured = gain + torch.randn(200, generator=draws), torch.randn(200, generator=draws)
    return Candidate(kind, Path(f"{kind}.pth.tar"), {}, None, measured)


def judged(*gains):
    """Candidates judged by dataset inference without independents: kinds and gains in turn."""
    draws = torch.Generator().manual_seed(0)
    candidates = [case(kind, gain, draws) for kind, gain in zip(gains[::2], gains[1::2], strict=True)]
    judge_all(OwnershipTest(method="dataset-inference"), candidates)
    return candidates


def test_suspects_share_the_level():
    """By Holm: of eight suspects a middling one is not found that is found alone."""
    alone = judged("victim", 1, "suspect", 0.2)[1]
    assert alone.figures["p_holm"] == alone.figures["p_t"] < 0.05
    assert alone.found
    _, first, *rest = judged("victim", 1, "suspect", 0.2, *("suspect", 0) * 6, "suspect", 1)
    assert first.figures["p_t"] == alone.figures["p_t"] < 0.05 < first.figures["p_holm"]
    assert [one.found for one in (first, *rest)] == [False] * 7 + [True]
    p = [one.figures["p_t"] for one in (first, *rest)]
    assert [one.figures["p_holm"] for one in (first, *rest)] == holm(p)
    assert f"p by Holm {first.figures['p_holm']:.3g}" in first.verdict


@pytest.mark.parametrize("method", ["watermark", "similarity"])
@pytest.mark.parametrize("untrained", [0.5, 0.63])
def test_an_independent_encoder_is_judged_as_if_it_was_the_only_suspect(method, untrained):
    """So one run tells the rate of false accusations that leaving each out in turn gives.

    An untrained encoder at 0.63 is found beside the five at 0.5 alone: then nothing is decided on the one at 0.64.
    """
    draws = torch.Generator().manual_seed(1)

    def readings(kind, level):
        score = (level + 0.1 * torch.randn(4000, generator=draws)).clamp(0, 1)
        right = torch.rand(2, 4000, generator=draws) < score
        return Candidate(kind, Path(kind), {}, None, (right, score) if method == "watermark" else (score, score[:0]))

    victim, suspect, control = readings("victim", 0.9), readings("suspect", 0.7), readings("untrained", untrained)
    others = [readings("independent", level) for level in (0.45, 0.48, 0.52, 0.5, 0.49, 0.64)]
    judge_all(OwnershipTest(method=method), [victim, suspect, *others, control])
    together = [(one.figures, one.found) for one in others]
    assert [found for _, found in together] == [False] * 5 + [True if untrained == 0.5 else None]
    for i, (figures, found) in enumerate(together):
        innocent = Candidate("suspect", Path("innocent"), {}, None, others[i].measured)
        judge_all(OwnershipTest(method=method), [victim, innocent, *others[:i], *others[i + 1 :], control])
        assert innocent.figures == {**figures, "p_holm": max(p for name, p in figures.items() if name[:2] == "p_")}
        assert innocent.found == found


def test_a_method_that_finds_an_untrained_encoder_decides_nothing():
    """As where the images differ by themselves."""
    victim, suspect, control = judged("victim", 1, "suspect", 1, "untrained", 0)
    assert (victim.found, suspect.found, control.found) == (True, True, False)
    assert control.verdict.startswith("not found, as it should be at level 0.05 (")
    victim, suspect, control = judged("victim", 1, "suspect", 1, "untrained", 1)
    assert (victim.found, suspect.found, control.found) == (True, None, True)
    assert [one.verdict.split(" at ")[0] for one in (victim, suspect, control)] == [
        "found",
        "undecided",
        "found, so the method cannot decide here",
    ]


def test_a_victim_that_is_not_found_leaves_all_undecided():
    victim, suspect, control = judged("victim", 0, "suspect", 1, "untrained", 0)
    assert (victim.found, suspect.found, control.found) == (False, None, False)
    assert suspect.verdict.startswith("undecided at level 0.05 (")


@pytest.mark.parametrize("figures", [{"p_t": 0.01, "p_encoders": math.nan}, {"p_t": math.nan, "p_encoders": 0.01}])
def test_a_p_value_that_is_no_number_proves_nothing(figures):
    assert not passes(figures, 0.05)
    measured = torch.full((20,), torch.nan)
    victim, suspect = (Candidate(kind, Path(kind), {}, None, (measured, measured)) for kind in ("victim", "suspect"))
    judge_all(OwnershipTest(method="dataset-inference"), [victim, suspect])
    assert suspect.figures["p_holm"] == 1


def test_without_any_test_nothing_is_found():
    assert not passes({"accuracy": 99.0}, 0.05)


# ---- alignment ----


def turned(draws, width, scale=3.0):
    """Representations (200, 16) of a victim, and those of a thief who turned, scaled and shifted them."""
    victim = torch.randn(200, 16, generator=draws) * torch.arange(1, 17)
    turn = torch.linalg.qr(torch.randn(max(width, 16), max(width, 16), generator=draws))[0][:16, :width]
    return victim, scale * victim @ turn + torch.randn(width, generator=draws)


@pytest.mark.parametrize("width", [16, 24])
def test_an_alignment_undoes_a_turn(width):
    victim, thief = turned(torch.Generator().manual_seed(0), width)
    align = Alignment(thief[:100], victim[:100])
    torch.testing.assert_close(align(thief[100:]), victim[100:], rtol=1e-3, atol=1e-2)


def test_the_turn_is_scipys_and_its_scale_that_of_root_mean_squares():
    draws = torch.Generator().manual_seed(0)
    victim, other = torch.randn(2, 200, 16, generator=draws)
    centred = [rows.double() - rows.double().mean(dim=0) for rows in (other, victim)]
    expected = linalg.orthogonal_procrustes(*(rows.numpy() for rows in centred))[0]
    found = Alignment(other, victim).turn.double()
    scale = centred[1].square().mean().sqrt() / centred[0].square().mean().sqrt()
    assert (found / scale).numpy() == pytest.approx(expected, abs=1e-5)


def test_a_narrower_encoders_turn_keeps_lengths():
    victim, other = torch.randn(200, 16), torch.randn(200, 10)
    turn = Alignment(other, victim).turn
    products = turn @ turn.T
    torch.testing.assert_close(products, products[0, 0] * torch.eye(10), atol=1e-5, rtol=1e-4)


# ---- which images ----


def candidate(paths, name):
    return Candidate("suspect", paths[name], read_checkpoint(paths[name]), load_encoder(paths[name]))


def dataset_of_victim(paths):
    return read_checkpoint(paths["victim"])["settings"]["dataset"]


def test_what_a_copy_queried_is_tested_on_no_encoder(encoders):
    _, paths = encoders
    dataset = dataset_of_victim(paths)
    test = load_dataset(dataset, "datasets", "test")[0]
    assert len(unseen_images(OwnershipTest(), dataset, "datasets", [candidate(paths, "copy1")])) == 1040
    both = [candidate(paths, name) for name in ("copy1", "stolen")]
    kept = unseen_images(OwnershipTest(), dataset, "datasets", both)
    assert torch.equal(kept, test[-1000:])


def test_the_victims_training_images_are_those_that_run_took(encoders):
    _, paths = encoders
    dataset = dataset_of_victim(paths)
    images, labels = load_dataset(dataset, "datasets", "train")
    expected = images[take_balanced(labels, 112, 0)]
    assert torch.equal(training_images(dataset, "datasets", candidate(paths, "victim")), expected)


# ---- verdicts ----


def last_rows(folder, number):
    lines = (folder / "checkpoints" / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[-number:]]


def test_copies_are_found_and_independent_encoders_are_not(verified, encoders):
    folder, paths = encoders
    out = verified("watermark", ["copy1", "copy2", "victim"], [1, 2, 3], *FEW)
    rows = table_of(out)
    assert [row["kind"] for row in rows] == ["victim", *["suspect"] * 3, *["independent"] * 3, "untrained"]
    assert [row["found"] for row in rows] == ["yes"] * 4 + ["no"] * 4
    assert min(float(row["accuracy"]) for row in rows[:4]) > 70
    assert rows[3] == {**rows[0], "kind": "suspect", "p_holm": rows[3]["p_holm"]}  # the victim as its own suspect
    assert rows[0].keys() == {"kind", "accuracy", "effect", "p_encoders", "p_holm", "found", "encoder"}
    assert [row["p_holm"] != "" for row in rows] == [False, *[True] * 3, *[False] * 4]
    assert out.count(": stolen at level 0.05 (") == 3
    assert "binomial p = " in out.split("suspect copy1.pth.tar: ")[1]
    assert "untrained resnet10w32: not found, as it should be" in out
    assert "independent encoders found at level 0.05: 0 of 3 (0 to 71 %)" in out
    found = "suspect encoders found at level 0.05: 3 of 3 (29 to 100 %); each test alone: binomial 3, t 3, encoders 3"
    assert found in out
    assert "AUC 1.000 (0.292 to 1.000); false accusations/detections in %: 0/0, 0/" in out
    written = last_rows(folder, 3)
    assert [row["checkpoint"] for row in written] == [str(paths[name]) for name in ("copy1", "copy2", "victim")]
    for row in written:
        assert row["found"] is True
        assert (row["auc"], row["false_accusations"], row["test_images"], row["independents"]) == (1, 0, 80, 3)
        assert (row["auc_low"], row["auc_high"]) == pytest.approx(rate_interval(3, 3))
        assert row["false_accusations_high"] == pytest.approx(rate_interval(0, 3)[1])
        assert (row["untrained_found"], row["untrained_accuracy"] < 60) == (False, True)
        assert {"command", "commit", "torch", "device", "seed", "seconds", "dataset", "p_t", "effect"} <= row.keys()
    assert [row["p_holm"] for row in written] == pytest.approx(
        holm([max(row[name] for name in ("p_binomial", "p_t", "p_encoders")) for row in written])
    )
    config = yaml.safe_load(next(paths["victim"].parent.glob("verify-watermark-*/config.yml")).read_text())
    assert config["settings"]["suspect"] == [row["checkpoint"] for row in written]


def test_independents_are_judged_beside_the_others(verified):
    """With two of them each has one other, and so no test over encoders; the untrained encoder is none of them."""
    rows = table_of(verified("watermark", ["copy1"], [1, 2], *FEW))
    assert [row["p_encoders"] != "" for row in rows] == [True, True, False, False, True]


def test_shuffled_dimensions_hide_a_watermark_until_they_are_aligned(verified, encoders):
    """The cost is in the false accusations: independent encoders are aligned too."""
    plain = table_of(verified("watermark", ["shuffled"], (), "--num-test", "40"))
    out = verified("watermark", ["shuffled"], [1, 2], *FEW, "--align")
    aligned = table_of(out)
    assert float(plain[1]["accuracy"]) < 60 < 70 < float(aligned[1]["accuracy"])
    assert plain[1]["found"] == "no"
    assert "40 test images, 40 aligned by images" in out
    assert "note: 40 images do not determine a turn of 256 dimensions: --align needs 512 or more" in out
    assert {row["found"] for row in table_of(out) if row["kind"] in ("suspect", "independent")} == {"undecided"}
    assert re.search(
        "independent encoders found at level 0.05: undecided; each test alone: binomial [0-2], t [0-2]", out
    )
    (row,) = last_rows(encoders[0], 1)
    assert (row["aligned_by_images"], row["test_images"], row["independents"]) == (40, 40, 2)


def test_an_alignment_is_fitted_and_judged_on_different_images():
    images = torch.randint(256, (21, 3, 4, 4), dtype=torch.uint8)
    wide = Candidate("victim", Path("x"), {}, build_encoder("resnet10w32"))
    probes, judged_by = split_probes(OwnershipTest(align=True), images, [wide], 0)
    assert (len(probes), len(judged_by)) == (10, 11)
    parts = [{image.numpy().tobytes() for image in part} for part in (probes, judged_by)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize(("number", "decides"), [(511, False), (512, True)])
def test_an_alignment_by_fewer_images_than_dimensions_decides_nothing(number, decides):
    encoder = build_encoder("resnet10w32")  # 256 numbers
    kinds = ("victim", "suspect", "independent", "untrained")
    candidates = [Candidate(kind, Path(kind), {}, encoder) for kind in kinds]
    split_probes(OwnershipTest(align=True), torch.zeros(number, 3, 1, 1, dtype=torch.uint8), candidates, 0)
    doubt = "" if decides else "255 images do not determine a turn of 256 dimensions"
    assert [one.doubt for one in candidates] == ["", doubt, doubt, ""]


def test_data_sets_that_weaken_dataset_inference_are_named():
    other = Candidate("independent", Path("other"), {"settings": {"dataset": "svhn"}}, None)
    (line,) = _inference_notes("svhn-merged", [other], None)
    assert line.startswith("other was trained on images of svhn-merged too")
    assert _inference_notes("cifar10", [other], None) == []
    assert "they differ by themselves" in "".join(_inference_notes("stl10", [other], None))
    assert "splits differ by themselves" in "".join(_inference_notes("svhn", [], None))


def test_an_encoder_of_the_victims_seed_and_architecture_began_alike(encoders):
    _, paths = encoders
    victim, other, silent = (candidate(paths, name) for name in ("victim", "independent1", "copy1"))
    assert not begin_alike(other, victim)
    assert not begin_alike(silent, victim)
    other.checkpoint["settings"] = {**other.settings, "seed": 0}
    assert begin_alike(other, victim)


def test_copies_draw_their_initial_weights_apart_from_a_victims_of_the_same_seed(encoders):
    _, paths = encoders
    victim, stolen = (candidate(paths, name) for name in ("victim", "stolen"))
    assert (stolen.settings["seed"], stolen.encoder.arch) == (victim.settings["seed"], victim.encoder.arch)
    assert not begin_alike(stolen, victim)
    del stolen.checkpoint["drawn_for"]  # as of an earlier version, whose copies began with the victim's weights
    assert begin_alike(stolen, victim)


def test_similarity_decides_nothing_on_a_suspect_that_began_as_the_victim_did(verified, encoders, tmp_path):
    _, paths = encoders
    content = read_checkpoint(paths["copy1"])
    content["settings"] = {"seed": 0}
    paths["alike"] = tmp_path / "alike.pth.tar"
    save_checkpoint(content, paths["alike"])
    out = verified("similarity", ["alike", "copy2"], [1, 2, 3], "--num-train", "60")
    assert f"note: {paths['alike']} began with the victim's initial weights" in out
    rows = {row["encoder"]: row["found"] for row in table_of(out)}
    assert (rows["alike.pth.tar"], rows["copy2.pth.tar"]) == ("undecided", "yes")
    (verdict,) = [line for line in out.splitlines() if line.startswith("suspect alike.pth.tar: undecided")]
    assert "; it began with the victim's initial weights, which alone make encoders similar" in verdict
    assert "suspect encoders found at level 0.05: 1 of 1 (3 to 100 %), 1 undecided" in out
    assert [row["found"] for row in last_rows(encoders[0], 2)] == [None, True]


def test_similarity_finds_copies_and_by_alignment_shuffled_ones(verified, encoders):
    out = verified("similarity", ["copy1", "shuffled"], [1, 2, 3], "--num-train", "60")
    rows = {row["encoder"]: row for row in table_of(out)}
    assert [rows[name]["found"] for name in ("copy1.pth.tar", "shuffled.pth.tar")] == ["yes", "no"]
    shuffled = rows["shuffled.pth.tar"]
    assert float(shuffled["mutual_information"]) == pytest.approx(1, abs=0.01)
    assert float(shuffled["centred_cosine"]) < 0.5
    assert float(rows["resnet10w32"]["mutual_information"]) == 0
    (row,) = last_rows(encoders[0], 1)
    assert (row["training_images"], row["untrained_mutual_information"]) == (60, 0)
    verified("similarity", ["shuffled"], [1, 2], "--num-train", "60", "--align")
    (row,) = last_rows(encoders[0], 1)
    assert row["centred_cosine"] > float(shuffled["centred_cosine"]) + 0.2


@pytest.mark.parametrize(
    ("independents", "words"),
    [((), "by the binomial test against 50 % alone, not compared with"), ((1,), "; not compared with the spread")],
)
def test_a_verdict_says_what_it_lacks(independents, words, verified):
    out = verified("watermark", ["copy1"], independents, *FEW)
    (verdict,) = [line for line in out.splitlines() if line.startswith("suspect copy1.pth.tar: stolen at level 0.05")]
    assert words in verdict
    assert "no ROC is drawn" in out


def test_a_method_that_does_not_find_the_victim_decides_nothing(verified, encoders):
    """An encoder of two dozen batches knows its images no better than others."""
    few = (*FEW, "--components", "3", "--num-train", "100", "--level", "0.0001")
    out = verified("dataset-inference", ["copy1", "copy2"], [1, 2, 3], *few)
    rows = table_of(out)
    assert [row["found"] for row in rows] == ["no", *["undecided"] * 5, "no"]
    assert "50 fitted images, 50 held out images, 80 test images, full covariance, 3 components" in out
    assert "note: 50 fitted images do not determine 3 full covariances of 256 dimensions, which need 771" in out
    assert "independent encoders found at level 0.0001: undecided; each test alone: t 0, encoders 0" in out
    assert "not found, so the method cannot decide here" in out
    assert "undecided at level 0.0001 (" in out
    assert "ROC by effect: AUC" in out
    (row,) = last_rows(encoders[0], 1)
    assert (row["found"], row["untrained_found"]) == (None, False)
    assert (row["fitted_images"], row["held_out_images"], row["test_images"]) == (50, 50, 80)
    mixture = (row["covariance"], row["components"], row["standardise"], row["crops"])
    assert mixture == ("full", 3, False, False)
    assert "false_accusations" not in row


def test_the_mixture_and_crops_are_the_command_lines(verified, encoders):
    given = ("--covariance", "diag", "--standardise", "--components", "3")
    verified("dataset-inference", ["copy1"], (), *FEW, *given)
    (whole,) = last_rows(encoders[0], 1)
    out = verified("dataset-inference", ["copy1"], (), *FEW, *given, "--crops")
    assert "diag covariance, 3 components, standardise, crops" in out
    assert "do not determine" not in out
    (row,) = last_rows(encoders[0], 1)
    mixture = (row["covariance"], row["components"], row["standardise"], row["crops"])
    assert mixture == ("diag", 3, True, True)
    # Crops are other images than whole ones.
    assert row["difference"] != pytest.approx(whole["difference"], rel=1e-3)


def test_the_same_command_gives_the_same_and_resume_only_shows_it(verified, encoders):
    _, paths = encoders
    arguments = ("watermark", ["copy2"], (), "--num-test", "40")
    first, second = verified(*arguments), verified(*arguments)
    assert table_of(first) == table_of(second)
    again = verified(*arguments, "--resume", "True")
    assert "has its results already" in again
    assert f"{paths['copy2']}: stolen at level" in again
    assert "|" not in again


def test_encoders_are_named_by_file_folder_or_run(call, encoders):
    folder, paths = encoders
    tables = []
    for spelled in (lambda path: path, lambda path: path.parent, lambda path: path.parent.name):
        suspect, independent = spelled(paths["stolen"]), spelled(paths["independent1"])
        named = ("--victim", spelled(paths["victim"]), "--suspect", suspect, "--independent", independent)
        line = ("--method", "watermark", *named, "--num-test", "40", "--device", "cpu", "--precision", "fp32")
        code, out, err = call(verify, *line, folder=folder)
        assert code == 0, err
        tables.append(table_of(out))
        row = json.loads((folder / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
        assert (row["checkpoint"], row["victim"]) == (str(paths["stolen"]), str(paths["victim"]))
        assert out.splitlines()[-1].startswith(f"next: python detect.py --victim {paths['victim'].parent}")
    assert tables[0] == tables[1] == tables[2]


# ---- refusals ----


def test_neither_the_clean_encoder_below_a_mark_nor_its_copies_are_independent(encoders, tmp_path):
    _, paths = encoders
    clean, other = paths["copy1"], paths["independent1"]
    marked, copied = tmp_path / "marked.pth.tar", tmp_path / "copied.pth.tar"
    version = version_of(load_encoder(clean))
    save_checkpoint({**read_checkpoint(paths["copy2"]), "settings": {"weights": version}}, marked)
    save_checkpoint({**read_checkpoint(other), "stolen_from": version}, copied)
    assert len(open_candidates(marked, [clean, copied], [other])) == 4
    for path in (clean, copied):
        with pytest.raises(UserError, match=f"{path.name} is the victim or a copy of it"):
            open_candidates(marked, [], [path])


@pytest.fixture
def refuses(refused, encoders):
    """The line with which verify.py refuses; names of encoders stand for their files."""
    folder, paths = encoders

    def run_verify(*arguments, method="watermark", victim="victim", suspect="copy1"):
        named = ("--method", method, "--victim", victim, "--suspect", suspect, *arguments, "--device", "cpu")
        return refused(verify, *(paths.get(value, value) for value in named), folder=folder)

    return run_verify


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"victim": "independent1"}, "holds no watermark MLP"),
        ({"suspect": "nowhere.pth.tar"}, "no checkpoint at nowhere.pth.tar"),
        ({"victim": "copy1", "method": "dataset-inference"}, "does not say which data set it was trained on"),
        (("--level", "1"), "'1' is not a number above 0 and below 1"),
        (("--level", "0"), "is not a number above 0 and below 1"),
        (("--num-test", "1041"), "the test split of"),
        (("--num-test", "1"), "too few for a test"),
        (("--components", "5"), "--components has no effect with --method watermark"),
        (("--num-train", "50"), "--num-train has no effect with --method watermark"),
        (("--crops",), "--crops has no effect with --method watermark"),
        (("--num-test", "3", "--align"), "3 images are too few to align and to judge: give 4 or more"),
        ({"method": "similarity"}, "give --independent two or more"),
        (("--dataset", "cifar10"), "not cifar10: give --dataset npz:"),
        (("--independent", "stolen"), "is the victim or a copy of it"),
        (("--independent", "victim"), "is the victim or a copy of it"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, refuses):
    line = refuses(**arguments) if isinstance(arguments, dict) else refuses(*arguments)
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "method", "message"),
    [
        (("--align",), "dataset-inference", "--align has no effect with --method dataset-inference"),
        (("--num-test", "50"), "similarity", "--num-test has no effect with --method similarity"),
        (("--covariance", "full"), "similarity", "--covariance has no effect with --method similarity"),
        (("--covariance", "tied"), "dataset-inference", "invalid choice: 'tied'"),
    ],
)
def test_a_flag_of_another_method_is_refused(arguments, method, message, refuses):
    assert message in refuses(*arguments, method=method)


@pytest.mark.parametrize(
    ("flag", "number", "message"),
    [
        ("--num-train", 113, "was trained on 112 images, give 112 or less"),
        ("--components", 57, "more than the 56 images to fit: give 56 or less"),
    ],
)
def test_a_number_that_a_refusal_names_is_taken(flag, number, message, refuses, verified):
    assert message in refuses(flag, number, method="dataset-inference", suspect="stolen")
    given = re.search(r"give (\d+) or less", message)[1]
    assert "suspect" in verified("dataset-inference", ["stolen"], (), flag, given, *FEW, "--covariance", "diag")


def test_a_copys_queries_are_not_tested_on(refuses):
    line = refuses("--num-test", "1040", suspect="stolen")
    assert "40 of the 1040 test images were queried: give --num-test 1000 or less" in line


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ({}, "svhn", "svhn"),
        ({}, None, "does not say which data set it was trained on: give --dataset"),
        ({"dataset": "cifar10"}, None, "cifar10"),
        ({"dataset": "cifar10"}, "svhn", "was trained with dataset cifar10, not svhn: give --dataset cifar10"),
        ({"dataset": "npz:{here}"}, "npz:{folder}/../{name}/ours.npz", "npz:{here}"),
        ({"dataset": "npz:{here}"}, "svhn", "give --dataset npz:"),
        ({"dataset": "npz:moved/away.npz"}, "npz:{here}", "npz:{here}"),
        (
            {"dataset": "npz:moved/away.npz"},
            None,
            "was trained on npz:moved/away.npz, which is not there: give --dataset",
        ),
        ({"dataset": "imagenet"}, "folder:{folder}", "folder:{folder}"),
        ({"dataset": 5}, None, "which is not there: give --dataset"),
    ],
)
def test_the_victims_data_set_is_found_or_asked_for(settings, given, expected, encoders):
    folder, paths = encoders
    names = {"here": folder / "ours.npz", "folder": folder, "name": folder.name}
    settings, given, expected = (
        {key: str(value).format(**names) for key, value in settings.items()},
        given and given.format(**names),
        expected.format(**names),
    )
    victim = Candidate("victim", paths["victim"], {"settings": settings}, None)
    if "give --dataset" in expected:
        with pytest.raises(UserError, match=re.escape(expected)):
            dataset_of(OwnershipTest(dataset=given), victim)
    else:
        assert dataset_of(OwnershipTest(dataset=given), victim) == expected


@pytest.mark.parametrize("settings", [{"num_train": "x"}, {"num_train": 0}, {"seed": None}, {"losstype": []}])
def test_settings_of_strange_types_are_a_line(settings, encoders):
    _, paths = encoders
    forged = candidate(paths, "victim")
    forged.checkpoint["settings"] = {"num_train": 5, **settings}
    with pytest.raises(UserError, match=rf"settings: {next(iter(settings))} is not"):
        training_images(dataset_of_victim(paths), "datasets", forged)


@pytest.mark.parametrize("method", ["watermark", "dataset-inference"])
def test_a_suspect_whose_answers_are_no_numbers_is_named(method, refuses, encoders, tmp_path):
    _, paths = encoders
    content = read_checkpoint(paths["copy1"])
    content["state_dict"]["backbone.layer4.0.bn2.weight"].fill_(1e30)
    save_checkpoint(content, tmp_path / "huge.pth.tar")
    arguments = (*FEW, *(("--components", "2") if method == "dataset-inference" else ()))
    line = refuses(*arguments, method=method, suspect=tmp_path / "huge.pth.tar")
    assert "huge.pth.tar: an encoder gives representations" in line


def test_files_that_cannot_be_what_they_are_given_as_are_refused(refuses, encoders, tmp_path):
    _, paths = encoders
    with seeded(0):
        wide = build_encoder("resnet18")
    save_checkpoint({"state_dict": wide.state_dict()}, tmp_path / "wide.pth.tar")
    assert "gives representations of 512 numbers, the victim's watermark reads 256" in refuses(
        suspect=tmp_path / "wide.pth.tar"
    )
    save_checkpoint({"state_dict": {"fc.weight": torch.ones(2, 3)}}, tmp_path / "layer.pth.tar")
    assert "layer.pth.tar" in refuses(suspect=tmp_path / "layer.pth.tar")
    unfinished = {**read_checkpoint(paths["victim"]), "epoch": 2}
    save_checkpoint(unfinished, tmp_path / "unfinished.pth.tar")
    assert "stopped after epoch 2 of 4" in refuses(victim=tmp_path / "unfinished.pth.tar")
    assert WatermarkMLP.checkpoint_key in unfinished
