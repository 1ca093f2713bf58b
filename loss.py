"""Every loss as a function, and the tables of losses with their published hyper-parameters.

Rows of several views of an image are view-major: all first views, then all second views. Losses are pure functions of
float32 tensors to a scalar; the victim's answers carry no gradient. docs/extending.md shows how to add a loss.

    STEAL_LOSSES["infonce"](copy, victim, temperature=0.07)
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from settings import setting
from training.objective import Loss, temperature_setting
from training.siamese import SIAMESE_LOSSES, symmetrized
from utils import UserError

# ---- between the rows of a set of features ----


def nt_xent(features: Tensor, views: int = 2, temperature: float = 0.07) -> Tensor:
    """InfoNCE between the rows of an image, against all other rows (NT-Xent; Chen et al., ICML 2020, equation 1).

    features (views * B, D) -> scalar. With s the cosine similarity and P(i) the other rows of row i's image:
    mean over i and p in P(i) of -log(exp(s_ip / T) / sum_{j != i} exp(s_ij / T)).
    """
    image = torch.arange(len(features), device=features.device) % (len(features) // views)
    return supervised_contrastive(features, image, temperature)


def supervised_contrastive(features: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """InfoNCE between the rows of a label, against all other rows (SupCon; Khosla et al., NeurIPS 2020, equation 2).

    features (R, D), labels (R,), each label at least twice -> scalar. With s the cosine similarity and P(i) the other
    rows of row i's label: mean over i and p in P(i) of -log(exp(s_ip / T) / sum_{j != i} exp(s_ij / T)).
    """
    unit = F.normalize(features, dim=1)
    logits = unit @ unit.T / temperature
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    same = (labels[:, None] == labels[None, :]) & ~itself
    positive = (logits * same).sum(dim=1) / same.sum(dim=1)
    return (torch.logsumexp(logits.masked_fill(itself, -math.inf), dim=1) - positive).mean()


def soft_nearest_neighbour(features: Tensor, views: int = 2, temperature: float = 100.0) -> Tensor:
    """Soft nearest neighbour loss between the rows of an image (Frosst et al., ICML 2019, equation 1).

    features (views * B, D) -> scalar. With squared distances d and P(i) the other rows of row i's image:
    mean_i -log(sum_{p in P(i)} exp(-d_ip / T) / sum_{j != i} exp(-d_ij / T)).
    (The 2022 code adds 1e-9 to the share: far from the answers its gradient is 0.)
    """
    rows, images = len(features), len(features) // views
    # Distances do not depend on the origin; centred features lose least to cancellation in the float32 products below.
    features = features - features.mean(dim=0).detach()
    norms = features.square().sum(dim=1)
    distances = (norms[:, None] + norms[None, :] - 2 * features @ features.T).clamp_min(0)
    image = torch.arange(rows, device=features.device) % images
    itself = torch.eye(rows, dtype=torch.bool, device=features.device)
    logits = (-distances / temperature).masked_fill(itself, -math.inf)
    positive = logits.masked_fill(image[:, None] != image[None, :], -math.inf)
    # In logarithms throughout: exp(-d / T) underflows where the distances are large.
    return (torch.logsumexp(logits, dim=1) - torch.logsumexp(positive, dim=1)).mean()


def barlow_twins(a: Tensor, b: Tensor, off_diagonal: float = 0.0051) -> Tensor:
    """Redundancy reduction between two sets of features (Zbontar et al., ICML 2021, equations 1 and 2).

    a (B, D), b (B, D) -> scalar. Each dimension is standardised over the batch (biased variance + 1e-5); with
    C = a'b / B: sum_c (C_cc - 1)^2 + off_diagonal * sum_{c != d} C_cd^2.
    """
    a, b = (F.batch_norm(features, None, None, training=True) for features in (a, b))
    squares = (a.T @ b / len(a) - torch.eye(a.shape[1], device=a.device)).square()
    diagonal = squares.diagonal().sum()
    return diagonal + off_diagonal * (squares.sum() - diagonal)


# ---- for a victim's training: the projections of several views of each image ----


def _between_views(pair_loss: Callable[[Tensor, Tensor], Tensor], features: Tensor, views: int) -> Tensor:
    pairs = itertools.combinations(features.chunk(views), 2)
    return torch.stack([pair_loss(a, b) for a, b in pairs]).mean()


def barlow(features: Tensor, views: int = 2) -> Tensor:
    """`barlow_twins` averaged over pairs of views: features (views * B, D) -> scalar."""
    return _between_views(barlow_twins, features, views)


def mse_between_views(features: Tensor, views: int = 2) -> Tensor:
    """Mean squared error averaged over pairs of views: features (views * B, D) -> scalar. Any constant minimises it."""
    return _between_views(F.mse_loss, features, views)


def supcon_training(features: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """`supervised_contrastive` times T / 0.07, as in SupCon's code: features (V * B, D), labels (B,) -> scalar."""
    labels = labels.repeat(len(features) // len(labels))
    return temperature / 0.07 * supervised_contrastive(features, labels, temperature)


def supervised(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the true labels: logits (V * B, classes), labels (B,) -> scalar."""
    return F.cross_entropy(logits, labels.repeat(len(logits) // len(labels)))


# ---- for stealing: the copy's features and the victim's answers, row by row ----


def infonce(copy: Tensor, victim: Tensor, temperature: float = 0.07, views: int = 1) -> Tensor:
    """InfoNCE for stealing: copy (V * B, D), victim (V * B, D) -> scalar.

    The copy's and the victim's rows of an image are positives of each other; all rows of other images are negatives
    (2022 paper, section 4). With V views an image has 2 V rows; the loss averages over all its positives.
    """
    return nt_xent(torch.cat([copy, victim]), 2 * views, temperature)


def softnn(copy: Tensor, victim: Tensor, temperature: float = 100.0, views: int = 1) -> Tensor:
    """Soft nearest neighbour loss for stealing: copy (V * B, D), victim (V * B, D) -> scalar.

    `soft_nearest_neighbour` over all rows of both, 2 V for each image.
    """
    return soft_nearest_neighbour(torch.cat([copy, victim]), 2 * views, temperature)


def supcon(copy: Tensor, victim: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """SupCon for stealing: copy (V * B, D), victim (V * B, D), labels (B,) -> scalar.

    All rows of both with the same label are positives of each other (see `supcon_training`). Unlike the other losses,
    it needs the true labels of the images queried.
    """
    return supcon_training(torch.cat([copy, victim]), labels, temperature)


def mse(copy: Tensor, victim: Tensor) -> Tensor:
    """Mean squared error over all elements: copy (B, D), victim (B, D) -> scalar."""
    return F.mse_loss(copy, victim)


def cosine(copy: Tensor, victim: Tensor) -> Tensor:
    """Cosine distance, mean_i 1 - cos(copy_i, victim_i): copy (B, D), victim (B, D) -> scalar."""
    return 1 - F.cosine_similarity(copy, victim).mean()


def softce(copy: Tensor, victim: Tensor) -> Tensor:
    """Cross-entropy of the copy's softmax with the victim's: copy (B, D), victim (B, D) -> scalar.

    mean_i -sum_c softmax(victim_i)_c log softmax(copy_i)_c.
    """
    return F.cross_entropy(copy, victim.softmax(dim=1))


def bce(copy: Tensor, victim: Tensor) -> Tensor:
    """Binary cross-entropy with the victim's active units as the target: copy (B, D), victim (B, D) -> scalar.

    The target is sigmoid(victim) rounded: 1 where an entry is above 0, else 0. The copy's features are the logits.
    """
    return F.binary_cross_entropy_with_logits(copy, victim.sigmoid().round())


def wasserstein(copy: Tensor, victim: Tensor) -> Tensor:
    """Wasserstein-1 distance between rows as histograms over the dimensions: copy (B, D), victim (B, D) -> scalar.

    mean_i sum_c |F(copy_i)_c - F(victim_i)_c|, F the running sum of a row divided by (its sum + 1e-14). It ignores the
    rows' scale. UserError on the CPU for a negative entry (elsewhere, looking would make the host wait): a histogram
    has none, and a row that sums to about 0 has gradients of 1e7 and more.
    """

    def cumulative(rows: Tensor) -> Tensor:
        if rows.device.type == "cpu" and (rows < 0).any():
            raise UserError("wasserstein compares histograms, a row has a negative number: give another --losstype")
        return torch.cumsum(rows / (rows.sum(dim=1, keepdim=True) + 1e-14), dim=1)

    return (cumulative(copy) - cumulative(victim)).abs().sum(dim=1).mean()


def contsteal(copy: Tensor, victim: Tensor, temperature: float = 0.5, views: int = 1) -> Tensor:
    """Cont-Steal's loss as its authors released it (Sha et al., CVPR 2023): (V * B, D), (V * B, D) -> scalar.

    `infonce` at their temperature. The paper has another formula: `contsteal_paper`.
    """
    return infonce(copy, victim, temperature, views)


def _contrast(matched: Tensor, *negatives: Tensor, positive: bool) -> Tensor:
    """-log(e^matched / sum of e^negatives), averaged: matched (V, B), negatives (V, B, B) without their diagonals.

    positive: whether the denominator has the matched pair too.
    """
    itself = torch.eye(matched.shape[1], dtype=torch.bool, device=matched.device)
    terms = [logits.masked_fill(itself, -math.inf) for logits in negatives] + [matched[..., None]] * positive
    return (torch.logsumexp(torch.cat(terms, dim=2), dim=2) - matched).mean()


def _products(copy: Tensor, victim: Tensor, views: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The copy's rows (V * B, D) times all answers, and times all rows of the copy, over T: (V, B, B) for V views."""
    copy, victim = (rows.view(views, -1, rows.shape[1]) for rows in (copy, victim))
    return copy @ victim.mT / temperature, copy @ copy.mT / temperature


def contsteal_paper(copy: Tensor, victim: Tensor, temperature: float = 0.5, views: int = 1) -> Tensor:
    """Cont-Steal's formula as in its paper (Sha et al., CVPR 2023): copy (V * B, D), victim (V * B, D) -> scalar.

    With s, f the unit rows of copy and victim, averaged over images and views:
    -log(e^{s_i.f_i/T} / (e^{s_i.f_i/T} + sum_{j != i} e^{s_i.f_j/T} + sum_{j != i} e^{s_i.s_j/T})).
    """
    answers, copies = _products(F.normalize(copy, dim=1), F.normalize(victim, dim=1), views, temperature)
    return _contrast(answers.diagonal(dim1=1, dim2=2), answers, copies, positive=True)


def contsteal_rda(copy: Tensor, victim: Tensor, temperature: float = 0.07, views: int = 1) -> Tensor:
    """Cont-Steal's loss as RDA's authors re-implemented it (code of Wu et al., ECCV 2024): shapes as `contsteal`.

    The victim's row is the anchor of the cross term, and the positive pair is not in the denominator:
    -log(e^{f_i.s_i/T} / (sum_{j != i} e^{f_i.s_j/T} + sum_{j != i} e^{s_i.s_j/T})).
    """
    answers, copies = _products(F.normalize(copy, dim=1), F.normalize(victim, dim=1), views, temperature)
    return _contrast(answers.diagonal(dim1=1, dim2=2), answers.mT, copies, positive=False)


# Distances between rows (B, D), (B, D) -> (B,).
DISTANCES = {
    "l2": lambda a, b: (a - b).norm(dim=1),
    "l1": lambda a, b: (a - b).abs().sum(dim=1),
    "cosine": lambda a, b: 1 - F.cosine_similarity(a, b),
}


def stolenencoder(
    copy: Tensor, victim: Tensor, views: int = 1, lambda_aug: float = 9.0, distance: str = "l2"
) -> Tensor:
    """StolenEncoder's loss (Liu et al., CCS 2022): copy (V * B, D), victim (V * B, D) -> scalar.

    The copy's first B rows are of the images, the others of augmentations; victim repeats each answer. Of unit rows, a
    *sum* over the images: the distance of the first row + lambda_aug * the mean distance of the others.
    """
    plain, *augmented = DISTANCES[distance](F.normalize(copy, dim=1), F.normalize(victim, dim=1)).chunk(views)
    return plain.sum() + lambda_aug * torch.stack(augmented).mean(dim=0).sum() if augmented else plain.sum()


def rda(copy: Tensor, victim: Tensor, temperature: float = 0.07, views: int = 1) -> Tensor:
    """RDA's loss, discrimination + alignment (Wu et al., ECCV 2024): copy (V * B, D), victim (V * B, D) -> scalar.

    victim repeats each image's prototype p, the mean of answers of unit length (see `Loss.unit_answers`), which is
    itself shorter. With s the unit rows of the copy, averaged over images and views:
    -log(e^{s_i.p_i/T} / (sum_{j != i} e^{s_i.p_j/T} + sum_{j != i} e^{s_i.s_j/T})), and
    -log((cos(s_i, p_i) + 1) / |s_i - p_i|^2). 1e-6 is added to numerator and denominator, which is 0 at s = p.
    """
    copy = F.normalize(copy, dim=1)
    answers, copies = _products(copy, victim, views, temperature)
    discrimination = _contrast(answers.diagonal(dim1=1, dim2=2), answers, copies, positive=False)
    angle, amplitude = F.cosine_similarity(copy, victim) + 1, (copy - victim).square().sum(dim=1)
    return discrimination + ((amplitude + 1e-6).log() - (angle + 1e-6).log()).mean()


# ---- the tables ------------------------------------------------------------------------------------------------------
_TEMPERATURE, _WARMER = ({"temperature": temperature_setting(default)} for default in (0.07, 0.5))
_SN = {"flags": ("--tempsn", "--temperaturesn"), "argument": "temperature"}
_SOFTNN = {"temperaturesn": setting(100.0, "temperature of softnn", above=0, **_SN)}
_STOLENENCODER = {
    "distance": setting("l2", "distance between features in stolenencoder's loss", choices=DISTANCES),
    "lambda_aug": setting(
        9.0,
        "weight of stolenencoder's augmentations",
        at_least=0,
        acts=lambda command: None if command.useaug else "without --useaug: there are no augmentations to weigh",
    ),
}

# A new loss is a function above and a row here; the row's `settings` are its hyper-parameters.
TRAIN_LOSSES = {
    "infonce": Loss(nt_xent, 256, 3e-4, settings=_TEMPERATURE, min_views=2),
    "softnn": Loss(soft_nearest_neighbour, 256, 1e-3, settings=_SOFTNN, min_views=2),
    "supcon": Loss(supcon_training, 256, 0.05, optimizer="sgd", settings=_TEMPERATURE, min_views=2),
    "barlow": Loss(barlow, 256, 3e-4, min_views=2),
    **SIAMESE_LOSSES,  # these train a companion too
    "supervised": Loss(supervised, 128, 0.1, 5e-4, "sgd", augment="crop-flip", head="linear"),
}
STEAL_LOSSES = {
    "infonce": Loss(infonce, 256, 3e-4, settings=_TEMPERATURE),
    "softnn": Loss(softnn, 256, 1e-3, settings=_SOFTNN),
    "supcon": Loss(supcon, 256, 0.05, optimizer="sgd", settings=_TEMPERATURE),
    "symmetrized": Loss(symmetrized, 256, 0.05, optimizer="sgd", min_views=2, predictor=True),
    "barlow": Loss(barlow_twins, 256, 1e-3),
    "mse": Loss(mse, 64, 1e-3),
    "cosine": Loss(cosine, 64, 1e-3),
    "softce": Loss(softce, 64, 1e-3),
    "bce": Loss(bce, 64, 1e-3),
    "wasserstein": Loss(wasserstein, 64, 1e-3, nonnegative=True),
    "contsteal": Loss(contsteal, 32, 3e-4, 0.0, settings=_WARMER),
    "contsteal-paper": Loss(contsteal_paper, 32, 3e-4, 0.0, settings=_WARMER),
    "contsteal-rda": Loss(contsteal_rda, 100, 1e-3, settings=_TEMPERATURE),
    "stolenencoder": Loss(stolenencoder, 64, 1e-3, 5e-4, "sgd", settings=_STOLENENCODER, plain_first=True),
    "rda": Loss(rda, 100, 1e-3, settings=_TEMPERATURE, unit_answers=True),
}
# Modes of steallabels.py, of logits (B, C) and the victim's probabilities or one-hot labels (B, C): Adam as in the 2022
# code, or Knockoff Nets' SGD.
LABEL_LOSSES = {
    "direct": Loss(F.cross_entropy, 64, 3e-4, 8e-4),
    "knockoff": Loss(F.cross_entropy, 64, 0.01, 5e-4, "sgd", 0.5),
}
# Losses of the head that stealhead.py re-creates: between its outputs for several views of each image, or against the
# victim's true projections.
HEAD_LOSSES = {
    "infonce": Loss(nt_xent, 256, 1e-3, settings=_TEMPERATURE, min_views=2),
    "softnn": Loss(soft_nearest_neighbour, 256, 1e-3, settings=_SOFTNN, min_views=2),
    "mse": Loss(mse_between_views, 256, 1e-3, min_views=2),
    "msewithhead": Loss(mse, 256, 1e-3),
}
