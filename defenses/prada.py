"""PRADA (Juuti et al., EuroS&P 2019): are the distances of a stream's queries to earlier ones normally distributed?

For each class that the owner's classifier predicts there is a growing set of queries. The distance of a query is the L2
distance of its pixels to the nearest query in its class's set. It joins the set where that distance exceeds the class's
threshold, which is the largest value so far of the mean less the standard deviation of the distances with which queries
joined. Once there are more than 100 distances, an attack is flagged where Shapiro and Wilk's W of all distances so far,
without those beyond 3 standard deviations of their mean, falls below delta.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

OUTLIERS = 3.0  # standard deviations from the mean beyond which distances are left out
ENOUGH = 100  # distances, beyond which W is computed


def shapiro_w(distances: np.ndarray) -> float:
    """W (Shapiro & Wilk, Biometrika 1965, as scipy computes it) of distances (N,), N > 2, without the outliers.

    From 0 to 1, which is for normally distributed distances; 0 where all are equal and W is undefined.
    """
    from scipy.stats import shapiro  # imported here: it takes a second, and most runs have no detector

    values = distances.astype(np.float64)
    values = values[np.abs(values - values.mean()) <= OUTLIERS * values.std()]
    if np.ptp(values) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the p-value, not W, is inexact for more than 5,000
        return float(shapiro(values).statistic)


def growing_set_distances(inputs: Tensor, classes: Tensor) -> np.ndarray:
    """The distances (N - C,) of a stream of inputs (N, P), float32, in order; each of the C classes' first has none.

    classes (N,): what the owner's classifier predicts.
    """
    found = torch.full((len(inputs),), torch.nan, dtype=torch.float64)
    for label in classes.unique():
        index = (classes == label).nonzero()[:, 0]
        found[index[1:]] = _of_a_class(inputs[index])
    return found[~found.isnan()].numpy()


def _of_a_class(rows: Tensor) -> Tensor:
    """The distances (N - 1,) of a class's inputs (N, P) but the first, in order."""
    members, size = torch.empty_like(rows), 1
    members[0] = rows[0]
    found, joined, threshold = [], [0.0], 0.0
    for row in rows[1:]:
        # Not by products of matrices, which are inexact near 0.
        distance = (members[:size] - row).square().sum(dim=1).min().sqrt().item()
        found.append(distance)
        if distance > threshold:
            members[size] = row
            size += 1
            joined.append(distance)
            threshold = max(threshold, np.mean(joined) - np.std(joined))
    return torch.tensor(found, dtype=torch.float64)


def prada(images: Tensor, classes: Tensor) -> float | None:
    """1 - the lowest W of a stream of images (N, 3, H, W), uint8. Above 1 - delta it is flagged.

    None for ENOUGH distances or fewer, of which PRADA says nothing.
    """
    distances = growing_set_distances(images.flatten(1).float() / 255, classes)
    if len(distances) <= ENOUGH:
        return None
    return 1 - min(shapiro_w(distances[:end]) for end in range(ENOUGH + 1, len(distances) + 1))
