"""How close a copy is to its victim, on images that neither was trained on."""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.probes import Space, logistic_regression, top1_top5
from models import ARCHITECTURES, SimCLREncoder, build_encoder
from utils import UserError, seeded

EULER = 0.5772156649015329
SMALLEST = 1e-10  # distance of two images with the same representation, in the entropy's logarithm


def fidelity(
    copy: Tensor,
    victim: Tensor,
    output: Tensor | None = None,
    neighbours: int = 10,
    information: "InformationScore | None" = None,
) -> dict[str, float]:
    """How close a copy's representations (N, D) are to the victim's (N, E) of the same images.

    l2, cosine and centred_cosine: mean Euclidean and cosine distance, and `centred_cosines`, of `output` (N, E), the
    copy's features in the victim's width (the representations themselves if not given), left out where the widths
    differ. cka: `linear_cka`. overlap: `neighbour_overlap`. mutual_information: by `information`, left out without it.
    They are meaningful only in comparison with an independent encoder's figures.
    """
    output = copy if output is None else output
    figures = {}
    if output.shape == victim.shape:
        figures["l2"] = (output - victim).norm(dim=1).mean().item()
        figures["cosine"] = 1 - F.cosine_similarity(output, victim).mean().item()
        figures["centred_cosine"] = centred_cosines(output, victim).abs().mean().item()
    figures["cka"] = linear_cka(copy, victim)
    figures["overlap"] = neighbour_overlap(copy, victim, neighbours)
    if information is not None:
        figures["mutual_information"] = information(copy)
    return figures


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Debiased linear centred kernel alignment of (N, D) and (N, E): 1 for equal sets, about 0 for independent ones.

    HSIC(a, b) / sqrt(HSIC(a, a) HSIC(b, b)) (Kornblith et al., ICML 2019) with the unbiased estimator of HSIC (Song et
    al., JMLR 13, 2012), as Nguyen et al. (ICLR 2021) use it. It can be slightly negative. Invariant to
    turning, scaling and shifting either set. UserError for fewer than four images, 0 where a set does not vary.

    With the columns centred, the estimator's sums over pairs of different images follow from sums over images and from
    the D x E matrix a'b, so that no N x N matrix is made.
    """
    if len(a) < 4:
        raise UserError(f"{len(a)} images are too few for CKA: give 4 or more")
    a, b = (x - x.mean(dim=0) for x in (a.double(), b.double()))
    variance = _hsic(a, a) * _hsic(b, b)
    return (_hsic(a, b) / variance.sqrt()).item() if variance > 0 else 0.0


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    """The unbiased estimate, up to the factor 1 / (N (N - 3)), of linear HSIC of centred (N, D) and (N, E)."""
    n = len(a)
    own, other = a.square().sum(dim=1), b.square().sum(dim=1)
    pairs = (a.T @ b).square().sum()
    return pairs - n / (n - 2) * (own @ other) + own.sum() * other.sum() / ((n - 1) * (n - 2))


# ---- the scores of dataset inference's authors (Dziedzic et al., NeurIPS 2022, arXiv 2209.09024) ---------------------


def centred_cosines(a: Tensor, b: Tensor) -> Tensor:
    """The cosines (N,) of (N, D) and (N, D) by image, each dimension centred first; score C is their mean magnitude.

    Independent directions in D dimensions have a mean magnitude of sqrt(2 / (pi D)), not 0: 0.035 for 512. Shuffling
    the dimensions of either set destroys the score, shifting it or multiplying it by a number does not change it.
    """
    return F.cosine_similarity(a - a.mean(dim=0), b - b.mean(dim=0))


class InformationScore:
    """Score S of representations (N, D) of the victim's images: their mutual information with the victim's, rescaled.

    (I(f_v, f) - I(f_v, untrained)) / (I(f_v, f_v) - I(f_v, untrained)), clipped to [0, 1]: 1 for the victim, 0 for an
    untrained encoder. victim (N, E) and untrained (N, E'): representations of the same images. Shuffling dimensions or
    adding constant ones does not change it. Of more than `most` images evenly spaced ones are taken: the time grows
    with their square.
    """

    def __init__(self, victim: Tensor, untrained: Tensor, most: int = 5000):
        self.step = -(-len(victim) // most)
        self.victim = victim[:: self.step]
        self.high = mutual_information(self.victim, self.victim)
        self.low = mutual_information(self.victim, untrained[:: self.step])

    def __call__(self, h: Tensor) -> float:
        if self.high <= self.low:
            return 0.0
        share = (mutual_information(self.victim, h[:: self.step]) - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)


def mutual_information(a: Tensor, b: Tensor) -> float:
    """H(a) + H(b) - H(a, b) in nats of representations (N, D) and (N, E) of the same images.

    Each dimension is centred, each row then brought to length 1. Entropies are estimated from the distance of each row
    to its nearest neighbour (Kozachenko & Leonenko, 1987), as in the authors' code, which adds 1e-10 to the distance
    too. In hundreds of dimensions the estimate is far from the true information: only `InformationScore` has a meaning.
    Constant dimensions, which carry no information, are left out.
    """
    a, b = (_unit_rows(x) for x in (a, b))
    return _entropy(a) + _entropy(b) - _entropy(a, b)


def _unit_rows(x: Tensor) -> Tensor:
    x = x[:, x.amax(dim=0) > x.amin(dim=0)].double()
    return F.normalize(x - x.mean(dim=0), dim=1)


def _entropy(*parts: Tensor) -> float:
    """The nearest-neighbour estimate, in nats, of the entropy of the rows (N, D) of all parts side by side."""
    count, width = len(parts[0]), sum(part.shape[1] for part in parts)
    nearest = []
    for start in range(0, count, 1000):  # the neighbour is sought in float32, its distance is exact
        rows = slice(start, start + 1000)
        alike = sum(part[rows].float() @ part.float().T for part in parts)
        alike[:, start:].fill_diagonal_(-math.inf)
        neighbour = alike.argmax(dim=1)
        nearest.append(sum((part[rows] - part[neighbour]).square().sum(dim=1) for part in parts).sqrt())
    volume = width / 2 * math.log(math.pi) - math.lgamma(width / 2 + 1)  # of the unit ball
    mean = (torch.cat(nearest) + SMALLEST).log().mean().item()
    return width * mean + volume + math.log(count - 1) + EULER


def untrained_like(encoder: SimCLREncoder, seed: int) -> SimCLREncoder | None:
    """An untrained encoder of the same architecture for the same images; None where it cannot be built here."""
    if encoder.arch not in ARCHITECTURES:
        return None
    with seeded(seed, "untrained"):
        return build_encoder(encoder.arch, normalize=encoder.normalize, input_size=encoder.input_size)


# ---- neighbours, classifiers -----------------------------------------------------------------------------------------


def nearest_neighbours(features: Tensor, neighbours: int = 10) -> Tensor:
    """The positions (N, K) of the K nearest other rows of (N, D) by cosine, K = `neighbours` or, of few rows, N - 1."""
    unit, neighbours = F.normalize(features, dim=1), min(neighbours, len(features) - 1)
    parts = []
    for start in range(0, len(unit), 1000):
        similarity = unit[start : start + 1000] @ unit.T
        similarity[:, start:].fill_diagonal_(-2)  # an image is no neighbour of itself
        parts.append(similarity.topk(neighbours, dim=1).indices)
    return torch.cat(parts)


def shared_neighbours(a: Tensor, b: Tensor) -> Tensor:
    """The share in [0, 1] of each row's neighbours by `nearest_neighbours` (N, K) that (N, K) has too: (N,)."""
    return (a[:, :, None] == b[:, None, :]).any(dim=2).float().mean(dim=1)


def neighbour_overlap(a: Tensor, b: Tensor, neighbours: int = 10) -> float:
    """The mean share in percent of the nearest neighbours by cosine that are common to (N, D) and (N, E)."""
    return 100.0 * shared_neighbours(*(nearest_neighbours(features, neighbours) for features in (a, b))).mean().item()


def agreement(a: Tensor, b: Tensor) -> float:
    """Share in percent of images for which two classifiers' predictions (N,) agree."""
    return 100.0 * (a == b).float().mean().item()


def classifier_figures(copy: Tensor, victim: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracies in percent of a copied classifier and of its victim, by their logits (N, C), and their agreement."""
    return {
        **top1_top5(copy, labels),
        "victim_top1": top1_top5(victim, labels)["top1"],
        "agreement": agreement(copy.argmax(dim=1), victim.argmax(dim=1)),
    }


def compare(
    spaces: Mapping[str, Space],
    seed: int = 0,
    head: Callable[[Tensor], Tensor] | None = None,
    untrained: Tensor | None = None,
) -> dict[str, float]:
    """`fidelity` of `copy` to `victim` on test images, and the agreement of their downstream predictions.

    The same figures of `independent` have the prefix independent_. `head` maps the copy's representations to the
    victim's width where the widths differ; predictions are by `logistic_regression`. untrained: representations of the
    test images by an untrained encoder of the victim's architecture, for `InformationScore`.
    """
    predictions = {name: logistic_regression(*space, seed).predictions for name, space in spaces.items()}
    seen = {name: test[0] for name, (_, test) in spaces.items()}
    information = None if untrained is None else InformationScore(seen["victim"], untrained)
    figures = {}
    for name, prefix in (("copy", ""), ("independent", "independent_")):
        output = head(seen[name]) if head and name == "copy" else None
        close = fidelity(seen[name], seen["victim"], output, information=information)
        close["agreement"] = agreement(predictions[name], predictions["victim"])
        figures |= {prefix + key: value for key, value in close.items()}
    return figures
