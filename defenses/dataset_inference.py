"""Dataset inference for encoders: an encoder, and a copy of it, treat its training images unlike other images.

Dziedzic et al., NeurIPS 2022 (arXiv 2209.09024): the owner has a suspect represent the victim's training images, fits a
density to the representations of half of them, and tests whether the other half is likelier under it than images that
the victim never saw. For an encoder that was never trained on the images, both are equally likely. The victim needs no
mark. Whether the method separates depends on the victim, so look at the victim's figures first.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data_aug.augment import draw_boxes
from data_aug.operations import crop_resize
from utils import UserError, derive_seed, generator

MAX_ITERATIONS = 1000  # of expectation maximisation, the authors' number
REGULARISATION = 1e-6  # added to each variance, scikit-learn's number


@dataclass(frozen=True)
class Mixture:
    """The density: a Gaussian mixture of unit rows, of `components` with full or diagonal (`diag`) covariances.

    standardise: dimensions are brought to mean 0 and deviation 1 before rows are brought to unit length.
    """

    covariance: str = "full"
    components: int = 10
    standardise: bool = False


# The authors' settings: those for CIFAR-10 and SVHN, which other data sets have too, and those for ImageNet.
CIFAR10, IMAGENET = Mixture(), Mixture("diag", 50, standardise=True)


def published_mixture(dataset: str) -> Mixture:
    """The authors' mixture for a data set's name; ImageNet where any part of a path begins with `imagenet`."""
    parts = Path(dataset.partition(":")[2] or dataset).parts
    return IMAGENET if any(part.lower().startswith("imagenet") for part in parts) else CIFAR10


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


def random_crops(images: Tensor, draws: torch.Generator) -> Tensor:
    """A random resized crop of each image uint8 (N, 3, S, S), of the old size: torchvision's, with its defaults.

    The authors' code represents such crops, in 8 bits, instead of the images.
    """
    boxes = draw_boxes(len(images), *images.shape[2:], draws)
    crops = torch.empty_like(images)
    for part in torch.arange(len(images)).split(1000):
        crops[part] = (crop_resize(images[part], boxes[part], None, images.shape[3]) * 255).round().byte()
    return crops


def log_likelihoods(fitted: Tensor, *others: Tensor, mixture: Mixture = CIFAR10, seed: int = 0) -> tuple[Tensor, ...]:
    """Log-likelihoods, (N,) in nats, of each of `others` (N, D) under a Gaussian mixture fitted to `fitted` (M, D).

    All are representations; rows are brought to unit length, where the mixture says so after their dimensions were
    standardised by mean and deviation of `fitted`. Variances are regularised by 1e-6. The same seed gives the same
    mixture. UserError where the mixture cannot be fitted.
    """
    from sklearn.mixture import GaussianMixture  # imported here, because it takes a second

    fitted, others = fitted.double(), [rows.double() for rows in others]
    if mixture.standardise:
        mean, deviation = fitted.mean(dim=0), fitted.std(dim=0, correction=0).clamp_min(1e-12)
        fitted, *others = ((rows - mean) / deviation for rows in (fitted, *others))
    density = GaussianMixture(
        mixture.components,
        covariance_type=mixture.covariance,
        reg_covar=REGULARISATION,
        max_iter=MAX_ITERATIONS,
        random_state=derive_seed(seed, "mixture") % 2**32,
    )
    try:
        density.fit(_directions(fitted))
    except ValueError as error:
        size = f"{mixture.components} {mixture.covariance} covariances of {fitted.shape[1]} dimensions"
        raise UserError(
            f"a mixture of {size} cannot be fitted to {len(fitted)} images, with 1e-6 added to each variance: give "
            f"fewer --components or --covariance diag ({str(error).split(';')[0][:80].rstrip('.')})"
        ) from None
    return tuple(torch.from_numpy(density.score_samples(_directions(rows))) for rows in others)


def under_determined(mixture: Mixture, images: int, width: int) -> str | None:
    """What to do where full covariances of `width` dimensions have too few images to be determined; None where not.

    A covariance of D dimensions needs more than D images of its own component.
    """
    needed = mixture.components * (width + 1)
    if mixture.covariance != "full" or images >= needed:
        return None
    return (
        f"{images} fitted images do not determine {mixture.components} full covariances of {width} dimensions, which "
        f"need {needed}: the test is weak; give more --num-train, fewer --components or --covariance diag"
    )


def _directions(h: Tensor):
    return F.normalize(h, dim=1).cpu().numpy()
