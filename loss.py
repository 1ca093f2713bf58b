"""Every loss, one function each, and the tables of their names with the hyper-parameters they were published with.

Rows of several views of one image are view-major: all first views, then all second views. Losses are pure functions of
float32 tensors; the victim's answers carry no gradient.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(features: Tensor, views: int = 2, temperature: float = 0.07) -> Tensor:
    """InfoNCE between the rows of one image, against all other rows (NT-Xent; Chen et al., ICML 2020, equation 1).

    features (views * B, D) -> scalar. With s the cosine similarity and P(i) the other rows of row i's image:
    mean over i and p in P(i) of -log(exp(s_ip / T) / sum_{j != i} exp(s_ij / T)).
    """
    rows, images = len(features), len(features) // views
    unit = F.normalize(features, dim=1)
    logits = unit @ unit.T / temperature
    index = torch.arange(rows, device=features.device)
    same_image = logits.view(rows, views, images)[index, :, index % images]  # (rows, views), with the row itself
    positive = (same_image.sum(dim=1) - logits.diagonal()) / (views - 1)
    others = logits.masked_fill(torch.eye(rows, dtype=torch.bool, device=features.device), -math.inf)
    return (torch.logsumexp(others, dim=1) - positive).mean()


def infonce(copy: Tensor, victim: Tensor, temperature: float = 0.07, views: int = 1) -> Tensor:
    """InfoNCE for stealing: copy (V * B, D), victim (V * B, D) -> scalar.

    Copy's and victim's rows of one image are positives of each other, all rows of both for other images negatives
    (2022 paper, section 4). With V views an image has 2 V rows; the loss averages over all its positives.
    """
    return nt_xent(torch.cat([copy, victim]), views=2 * views, temperature=temperature)


def mse(copy: Tensor, victim: Tensor) -> Tensor:
    """Mean squared error over all elements: copy (B, D), victim (B, D) -> scalar."""
    return F.mse_loss(copy, victim)


def softce(copy: Tensor, victim: Tensor) -> Tensor:
    """Cross-entropy of the copy's softmax with the victim's: copy (B, D), victim (B, D) -> scalar.

    mean_i -sum_c softmax(victim_i)_c log softmax(copy_i)_c. (The 2022 code took the copy's own softmax as the target.)
    """
    return F.cross_entropy(copy, victim.softmax(dim=1))


def wasserstein(copy: Tensor, victim: Tensor) -> Tensor:
    """Wasserstein-1 distance of rows read as histograms over the dimensions: copy (B, D), victim (B, D) -> scalar.

    mean_i sum_c |F(copy_i)_c - F(victim_i)_c|, F the running sum of a row divided by (its sum + 1e-14). Meant for
    entries >= 0, such as representations after a ReLU; it ignores their scale.
    """

    def cumulative(rows: Tensor) -> Tensor:
        return torch.cumsum(rows / (rows.sum(dim=1, keepdim=True) + 1e-14), dim=1)

    return (cumulative(copy) - cumulative(victim)).abs().sum(dim=1).mean()


def softnn(copy: Tensor, victim: Tensor, temperature: float = 100.0, views: int = 1) -> Tensor:
    """Soft nearest neighbour loss for stealing: copy (V * B, D), victim (V * B, D) -> scalar.

    Over all rows of both, with squared distances d and P(i) the other rows of row i's image (Frosst et al., ICML 2019):
    mean_i -log(1e-9 + sum_{p in P(i)} exp(-d_ip / T) / sum_{j != i} exp(-d_ij / T)).
    """
    features = torch.cat([copy, victim])
    rows, images = len(features), len(copy) // views
    # Distances don't change with the origin; at the centre the float32 products below cancel least.
    features = features - features.mean(dim=0).detach()
    norms = features.square().sum(dim=1)
    distances = (norms[:, None] + norms[None, :] - 2 * features @ features.T).clamp_min(0)
    image = torch.arange(rows, device=features.device) % images
    itself = torch.eye(rows, dtype=torch.bool, device=features.device)
    logits = (-distances / temperature).masked_fill(itself, -math.inf)
    positive = logits.masked_fill(image[:, None] != image[None, :], -math.inf)
    # In logarithms throughout: exp(-d / T) underflows where the distances are large.
    log_share = torch.logsumexp(positive, dim=1) - torch.logsumexp(logits, dim=1)
    return -torch.logaddexp(log_share, torch.full_like(log_share, math.log(1e-9))).mean()


@dataclass(frozen=True)
class Loss:
    """A loss with the hyper-parameters of the 2022 work, and the settings it takes: {its argument: the setting}."""

    function: Callable[..., Tensor]
    batch_size: int
    lr: float
    weight_decay: float = 1e-4
    takes: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *args: Tensor, **kwargs) -> Tensor:
        return self.function(*args, **kwargs)


# A new loss is one function above and one row here.
TRAIN_LOSSES = {
    "infonce": Loss(nt_xent, 256, 3e-4, takes={"temperature": "temperature", "views": "n_views"}),
}
STEAL_LOSSES = {
    "infonce": Loss(infonce, 256, 3e-4, takes={"temperature": "temperature", "views": "n_views"}),
    "softnn": Loss(softnn, 256, 1e-3, takes={"temperature": "temperaturesn", "views": "n_views"}),
    "mse": Loss(mse, 64, 1e-3),
    "softce": Loss(softce, 64, 1e-3),
    "wasserstein": Loss(wasserstein, 64, 1e-3),
}
