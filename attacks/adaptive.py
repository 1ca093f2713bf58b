"""Attackers who adapt to a defence: through which accounts they query which images, and how they restore answers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks import CSE
from attacks.answers import Answers
from attacks.client import Client
from data_aug.images import Images
from defenses.buckets import Coverage, Hyperplanes
from utils import UserError

PILOT = 0.1  # share of its images that an attacker who avoids buckets queries before it chooses
BITS = 12  # of that attacker's hash table: the owner's is secret, but all such tables fill alike
CLUSTERS, CLUSTER_SIZE = 20, 500  # so many clusters of answers, or as many as keep them to this size on average
FLAGGED = 0.025  # pairs of answers that are flagged, for each answer
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)  # relative to the mean variance of a dimension


# ---- several accounts ------------------------------------------------------------------------------------------------


def ask_as_sybils(client: Client, sent: Images, sources: Tensor, sybils: int, shared: int) -> tuple[Tensor, list[str]]:
    """Answers (R, D) to R images, spread over accounts; every account queries the first `shared` images.

    Each account's answers are mapped to the first account's coordinates by the linear map that fits the shared rows
    best, so neither secret transforms by account nor query counts by account stop the attack.
    """
    common, rest = torch.arange(shared), torch.arange(shared, len(sent)).chunk(sybils)
    parts, found = [], []
    for number, others in enumerate(rest):
        rows = torch.cat([common, others])
        answers = client.ask(sent[rows], sources[rows], f"sybil-{number + 1}")
        if number == 0:
            reference = answers[:shared]
            parts.append(answers)
            continue
        if answers[:shared].isnan().any():  # lost, and beyond the budget: nothing says how to map the others
            parts.append(torch.full((len(others), reference.shape[1]), torch.nan))
            continue
        mapped, error = align(answers[:shared], reference, answers[shared:])
        found.append(f"account {number + 1} maps to account 1 with {100 * error:.1f} % of the variance unexplained")
        parts.append(mapped)
    return torch.cat(parts), found


def align(theirs: Tensor, ours: Tensor, more: Tensor) -> tuple[Tensor, float]:
    """Map `more` answers (M, E) of an account to another account's coordinates (M, D), by ridge regression.

    theirs (S, E), ours (S, D): the accounts' answers to the same queries. Also returns the share of ours' variance that
    the map leaves unexplained. The penalty is chosen, and this share measured, on a held-out fifth.
    """
    fifth = max(1, len(theirs) // 5)

    def error(ridge: float) -> float:
        guess = _ridge(theirs[fifth:], ours[fifth:], ridge)(theirs[:fifth])
        rest = ours[:fifth] - ours[fifth:].mean(dim=0)
        return ((guess - ours[:fifth]).square().sum() / rest.square().sum().clamp_min(1e-30)).item()

    errors = {ridge: error(ridge) for ridge in RIDGES}
    best = min(errors, key=errors.get)
    return _ridge(theirs, ours, best)(more), errors[best]


def _ridge(x: Tensor, y: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """The affine map from (S, E) to (S, D) of least squared error + ridge * mean variance * |map|^2, in float64."""
    x, y = x.double(), y.double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    gram = (x - x_mean).T @ (x - x_mean)
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean))
    return lambda more: ((more.double() - x_mean) @ weight + y_mean).float()


# ---- few buckets -----------------------------------------------------------------------------------------------------


def ask_within(
    client: Client, images: Images, features: Tensor, count: int, percent: float, draws: torch.Generator
) -> tuple[Tensor, Tensor, str]:
    """Query at most `count` of N images, staying in few buckets.

    The first tenth is taken as it comes. A ridge regression from the attacker's features (N, F) to the answers then
    predicts all other answers; the images predicted nearest by cosine to the centre of the fullest bucket are queried
    next, a tenth at a time, and the regression is fitted anew. This ends when `count` images are queried or the
    attacker's hash table is `percent` full. Returns the images' indices (M,), their answers (M, D) and a summary.
    """
    step = max(1, int(PILOT * count))
    index = torch.arange(min(step, count))
    answers = client.ask(images[index], index)
    table = Coverage(Hyperplanes.draw(BITS, answers.shape[1], draws))
    occupied = table.add(answers)[-1].item()
    left = torch.ones(len(images), dtype=torch.bool)
    left[index] = False
    bucket = table.cells(answers)
    centre = answers[bucket == bucket.mode().values].mean(dim=0)
    while len(index) < count and occupied < percent:
        guess = _ridge(features[index], answers, 1e-2)(features)
        closeness = F.cosine_similarity(guess, centre[None]).masked_fill(~left, -torch.inf)
        chosen = closeness.topk(min(step, count - len(index))).indices
        new = client.ask(images[chosen], chosen)
        bought = ~new.isnan().any(dim=1)  # after a loss the budget may end earlier
        if not bought.any():
            break
        occupied = table.add(new[bought])[-1].item()
        left[chosen] = False
        index, answers = torch.cat([index, chosen[bought]]), torch.cat([answers, new[bought]])
    return index, answers, f"{len(index)} of {count} images queried, the attacker's hash table {occupied:.2f} % full"


# ---- restoring answers -----------------------------------------------------------------------------------------------


def restore_answers(bought: Answers) -> Answers:
    """The answers bought, without those that the defence replaced, and with the others restored.

    The mean of an image's good answers stands in for its replaced answers; an image without good answers is dropped.
    """
    images = len(bought)
    good = ~replaced(bought.rows).view(-1, images)
    keep = good.any(dim=0)
    answers, found = restore(bought.rows[good.flatten()])
    whole = torch.zeros(good.numel(), answers.shape[1])
    whole[good.flatten()] = answers
    whole = whole.view(*good.shape, -1)
    mean = whole.sum(dim=0) / good.sum(dim=0).clamp_min(1)[:, None]
    whole = torch.where(good[..., None], whole, mean)[:, keep].flatten(0, 1)
    words = f"{(~good).sum().item()} of {good.numel()} answers were replaced, {images - keep.sum().item()} images lost"
    return bought.only(keep, whole, words, found)


def replaced(answers: Tensor) -> Tensor:
    """Which answers (N, D) were replaced: those whose norms lie beyond a gap of a factor of 10 between norms."""
    norms = answers.norm(dim=1)
    ordered = norms.sort().values
    ratio = ordered[1:] / ordered[:-1].clamp_min(1e-12)
    if len(ratio) == 0 or ratio.max() < 10 or ordered[-1] < 10 * ordered.clamp_min(1e-12)[0]:
        return torch.zeros_like(norms, dtype=torch.bool)
    return norms > ordered[ratio.argmax()]


def restore(answers: Tensor) -> tuple[Tensor, str]:
    """Estimates answers (N, D) as they were before top-k, rounding or noise; also says in words what was found.

    Representations lie close to a low-dimensional subspace, which all answers together show. Numbers that top-k removed
    are filled in from it; errors by rounding and noise are shrunk towards it.
    """
    kept = (answers != 0).sum(dim=1)
    most = kept.max().item()
    if most < answers.shape[1] and (kept == most).float().mean() > 0.5:
        return complete_topk(answers, most), f"top-k with k = {most}: the rest is filled in"
    for decimals in range(5):
        if torch.allclose(answers, answers.round(decimals=decimals), rtol=0, atol=1e-6):
            half = 0.5 * 10**-decimals
            smooth, _ = denoise(answers, sigma=half / 3**0.5)  # of an error that is uniform over the step
            return smooth.clamp(answers - half, answers + half), f"rounding to {decimals} decimals: smoothed within it"
    if (answers == 0).any():  # zeros of a ReLU: noise would have moved them
        return answers, "no rounding, top-k or noise was found: answers are used as they are"
    smooth, sigma = denoise(answers)
    # Representations after a ReLU begin at 0, so an answer's smallest numbers are about the mean of the noise.
    shift = smooth.quantile(0.02, dim=1).mean().clamp_min(0)
    return smooth - shift, f"noise: mean about {shift:.2f}, standard deviation about {sigma:.2f}: shrunk"


def denoise(answers: Tensor, sigma: float | None = None) -> tuple[Tensor, float]:
    """Removes most of an additive noise of independent entries from answers (N, D); returns also its deviation.

    Singular values of the centred matrix are shrunk by the optimal rule for squared error (Gavish & Donoho, IEEE Trans.
    Inf. Theory 2017, equation 7). An unknown sigma is estimated by comparing the lowest tenth of the spectrum, which is
    little but noise, with that of a matrix of pure noise of the same size.
    """
    rows, dim = answers.shape
    centred = (answers - answers.mean(dim=0)).double()
    variance, basis = _spectrum(centred)
    if sigma is None:
        pure = torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        lowest = slice(0, max(1, len(variance) // 10))
        unit = _spectrum(pure - pure.mean(dim=0))[0]
        sigma = (variance[lowest].mean() / unit[lowest].mean()).sqrt().item()
    if sigma < 1e-9 * centred.std().item():
        return answers, sigma
    # In units of sigma times the root of the longer side, the spectrum of noise ends at 1 + sqrt(ratio of the sides).
    ratio = min(rows, dim) / max(rows, dim)
    y = (variance * rows / max(rows, dim)).sqrt() / sigma
    square = (y.square() - ratio - 1).square() - 4 * ratio
    shrunk = torch.where(y > 1 + ratio**0.5, square.clamp_min(0).sqrt() / y.clamp_min(1e-12), 0.0)
    factor = shrunk / y.clamp_min(1e-12)
    return (centred @ (basis * factor) @ basis.T).float() + answers.mean(dim=0), sigma


def _spectrum(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (R,), smallest first, and directions (D, R) of centred rows (N, D); R is the largest possible rank."""
    variance, basis = torch.linalg.eigh(centred.T @ centred / len(centred))
    rank = min(len(centred) - 1, centred.shape[1])
    return variance[-rank:].clamp_min(0), basis[:, -rank:]


def complete_topk(answers: Tensor, k: int, rounds: int = 20) -> Tensor:
    """Fill in the zeros of answers (N, D) by low-rank completion, between 0 and the smallest number that was kept.

    An answer with fewer than k numbers is complete. The rank is a sixteenth of the width: among ranks 4 to 64 at width
    256 it did well for every k tried, on encoders of shapes and of CIFAR-10.
    """
    known = (answers != 0) | ((answers != 0).sum(dim=1, keepdim=True) < k)
    magnitude = answers.abs().masked_fill(answers == 0, torch.inf).amin(dim=1, keepdim=True)
    low = -magnitude if (answers < 0).any() else torch.zeros_like(magnitude)
    rank = max(1, answers.shape[1] // 16)
    filled = answers
    for _ in range(rounds):
        mean = filled.mean(dim=0)
        basis = _spectrum((filled - mean).double())[1][:, -rank:].float()
        guess = (filled - mean) @ basis @ basis.T + mean
        filled = torch.where(known, answers, guess.clamp(low, magnitude))
    return filled


# ---- removing a mark -------------------------------------------------------------------------------------------------


def check_components(components: int, dim: int) -> None:
    """UserError for as many components as an answer has numbers, which would leave nothing of it."""
    if components >= dim:
        raise UserError(f"--cse-components {components} of the {dim} numbers of an answer leave nothing: give fewer")


def without_mark(bought: Answers, features: Tensor, components: int) -> Answers:
    """The answers bought, as `project_out` leaves them. features (V * M, F): the attacker's own of what was sent."""
    flagged = disagreeing(bought.rows, features)
    rows = project_out(bought.rows, flagged, components)
    words = f"{CSE}: {len(flagged)} of {len(rows)} answers are like others that the attacker's encoder finds different"
    return bought.only(torch.ones(len(bought), dtype=torch.bool), rows, words)


def disagreeing(answers: Tensor, features: Tensor) -> Tensor:
    """Which answers (N, D) are closer to some than the attacker's features (N, F) of the same images: indices (M,).

    CSE's clustering and selection (Shetty et al., ACL 2024). Pairs are those within the clusters of k-means of unit
    answers. They are ranked by the cosine of their answers and by that of their features. Those whose first rank is
    furthest above the second are flagged, 0.025 N of them, with both of their answers.
    """
    from sklearn.cluster import KMeans  # here, so that an attack without it does not wait for the import

    unit, own = (F.normalize(rows.cpu().float(), dim=1) for rows in (answers, features))
    clusters = min(len(unit), max(CLUSTERS, len(unit) // CLUSTER_SIZE))
    labels = torch.from_numpy(KMeans(clusters, n_init=1, random_state=0).fit_predict(unit.numpy()))
    pairs, cosines = [], []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        both = torch.triu_indices(len(members), len(members), 1)
        pairs.append(members[both])
        cosines.append(torch.stack([(rows[members] @ rows[members].T)[*both] for rows in (unit, own)]))
    pairs, cosines = torch.cat(pairs, dim=1), torch.cat(cosines, dim=1)
    if not pairs.shape[1]:
        raise UserError(f"--restore {CSE} compares answers of a cluster, and {len(unit)} are too few: buy more")
    ranks = cosines.argsort(dim=1).argsort(dim=1)
    count = min(pairs.shape[1], max(1, int(FLAGGED * len(unit))))
    return pairs[:, (ranks[0] - ranks[1]).topk(count).indices].unique()


def project_out(answers: Tensor, flagged: Tensor, components: int) -> Tensor:
    """Answers (N, D) without the first right singular vectors of those flagged (M,), each as long as it was.

    CSE's elimination: unit rows, not centred; what is left of a row is normalised, and here has its length again.
    """
    unit = F.normalize(answers.double(), dim=1)
    directions = torch.linalg.svd(unit[flagged], full_matrices=False).Vh[:components]
    left = F.normalize(unit - unit @ directions.T @ directions, dim=1)
    return (answers.norm(dim=1, keepdim=True) * left).to(answers)
