"""SimSiam, BYOL and MoCo v2: losses between views that need more than the encoder, and this companion of it.

A companion is made for an encoder with its head, for the number of images it is trained on and the batch size of the
job. `outputs` takes this process's views of a batch, float (b, 3, H, W) each, one after the other, as the authors do:
batch norm is over each view by itself. It returns rows of the whole batch: the projections, whose spread is watched,
and the two arguments of the loss. `after_step` is called by the training loop. docs/fidelity.md says what is published.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.exchange import processes, share
from settings import setting
from training.objective import Loss, temperature_setting
from utils import UserError

# A function of a network and this process's images or rows -> features of the whole batch, as `Loop.features`.
Call = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
Outputs = tuple[Tensor, Tensor, Tensor]

# ---- the losses ------------------------------------------------------------------------------------------------------


def symmetrized(copy: Tensor, victim: Tensor, views: int = 2) -> Tensor:
    """Negative cosine between predictions and targets of different views (SimSiam; Chen & He, CVPR 2021, equation 4).

    copy (V * B, D): predictions, in stealing the copy's; victim (V * B, D): projections, in stealing the answers
    through the copy's projector -> scalar. Mean over images and views v != w of -cos(copy_v, victim_w); no gradient
    passes to the target.
    """
    predictions, targets = copy.chunk(views), victim.detach().chunk(views)
    pairs = itertools.permutations(range(views), 2)
    return -torch.stack([F.cosine_similarity(predictions[v], targets[w]).mean() for v, w in pairs]).mean()


def byol(predictions: Tensor, targets: Tensor, views: int = 2) -> Tensor:
    """Squared distance of unit rows, in both directions (BYOL; Grill et al., NeurIPS 2020, equation 2).

    predictions (V * B, D), the target network's projections (V * B, D) -> scalar: mean over images of the sum over the
    two directions of 2 - 2 cos(predictions_v, targets_w). With more views, twice the mean over all views v != w.
    """
    return 4 + 4 * symmetrized(predictions, targets, views)


def moco(queries: Tensor, keys: Tensor, temperature: float = 0.1, views: int = 2) -> Tensor:
    """InfoNCE against a queue of negatives (MoCo; He et al., CVPR 2020, equation 1).

    queries (B, D): of the first view; keys ((V - 1) * B + K, D): of the other views, then the queue -> scalar. With s
    the cosine similarity, k a query's key and n the queue's rows:
    mean of -log(exp(s(q, k) / T) / (exp(s(q, k) / T) + sum_n exp(s(q, n) / T))).
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    own, queue = keys.split([(views - 1) * len(queries), len(keys) - (views - 1) * len(queries)])
    matched = (own.view(views - 1, *queries.shape) * queries).sum(dim=2) / temperature
    negative = torch.logsumexp(queries @ queue.T / temperature, dim=1)
    return (torch.logaddexp(matched, negative) - matched).mean()


# ---- the companions --------------------------------------------------------------------------------------------------


def _predictor(width: int, hidden: int, bias: bool = True) -> nn.Module:
    """Rows (B, width) -> (B, width) by two layers, with a BatchNorm and a ReLU between them."""
    layers = nn.Linear(width, hidden, bias=bias), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
    return nn.Sequential(*layers)


def _own(rows: Tensor) -> Tensor:
    """This process's rows of a view's (B, D): those with a gradient."""
    return rows[share(len(rows))]


@torch.no_grad()
def _follow(target: nn.Module, encoder: nn.Module, kept: float) -> None:
    """Move the target network's weights: kept * target + (1 - kept) * encoder. Its running statistics are its own."""
    torch._foreach_lerp_([*target.parameters()], [*encoder.parameters()], 1 - kept)


class SimSiam(nn.Module):
    """The last BatchNorm of SimSiam's projector, without weights, and its predictor (Chen & He, CVPR 2021, section 3).

    The predictor's hidden layer is a quarter as wide as its input. Its learning rate is constant.
    """

    checkpoint_key = "companion"

    def __init__(self, encoder: nn.Module, images: int, batch_size: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(encoder.out_dim, affine=False)
        self.predictor = _predictor(encoder.out_dim, max(1, encoder.out_dim // 4), bias=False)

    def groups(self, encoder: nn.Module) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters."""
        parameters = [*self.predictor.parameters()]
        return [{"params": [*encoder.parameters()]}, {"params": parameters, "constant": True}]

    def outputs(self, encoder: nn.Module, views: Sequence[Tensor], call: Call) -> Outputs:
        """Projections z, predictions and z again, (V * B, D) each."""
        rows = torch.cat([call(self._both, _own(call(encoder.project, view))) for view in views])
        projections, predictions = rows.chunk(2, dim=1)
        return projections, predictions, projections

    def _both(self, rows: Tensor) -> Tensor:
        z = self.norm(rows)
        return torch.cat([z, self.predictor(z)], dim=1)


class BYOL(nn.Module):
    """A predictor, and a target network that follows the encoder (Grill et al., NeurIPS 2020, section 3).

    The target begins as the encoder, runs in training mode, and keeps the share `ema` of its weights in the first step;
    the share rises to 1 by a cosine.
    """

    checkpoint_key = "companion"

    def __init__(self, encoder: nn.Module, images: int, batch_size: int, ema: float = 0.996):
        super().__init__()
        self.target = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = _predictor(encoder.out_dim, encoder.dim)
        self.ema = ema

    def groups(self, encoder: nn.Module) -> list[dict[str, Any]]:
        """The optimizer's groups: biases and batch norms have neither weight decay nor the adaptation of LARS."""
        parameters = [*encoder.parameters(), *self.predictor.parameters()]
        plain = [parameter for parameter in parameters if parameter.ndim == 1]
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        return [{"params": matrices}, {"params": plain, "plain": True, "weight_decay": 0.0}]

    def outputs(self, encoder: nn.Module, views: Sequence[Tensor], call: Call) -> Outputs:
        """Projections, predictions, and the target network's projections, (V * B, D) each."""
        projections = [call(encoder.project, view) for view in views]
        predictions = torch.cat([call(self.predictor, _own(rows)) for rows in projections])
        with torch.no_grad():
            targets = torch.cat([call(self.target.project, view) for view in views])
        return torch.cat(projections), predictions, targets

    def after_step(self, encoder: nn.Module, progress: float) -> None:
        """Move the target; `progress` is the share of the training's steps before this one."""
        _follow(self.target, encoder, 1 - (1 - self.ema) * (math.cos(math.pi * progress) + 1) / 2)


class MoCo(nn.Module):
    """A key encoder that follows the encoder, and a queue of its keys (He et al., CVPR 2020, section 3).

    ema: the share of its weights that the key encoder keeps in a step. queue: how many keys are kept as negatives, at
    most as many as there are images. bn_groups: groups of a batch with batch norm of their own; a query and its key
    are in different groups but for one in `bn_groups` ("shuffling BN"). UserError for a batch that has no such groups.
    """

    checkpoint_key = "companion"

    def __init__(
        self,
        encoder: nn.Module,
        images: int,
        batch_size: int,
        ema: float = 0.99,
        queue: int = 4096,
        bn_groups: int = 8,
    ):
        super().__init__()
        if batch_size % (bn_groups * processes()) or batch_size < 2 * bn_groups:
            raise UserError(
                f"a batch of {batch_size} has no {bn_groups} equal groups of two images or more in each process: "
                "give another --batch-size or --bn-groups"
            )
        self.target = copy.deepcopy(encoder).requires_grad_(False)
        self.ema, self.bn_groups = ema, bn_groups
        self.register_buffer("queue", F.normalize(torch.randn(min(queue, images), encoder.out_dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self._keys: Tensor | None = None  # of the step that is under way

    def outputs(self, encoder: nn.Module, views: Sequence[Tensor], call: Call) -> Outputs:
        """Queries (B, D) twice, and the keys of the other views with the queue behind them ((V - 1) * B + K, D)."""
        queries = self._in_groups(call, encoder.project, views[0], shuffled=False)
        with torch.no_grad():
            keys = [self._in_groups(call, self.target.project, view, shuffled=True) for view in views[1:]]
            self._keys = F.normalize(torch.cat(keys), dim=1)
        return queries, queries, torch.cat([self._keys, self.queue])

    def _in_groups(self, call: Call, network: Callable[[Tensor], Tensor], images: Tensor, shuffled: bool) -> Tensor:
        """Rows of a view's images in their order, a group after the other, so that batch norm is over each group.

        An image's group follows from its place in the batch, which is in random order: of n groups the place modulo n,
        and shuffled, one more for each n places. Each process has as many images of a group as the others.
        """
        total = processes() * len(images)
        place = torch.arange(total, device=images.device)
        group = (place + shuffled * place.div(self.bn_groups, rounding_mode="floor")) % self.bn_groups
        parts = images[group[share(total)].argsort(stable=True)].chunk(self.bn_groups)
        rows = torch.cat([call(network, part) for part in parts])
        return rows[group.argsort(stable=True).argsort()]

    @torch.no_grad()
    def after_step(self, encoder: nn.Module, progress: float) -> None:
        """Move the key encoder, and let the step's keys take the place of the oldest."""
        _follow(self.target, encoder, self.ema)
        size = len(self.queue)
        keys = self._keys[-size:]
        self.queue[(self.oldest + torch.arange(len(keys), device=keys.device)) % size] = keys
        self.oldest.add_(len(keys)).remainder_(size)


# ---- the table -------------------------------------------------------------------------------------------------------


def _ema(default: float) -> Any:
    text = "share of its weights that the target network of byol or moco keeps in a step; byol's rises to 1"
    return setting(default, text, at_least=0, at_most=1, otherwise="0.996, of moco 0.99")


_MOCO = {
    "temperature": temperature_setting(0.1),
    "ema": _ema(0.99),
    "queue": setting(4096, "keys in the queue of moco, at most as many as images", at_least=1),
    "bn_groups": setting(8, "groups of a batch with batch norm of their own in moco; 1: none", at_least=1),
}
_VIEWS: dict[str, Any] = {"min_views": 2, "augment": "simclr-cifar"}
_SGD = {**_VIEWS, "weight_decay": 5e-4, "optimizer": "sgd"}
# Rows of `loss.TRAIN_LOSSES`. Rates are for the batch size: 0.03 for each 256 images, byol 0.2.
SIAMESE_LOSSES = {
    "simsiam": Loss(
        symmetrized, 512, 0.06, **_SGD, companion=SimSiam, head="mlp-bn", more={"flat_epochs": 0, "out_dim": 2048}
    ),
    "byol": Loss(
        byol,
        512,
        0.4,
        1.5e-6,
        "lars",
        **_VIEWS,
        settings={"ema": _ema(0.996)},
        companion=BYOL,
        head="mlp-bn",
        more={"flat_epochs": 0, "warmup_epochs": 10.0, "out_dim": 256},
    ),
    "moco": Loss(moco, 512, 0.06, **_SGD, settings=_MOCO, companion=MoCo, more={"flat_epochs": 0}),
}
