"""Evidence of theft: the methods of verify.py, measured on an encoder and compared with independent encoders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_aug.datasets import same_source
from defenses.dataset_inference import halves, log_likelihoods, random_crops, under_determined
from defenses.watermark import check_width, read_watermark, watermark_scores
from evaluation.alignment import Alignment
from evaluation.answer_marks import judge_map, judge_words, measure_map, measure_words
from evaluation.candidates import (
    SIMILARITY_IMAGES,
    Candidate,
    Figures,
    Measured,
    OwnershipTest,
    dataset_of,
    in_victims_coordinates,
    represent_by,
    split_probes,
    training_images,
    unseen_images,
)
from evaluation.fidelity import InformationScore, centred_cosines
from evaluation.marks import judge_mark, measure_mark
from evaluation.statistics import against, cohens_d, distance_from, further_draw, sign_test, welch
from utils import Precision, UserError, generator

Counts = dict[str, int | str | bool]  # numbers of images, and the method's settings
Measure = Callable[[Candidate], Measured]
# (test, data root, candidates, precision, seed) -> a function that measures a candidate, and what it measures by.
Prepare = Callable[[OwnershipTest, Path, Sequence[Candidate], Precision, int], tuple[Measure, Counts]]


# ---- the watermark ---------------------------------------------------------------------------------------------------


def measure_watermark(
    test: OwnershipTest, root: Path, candidates: Sequence[Candidate], precision: Precision, seed: int
) -> tuple[Measure, Counts]:
    """Measures whether each image's two turned versions were read right, bool (2, N), and its mean score (N,)."""
    victim = candidates[0]
    mlp = read_watermark(victim.checkpoint, str(victim.path))
    check_width(mlp, victim.encoder, str(victim.path))
    for candidate in candidates:
        if not test.align:
            check_width(mlp, candidate.encoder, str(candidate.path))
    images = unseen_images(test, dataset_of(test, victim), root, candidates)
    images, encoder_of, counts = in_victims_coordinates(test, images, candidates, precision, seed)

    def measure(candidate: Candidate) -> Measured:
        right, probability = watermark_scores(encoder_of(candidate), mlp, images, precision, seed)
        # The two versions of an image are not independent draws, so they are averaged.
        return right.view(2, -1), probability.view(2, -1).mean(dim=0)

    return measure, {"test_images": len(images), **counts}


def judge_watermark(measured: Measured, others: Sequence[Measured]) -> Figures:
    """Accuracy in percent, effect size and p-values of a watermark reading; `others`: independent encoders' readings.

    p_binomial: images with both versions read right, against those with both read wrong. The remaining images say
    nothing: an MLP that always gives the same answer reads one version of each right. p_t: the paired t-test against
    each image's mean score over `others`. p_encoders: `further_draw` of the accuracy. effect: Cohen's d of the scores
    against those of `others`, or without others their distance from 0.5.
    """
    right, score = measured
    accuracy = 100 * right.double().mean().item()
    wins, losses = right.all(dim=0).sum().item(), (~right).all(dim=0).sum().item()
    figures = {"accuracy": accuracy, "effect": distance_from(score, 0.5), "p_binomial": sign_test(wins, losses)}
    accuracies = [100 * read.double().mean().item() for read, _ in others]
    return figures | against(score, accuracy, [other for _, other in others], accuracies)


# ---- dataset inference -----------------------------------------------------------------------------------------------


def measure_inference(
    test: OwnershipTest, root: Path, candidates: Sequence[Candidate], precision: Precision, seed: int
) -> tuple[Measure, Counts]:
    """Measures log-likelihoods of images that the victim was trained on (N,), and of images that it never saw (M,)."""
    dataset = dataset_of(test, candidates[0])
    mixture = test.mixture(str(candidates[0].settings.get("dataset", dataset)))
    trained = training_images(dataset, root, candidates[0])
    fitted, held_out = halves(len(trained), test.num_train, seed)
    unseen = unseen_images(test, dataset, root, candidates)
    count = len(fitted)
    if mixture.components > count:
        raise UserError(
            f"--components {mixture.components} is more than the {count} images to fit: give {count} or less"
        )
    for line in _inference_notes(dataset, candidates, under_determined(mixture, count, _widest(candidates))):
        print(f"note: {line}")
    parts = [trained[fitted], trained[held_out], unseen]
    if test.crops:
        draws = generator(seed, "crops")
        parts = [random_crops(images, draws) for images in parts]

    def measure(candidate: Candidate) -> Measured:
        rows = [represent_by(candidate, images, precision) for images in parts]
        return log_likelihoods(*rows, mixture=mixture, seed=seed)

    counts = {"fitted_images": count, "held_out_images": len(held_out), "test_images": len(unseen)}
    return measure, {**counts, **vars(mixture), "crops": test.crops}


def _widest(candidates: Sequence[Candidate]) -> int:
    return max(candidate.encoder.dim for candidate in candidates)


def _inference_notes(dataset: str, candidates: Sequence[Candidate], too_few: str | None) -> list[str]:
    """What weakens the method with this data set and these encoders."""
    lines = [
        f"{candidate.path} was trained on images of {dataset} too: dataset inference may call it stolen for that"
        for candidate in candidates
        if candidate.kind == "independent" and same_source(str(candidate.settings.get("dataset")), dataset)
    ]
    if dataset == "svhn":
        lines.append("svhn's two splits differ by themselves: the method needs a victim trained on svhn-merged")
    if dataset == "stl10":
        lines.append("stl10's unlabelled images are of more classes than its test images: they differ by themselves")
    return lines + ([too_few] if too_few else [])


def judge_inference(measured: Measured, others: Sequence[Measured]) -> Figures:
    """Difference in nats, Cohen's d and p-values of log-likelihoods; `others`: those of independent encoders.

    p_t: Welch's t-test of held-out training images against unseen images, which are other images, so that nothing is
    paired. p_encoders: `further_draw` of the effect.
    """
    trained, unseen = measured
    effect = cohens_d(trained, unseen)
    difference = (trained.mean() - unseen.mean()).item()
    figures = {"difference": difference, "effect": effect, "p_t": welch(trained, unseen)}
    if len(others) > 1:
        figures["p_encoders"] = further_draw(effect, [cohens_d(*other) for other in others])
    return figures


# ---- similarity ------------------------------------------------------------------------------------------------------


def measure_similarity(
    test: OwnershipTest, root: Path, candidates: Sequence[Candidate], precision: Precision, seed: int
) -> tuple[Measure, Counts]:
    """Measures magnitudes of `centred_cosines` with the victim (N,) and `InformationScore` (1,) on training images.

    The second is empty without an untrained encoder. UserError with fewer than two independent encoders, without which
    neither score has a meaning, and for encoders of another width than the victim's without --align.
    """
    victim = candidates[0]
    if sum(candidate.kind == "independent" for candidate in candidates) < 2:
        raise UserError("similarity is judged beside that of independent encoders: give --independent two or more")
    for candidate in candidates:
        if candidate.encoder.dim != victim.encoder.dim and not test.align:
            raise UserError(
                f"{candidate.path} gives representations of {candidate.encoder.dim} numbers, the victim of "
                f"{victim.encoder.dim}: give --align"
            )
        if candidate.kind in ("suspect", "independent") and begin_alike(candidate, victim):
            print(f"note: {candidate.path} began with the victim's initial weights: prefer one of another seed")
            if candidate.kind == "suspect":
                candidate.doubt = "it began with the victim's initial weights, which alone make encoders similar"
    images = training_images(dataset_of(test, victim), root, victim)
    number = min(len(images), SIMILARITY_IMAGES) if test.num_train is None else test.num_train
    if number > len(images):
        raise UserError(
            f"--num-train {number}: the victim was trained on {len(images)} images, give {len(images)} or less"
        )
    images = images[torch.randperm(len(images), generator=generator(seed, "similarity"))[:number]]
    probes, images = split_probes(test, images, candidates, seed)
    own, target = (represent_by(victim, part, precision) for part in (images, probes))
    control = next((candidate for candidate in candidates if candidate.kind == "untrained"), None)
    information = control and InformationScore(own, represent_by(control, images, precision))

    def measure(candidate: Candidate) -> Measured:
        h = represent_by(candidate, images, precision)
        score = torch.tensor([information(h)] if information else [])
        if test.align:
            h = Alignment(represent_by(candidate, probes, precision), target)(h)
        return centred_cosines(h, own).abs().cpu(), score

    return measure, {"training_images": len(images), **({"aligned_by_images": len(probes)} if test.align else {})}


def begin_alike(candidate: Candidate, victim: Candidate) -> bool:
    """Whether two encoders' initial weights are the same, which leaves similar dimensions at the same places."""
    ours, theirs = (
        (one.settings.get("seed"), one.encoder.arch, one.checkpoint.get("drawn_for")) for one in (victim, candidate)
    )
    return theirs[0] is not None and ours == theirs


def judge_similarity(measured: Measured, others: Sequence[Measured]) -> Figures:
    """Scores C and S of dataset inference's authors, and effect size and p-values of C; `others`: of independents.

    p_t: the paired t-test against each image's mean over `others`. p_encoders: `further_draw` of C. effect: Cohen's d
    of the magnitudes against those of `others`. S decides nothing: it is high for some independent encoders too.
    """
    cosines, score = measured
    figures = {"centred_cosine": cosines.mean().item(), "effect": 0.0}
    if len(score):
        figures["mutual_information"] = score.item()
    means = [other.mean().item() for other, _ in others]
    return figures | against(cosines, figures["centred_cosine"], [other for other, _ in others], means)


# ---- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A way to recognise copies: its measurements, the figures from them, the figure for the ROC, a verdict's claim."""

    prepare: Prepare
    judge: Callable[[Measured, Sequence[Measured]], Figures]
    score: str
    claim: str


METHODS = {
    "watermark": Method(
        *(measure_watermark, judge_watermark, "accuracy"),
        "the victim's MLP is right on {accuracy:.1f} % of the turned images",
    ),
    "sslguard": Method(
        *(measure_mark, judge_mark, "key_cosine"),
        "the victim's key is read from {share:.1f} % of the images with its trigger, mean cosine {key_cosine:.2f}",
    ),
    "mark": Method(
        *(measure_words, judge_words, "cosine_difference"),
        "cosine to the secret directions greater by {cosine_difference:.3f} on images with the mark's words",
    ),
    "transform": Method(
        *(measure_map, judge_map, "cosine"),
        "cosine {cosine:.3f} with the victim's representations once the account's map is undone",
    ),
    "dataset-inference": Method(
        *(measure_inference, judge_inference, "effect"),
        "log-likelihood of the victim's training images minus that of unseen images {difference:.3g} nats",
    ),
    "similarity": Method(
        *(measure_similarity, judge_similarity, "centred_cosine"),
        "mean magnitude {centred_cosine:.3f} of the cosine with the victim's centred representations",
    ),
}


def measure_all(
    test: OwnershipTest, root: Path, candidates: Sequence[Candidate], precision: Precision, seed: int
) -> Counts:
    """Measure every candidate by the test's method; returns the numbers of images and the method's settings."""
    measure, counts = METHODS[test.method].prepare(test, root, candidates, precision, seed)
    for candidate in candidates:
        try:
            candidate.measured = measure(candidate)
        except UserError as error:
            raise UserError(f"{candidate.path}: {error}") from None
        candidate.encoder.cpu()
    return counts
