"""Dataset inference for encoders: an encoder, and a copy of it, treat its training images unlike other images.

Dziedzic et al., NeurIPS 2022 (arXiv 2209.09024): the owner has a suspect represent the victim's training images, fits a
density to the representations of half of them, and tests whether the other half is likelier under it than images that
the victim never saw. For an encoder that was never trained on the images, both are equally likely. The victim needs no
mark. Whether the method separates depends on the victim, so look at the victim's figures first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import UserError, derive_seed, generator

COMPONENTS = 10  # the authors' number for CIFAR-10 and SVHN; 50 for ImageNet
MAX_ITERATIONS = 1000  # of expectation maximisation, the authors' number too


def halves(count: int, number: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint random halves of `count` training images, or of `number` of them: (N // 2,) each.

    UserError when there are fewer than asked for, or too few to halve.
    """
    number = number or count
    if number > count:
        raise UserError(f"--num-train {number}: the victim was trained on {count} images, give {count} or less")
    if number < 4:
        remedy = "give --num-train 4 or more" if count >= 4 else "try --method watermark"
        raise UserError(f"{number} training images are too few for dataset inference: {remedy}")
    order = torch.randperm(count, generator=generator(seed, "halves"))[:number]
    return order[: number // 2], order[number // 2 : number // 2 * 2]


def log_likelihoods(fitted: Tensor, *others: Tensor, components: int = COMPONENTS, seed: int = 0) -> tuple[Tensor, ...]:
    """Log-likelihoods, (N,) in nats, of each of `others` (N, D) under a Gaussian mixture fitted to `fitted` (M, D).

    All are representations; rows are first normalised to unit length. Covariances are diagonal, with scikit-learn's
    floor of 1e-6 for a variance. The same seed gives the same mixture.
    """
    from sklearn.mixture import GaussianMixture  # imported here, because it takes a second

    mixture = GaussianMixture(
        components,
        covariance_type="diag",
        max_iter=MAX_ITERATIONS,
        random_state=derive_seed(seed, "mixture") % 2**32,
    ).fit(_directions(fitted))
    return tuple(torch.from_numpy(mixture.score_samples(_directions(rows))) for rows in others)


def _directions(h: Tensor):
    return F.normalize(h.double(), dim=1).cpu().numpy()
