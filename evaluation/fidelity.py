"""How close a copy is to its victim, on images that neither was trained on."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.probes import Space, logistic_regression, top1_top5


def fidelity(copy: Tensor, victim: Tensor, output: Tensor | None = None, neighbours: int = 10) -> dict[str, float]:
    """How close a copy's representations (N, D) are to the victim's (N, E) of the same images.

    l2 and cosine: mean Euclidean and cosine distance of `output` (N, E), the copy's features in the victim's width (the
    representations themselves if not given), left out where the widths differ. cka: `linear_cka`. overlap:
    `neighbour_overlap`. They are meaningful only in comparison with an independent encoder's figures.
    """
    output = copy if output is None else output
    figures = {}
    if output.shape == victim.shape:
        figures["l2"] = (output - victim).norm(dim=1).mean().item()
        figures["cosine"] = 1 - F.cosine_similarity(output, victim).mean().item()
    figures["cka"] = linear_cka(copy, victim)
    figures["overlap"] = neighbour_overlap(copy, victim, neighbours)
    return figures


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of (N, D) and (N, E), from 0 to 1 (Kornblith et al., ICML 2019, section 3).

    |A'B|^2 / (|A'A| |B'B|) in Frobenius norms, columns centred; invariant to rotating or scaling either set.
    """
    a, b = ((x - x.mean(dim=0)).double() for x in (a, b))
    return ((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()).clamp_min(1e-30)).item()


def neighbour_overlap(a: Tensor, b: Tensor, neighbours: int = 10) -> float:
    """The mean share in percent of the nearest neighbours by cosine that are common to (N, D) and (N, E)."""
    neighbours = min(neighbours, len(a) - 1)

    def nearest(features: Tensor) -> Tensor:
        unit = F.normalize(features, dim=1)
        parts = []
        for start in range(0, len(unit), 1000):
            similarity = unit[start : start + 1000] @ unit.T
            similarity[:, start:].fill_diagonal_(-2)  # an image is no neighbour of itself
            parts.append(similarity.topk(neighbours, dim=1).indices)
        return torch.cat(parts)

    common = (nearest(a)[:, :, None] == nearest(b)[:, None, :]).any(dim=2)
    return 100.0 * common.float().mean().item()


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
    spaces: Mapping[str, Space], seed: int = 0, head: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """`fidelity` of `copy` to `victim` on test images, and the agreement of their downstream predictions.

    The same figures of `independent` have the prefix independent_. `head` maps the copy's representations to the
    victim's width where the widths differ; predictions are by `logistic_regression`.
    """
    predictions = {name: logistic_regression(*space, seed).predictions for name, space in spaces.items()}
    seen = {name: test[0] for name, (_, test) in spaces.items()}
    figures = {}
    for name, prefix in (("copy", ""), ("independent", "independent_")):
        output = head(seen[name]) if head and name == "copy" else None
        close = fidelity(seen[name], seen["victim"], output)
        close["agreement"] = agreement(predictions[name], predictions["victim"])
        figures |= {prefix + key: value for key, value in close.items()}
    return figures
