"""Traces of a defence in a copy of what was answered: the words of `mark`, and the map of an account by `transform`.

The victim is judged by the answers that it gives, since the traces are in these alone. What an encoder has in common
with the secret by chance is known without other encoders: from keys or maps that the owner might have drawn as well.
An encoder that has nothing to do with the answers has nothing to do with the secret, so the true one has each rank
among them with the same probability.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data_aug.digests import perceptual_hashes
from defenses.mark import Mark, MarkKey
from defenses.transform import Transform
from evaluation.candidates import (
    PROBES,
    Candidate,
    Figures,
    Measured,
    OwnershipTest,
    asked_images,
    dataset_of,
    represent_by,
    unseen_images,
)
from evaluation.statistics import against, cohens_d, distance_from, kolmogorov_smirnov, rank_p
from utils import Precision, UserError, generator

OTHERS = 199  # secrets that the true one is compared with: no p-value is below 0.005
ENOUGH = 30  # images with a word, below which a line says that they are few

Measuring = tuple[Callable[[Candidate], Measured], dict[str, int]]


def check_answer_width(rows: Tensor, width: int) -> None:
    """UserError where representations (N, D) are not as wide as the answers."""
    if rows.shape[1] != width:
        raise UserError(
            f"gives representations of {rows.shape[1]} numbers, the victim's answers have {width}: "
            f"verify it by --method dataset-inference"
        )


# ---- mark ------------------------------------------------------------------------------------------------------------


def measure_words(
    test: OwnershipTest, root: Path, candidates: Sequence[Candidate], precision: Precision, seed: int
) -> Measuring:
    """Measures the cosines to a key's directions with its words (M,) and without (P,), as `cosines_by_words` has them;
    and the mean of those with words, by the true key and by others (1 + OTHERS,).

    UserError where fewer than two images have a word, or an encoder is not as wide as the victim.
    """
    victim, mark = candidates[0], test.defence
    assert isinstance(mark, Mark)
    choose = asked_images if test.asked else unseen_images
    images = choose(test, dataset_of(test, victim), root, candidates)
    hashes, dim = perceptual_hashes(images, mark.secret), victim.encoder.dim
    draws = (generator(mark.secret, f"mark/{number}") for number in range(OTHERS))
    keys = [mark.key(dim), *(MarkKey.draw(one, mark.mark_directions, dim) for one in draws)]
    count = int((keys[0].words(hashes) > 0).any(dim=1).sum())
    few = f"{count} of {len(images)} images have a word of the mark"
    if count < 2 or count == len(images):
        raise UserError(f"{few}: judge by more images (--num-test, --asked)")
    if count < ENOUGH:
        print(f"note: {few}, which is few: judge by more images (--num-test, --asked)")

    def measure(candidate: Candidate) -> Measured:
        rows = represent_by(candidate, images, precision).cpu()
        check_answer_width(rows, dim)
        rows = F.normalize(mark.mark(rows, hashes) if candidate.kind == "victim" else rows, dim=1)
        both = [cosines_by_words(rows, key, hashes) for key in keys]
        return *both[0], torch.stack([marked.mean() for marked, _ in both]).nan_to_num()

    return measure, {"asked_images" if test.asked else "test_images": len(images), "marked_images": count}


def cosines_by_words(unit: Tensor, key: MarkKey, hashes: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of unit rows (N, D) to each direction, of images with a word of it (M,), and of those without any (P,).

    The mean of the latter is taken off the cosines to each direction: so the first's mean is the published figure.
    """
    words, cosines = key.words(hashes), unit @ key.towards.T
    plain = (words == 0).all(dim=1)
    cosines = cosines - cosines[plain].mean(dim=0)
    return cosines[words > 0], cosines[plain].flatten()


def judge_words(measured: Measured, others: Sequence[Measured]) -> Figures:
    """Differences, effect size and p-values of the cosines with words and without; `others`: of independent encoders.

    cosine_difference, l2_difference and p_ks are EmbMarker's: the mean cosine with words less that without, the same of
    squared distances between unit vectors (-2 times the former), and Kolmogorov and Smirnov's test. Images with words
    differ from others in what they show, so p_ks alone accuses innocent encoders too. p_keys: `rank_p` of the
    difference among those by other keys. p_t: the paired t-test of the cosines with words against each one's mean over
    `others`. p_encoders: `further_draw` of the difference. effect: Cohen's d against `others`, or else those without.
    """
    marked, plain, means = measured
    difference = means[0].item()
    figures = {"cosine_difference": difference, "l2_difference": -2 * difference}
    figures |= {"effect": cohens_d(marked, plain), "p_ks": kolmogorov_smirnov(marked, plain), "p_keys": rank_p(means)}
    return figures | against(marked, difference, [rows for rows, *_ in others], [all_[0].item() for *_, all_ in others])


# ---- transform -------------------------------------------------------------------------------------------------------


def measure_map(
    test: OwnershipTest, root: Path, candidates: Sequence[Candidate], precision: Precision, seed: int
) -> Measuring:
    """Measures cosines with the victim's representations once the account's map is undone (N,), and their means by its
    map and by those of other accounts (1 + OTHERS,).

    UserError for a map that cannot be undone, or an encoder that is not as wide as the answers.
    """
    victim, transform = candidates[0], test.defence
    assert isinstance(transform, Transform)
    images = unseen_images(test, dataset_of(test, victim), root, candidates)[:PROBES]
    accounts = [test.account, *(f"{test.account}/{number}" for number in range(OTHERS))]
    dim = victim.encoder.dim
    transform.inverse(test.account, dim)  # refuses what cannot be undone before anything is measured
    own = represent_by(victim, images, precision).cpu()

    def measure(candidate: Candidate) -> Measured:
        rows = represent_by(candidate, images, precision).cpu()
        rows = transform.map_of(test.account, dim)(rows) if candidate.kind == "victim" else rows
        check_answer_width(rows, transform.width(dim))
        cosines = [F.cosine_similarity(transform.inverse(name, dim)(rows), own, dim=1) for name in accounts]
        return cosines[0], torch.stack([values.mean() for values in cosines])

    return measure, {"test_images": len(images), "account": test.account}


def judge_map(measured: Measured, others: Sequence[Measured]) -> Figures:
    """Cosine, squared distance, effect size and p-values once the map is undone; `others`: of independent encoders.

    cosine and l2 are WET's: the mean cosine, and the mean squared distance between unit vectors (2 less twice the
    former). p_maps: `rank_p` of the cosine among those by other accounts' maps. p_t: the paired t-test against each
    image's mean over `others`. p_encoders: `further_draw` of the cosine. effect: Cohen's d against `others`, or else
    the distance from other accounts' maps in their standard deviations.
    """
    cosines, means = measured
    cosine = means[0].item()
    figures = {"cosine": cosine, "l2": 2 - 2 * cosine, "effect": -distance_from(means[1:], cosine)}
    figures["p_maps"] = rank_p(means)
    return figures | against(cosines, cosine, [rows for rows, _ in others], [all_[0].item() for _, all_ in others])
