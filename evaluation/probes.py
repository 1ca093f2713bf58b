"""Classifiers of frozen representations: linear by two protocols, a small network, and nearest neighbours."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.rows import packed
from settings import Command, Settings, setting
from training.represent import represent
from utils import Precision, UserError, generator, seeded

# Strengths of the L2 penalty that `logistic_regression` chooses from, strongest first, and the parts of the training
# set that are held out in turn.
STRENGTHS = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
FOLDS = 5

Labelled = tuple[Tensor, Tensor]  # images or representations, and their labels (N,)
Space = tuple[Labelled, Labelled]  # representations of training and test images
EachEpoch = Callable[[int, dict[str, float]], None]


def _without_training(command: Command) -> str | None:
    return "with --probe knn" if command.probe == "knn" else None


@dataclass(frozen=True)
class Probe(Settings):
    """The classifier of a frozen encoder's representations, and how it is trained."""

    probe: str = setting("linear", "classifier of the representations", choices=("linear", "mlp", "knn"))
    probe_epochs: int = setting(100, "epochs of the probe", at_least=1, acts=_without_training)
    batch_size: int = setting(256, "images per batch", at_least=1, flags=("-b", "--batch-size"), acts=_without_training)
    lr: float = setting(
        1e-3,
        "Adam's learning rate",
        above=0,
        acts=_without_training,
        otherwise="1e-3; fine-tuning: 3e-4; released: 1e-4 for copies, else 3e-4",
    )
    title = "probe"


def topk_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share in percent of rows of logits (N, C) whose label (N,) is among the k largest: correct / total."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100.0 * (best == labels[:, None]).any(dim=1).float().mean().item()


def top1_top5(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """`topk_accuracy` of logits (N, C) for k = 1 and 5, as `top1` and `top5`."""
    return {f"top{k}": topk_accuracy(logits, labels, k) for k in (1, 5)}


def standardising(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and standard deviation (D,) of representations (N, D): (h - mean) / deviation is standardised.

    That of a dimension that does not vary (less than a millionth of the largest deviation) is infinite: it always gives
    0, also for other images, of which nothing was learnt there.
    """
    deviation = features.std(dim=0, correction=0)
    return features.mean(dim=0), deviation.masked_fill(deviation <= 1e-6 * deviation.max(), math.inf)


@dataclass
class Classifier:
    """Scores and predictions of a classifier; a linear classifier also has `weight` (C, D) and `bias` (C,)."""

    scores: dict[str, float]
    predictions: Tensor  # of the test images (N,)
    weight: Tensor | None = None
    bias: Tensor | None = None


def linear_probe(train: Labelled, test: Labelled, lr: float = 1e-3, seed: int = 0, **options) -> Classifier:
    """A linear layer on standardised representations, trained with Adam and cross-entropy, judged after its last epoch.

    train, test: representations (N, D) and labels (N,), all on one device. Epochs, batch size and weight decay are by
    default the 2022 code's (`_train_layers`), which does not standardise: its figure depends on the scale of h. The
    weights returned apply to the representations as given.
    """
    with seeded(seed, "probe"):
        layer = nn.Linear(train[0].shape[1], classes_of(train, test))
    classifier = _train_layers(layer, train, test, lr, seed, **options)
    mean, deviation = standardising(train[0])
    classifier.weight = layer.weight.detach() / deviation
    classifier.bias = layer.bias.detach() - classifier.weight @ mean
    return classifier


def mlp_probe(
    train: Labelled, test: Labelled, lr: float = 1e-3, seed: int = 0, hidden: int = 512, **options
) -> Classifier:
    """As `linear_probe`, with Linear(D, hidden), ReLU, Linear(hidden, C)."""
    with seeded(seed, "probe"):
        width = train[0].shape[1]
        layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes_of(train, test)))
    return _train_layers(layers, train, test, lr, seed, **options)


def classes_of(train: Labelled, test: Labelled) -> int:
    """The number of outputs that a classifier for these labels needs."""
    return int(max(train[1].max(), test[1].max())) + 1


def _train_layers(
    layers: nn.Module,
    train: Labelled,
    test: Labelled,
    lr: float,
    seed: int,
    epochs: int = 100,
    weight_decay: float = 8e-4,
    batch_size: int = 256,
    each_epoch: EachEpoch = lambda epoch, scores: None,
) -> Classifier:
    """Train layers on standardised representations; `each_epoch(epoch, scores)` gets loss, top1 and top5 (percent)."""
    (features, labels), (test_features, test_labels) = train, test
    mean, deviation = standardising(features)
    features, test_features = ((h - mean) / deviation for h in (features, test_features))
    layers.to(features.device)
    optimizer = torch.optim.Adam(layers.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    scores: dict[str, float] = {}
    for epoch in range(epochs):
        order = torch.randperm(len(features), generator=generator(seed, "probe order", epoch)).to(features.device)
        total = torch.zeros((), device=features.device)
        for index in order.split(batch_size):
            loss = F.cross_entropy(layers(features[index]), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(index)
        with torch.no_grad():
            logits = layers(test_features)
        mean = total.item() / len(features)
        if not math.isfinite(mean):
            raise UserError(f"the classifier's loss is {mean} in epoch {epoch + 1}: lower the learning rate {lr:g}")
        scores = {"loss": mean, **top1_top5(logits, test_labels)}
        each_epoch(epoch, scores)
    return Classifier(scores, logits.argmax(dim=1))


def logistic_regression(train: Labelled, test: Labelled, seed: int = 0, strength: float | None = None) -> Classifier:
    """Multinomial logistic regression on standardised representations, trained to convergence by L-BFGS.

    Minimises mean cross-entropy + strength / 2 * |weight|^2 on the whole training set, with the strength given or, by
    default, the one of STRENGTHS that `cross_validated` chooses. Where it chose, the score `top1_sd` is the standard
    deviation of the test accuracies of the FOLDS classifiers of that strength, each trained without a part of the
    training set: how much top1 depends on the labelled images. The weights returned apply to the representations as
    given.
    """
    (features, labels), (test_features, test_labels) = train, test
    mean, deviation = standardising(features)
    standard = (features - mean) / deviation
    # In the basis of the principal components the penalty is the same, and the loss's Hessian is nearly diagonal.
    # In float64: the float32 routine fails on some low-rank matrices, such as those of fewer images than dimensions.
    spread, basis = (x.float() for x in torch.linalg.eigh((standard.T @ standard / len(standard)).double()))
    rotated = standard @ basis
    classes = classes_of(train, test)
    parts = standard.new_zeros(0, classes, standard.shape[1] + 1)
    if strength is None:
        strength, parts = cross_validated(rotated, labels, spread, classes, folds_of(labels, seed))
    start = parts.mean(dim=0, keepdim=True) if len(parts) else standard.new_zeros(1, *parts.shape[1:])
    every = torch.full((len(labels), 1), 1 / len(labels), device=features.device)
    solution = _minimise(rotated, labels, spread, start, strength, every)
    weight = torch.cat([solution, parts])[..., :-1] @ basis.T / deviation
    bias = torch.cat([solution, parts])[..., -1] - weight @ mean
    logits = [F.linear(test_features, *both) for both in zip(weight, bias, strict=True)]
    scores = {**top1_top5(logits[0], test_labels), "strength": strength}
    if len(parts):
        scores["top1_sd"] = torch.tensor([topk_accuracy(part, test_labels) for part in logits[1:]]).std().item()
    return Classifier(scores, logits[0].argmax(dim=1), weight[0], bias[0])


def folds_of(labels: Tensor, seed: int = 0) -> Tensor:
    """The part (N,), from 0 to FOLDS - 1, that each image belongs to: drawn by the seed, of equal shares of a class."""
    order = torch.randperm(len(labels), generator=generator(seed, "folds")).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(labels), device=labels.device) % FOLDS)


def cross_validated(
    features: Tensor, labels: Tensor, spread: Tensor, classes: int, folds: Tensor
) -> tuple[float, Tensor]:
    """The strength of STRENGTHS with the least log-loss on images held out, and its weights (FOLDS, C, D + 1).

    features (N, D): standardised, in their principal basis, with mean squares `spread` (D,). The weights of a part are
    trained on the images outside of it, all parts at once, and judged on those in it. Each strength starts where the
    stronger one ended; the first that is worse than the one before it is the last.
    """
    held_out = F.one_hot(folds, FOLDS).bool()
    weight = (~held_out).float()
    weight /= weight.sum(dim=0).clamp_min(1)
    solution = torch.zeros(FOLDS, classes, features.shape[1] + 1, device=features.device)
    best = math.inf, STRENGTHS[0], solution
    for strength in STRENGTHS:
        solution = _minimise(features, labels, spread, solution, strength, weight)
        loss = F.cross_entropy(_affine(features, solution)[held_out], labels).item()
        if loss > best[0]:
            break
        best = loss, strength, solution
    return best[1:]


def _affine(features: Tensor, solution: Tensor) -> Tensor:
    """Logits (N, F, C) of rows (N, D) by the weights (F, C, D + 1), the bias last, of F problems."""
    flat = solution.flatten(0, 1)
    return F.linear(features, flat[:, :-1], flat[:, -1]).view(len(features), *solution.shape[:2])


def _minimise(
    features: Tensor, labels: Tensor, spread: Tensor, start: Tensor, strength: float, weight: Tensor
) -> Tensor:
    """The minimising weights (F, C, D + 1) of F problems; their biases, which come last, are not penalised.

    weight (N, F): of each row in each problem's mean loss. `spread` (D,) is the features' mean square. It gives the
    curvature by which weights are scaled (the factor 0.1 is about that of a softmax over ten classes). Without scaling
    L-BFGS takes thousands of steps. Sums run on the features' device.
    """
    unit = torch.cat([(0.1 * spread.clamp_min(0) + strength).rsqrt(), spread.new_ones(1)])
    scaled = (start / unit).requires_grad_()
    # torch's L-BFGS: scipy's has a second pool of threads, which on few cores competes with torch's.
    limits = {"max_iter": 500, "tolerance_grad": 1e-5, "tolerance_change": 1e-7, "history_size": 10}
    optimizer = torch.optim.LBFGS([scaled], line_search_fn="strong_wolfe", **limits)
    truth = labels.repeat_interleave(len(start))

    def objective() -> Tensor:
        optimizer.zero_grad()
        solution = scaled * unit
        losses = F.cross_entropy(_affine(features, solution).flatten(0, 1), truth, reduction="none")
        loss = (losses.view_as(weight) * weight).sum()
        loss = loss + strength / 2 * solution[..., :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return scaled.detach() * unit


def neighbours_of(labels: Tensor) -> int:
    """The k of `knn_accuracy` for these training labels (N,): a fifth of a class's images, from 1 to 200."""
    return max(1, min(200, len(labels) // (5 * len(labels.unique()))))


def knn_accuracy(train: Labelled, test: Labelled, k: int | None = None, temperature: float = 0.1) -> float:
    """Accuracy in percent of k nearest neighbours by cosine, votes weighted by exp(cosine / temperature).

    train, test: representations (N, D) and labels (N,). The weights are those of Wu et al., CVPR 2018, section 3.4. k:
    by default `neighbours_of` the labels. With fewer than k training images all of them vote.
    """
    (features, labels), (test_features, test_labels) = train, test
    bank, k = F.normalize(features, dim=1), min(k or neighbours_of(labels), len(features))
    classes = classes_of(train, test)
    correct = 0
    for queries, truth in zip(test_features.split(1000), test_labels.split(1000), strict=True):
        similarity, neighbours = (F.normalize(queries, dim=1) @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(queries), classes, device=features.device)
        votes.scatter_add_(1, labels[neighbours], (similarity / temperature).exp())
        correct += (votes.argmax(dim=1) == truth).sum().item()
    return 100.0 * correct / len(test_labels)


# ---- together --------------------------------------------------------------------------------------------------------


def evaluate(
    train: Labelled, test: Labelled, lr: float = 1e-3, seed: int = 0, **options
) -> tuple[dict[str, Any], Classifier]:
    """The scores of representations (N, D) with labels (N,), in percent, and the classifier of `linear_probe`.

    top1 and top5: `linear_probe`, which gets the options. top1_converged, top1_converged_sd, strength:
    `logistic_regression`; right: which test images it classifies correctly, `packed`. knn: `knn_accuracy`, with knn_k.
    """
    linear = linear_probe(train, test, lr, seed, **options)
    converged = logistic_regression(train, test, seed)
    scores = {name: linear.scores[name] for name in ("top1", "top5")}
    scores |= {"top1_converged": converged.scores["top1"], "top1_converged_sd": converged.scores["top1_sd"]}
    scores |= {"strength": converged.scores["strength"], "right": packed(converged.predictions == test[1])}
    return {**scores, **_knn_scores(train, test)}, linear


def _knn_scores(train: Labelled, test: Labelled) -> dict[str, float]:
    return {"knn": knn_accuracy(train, test), "knn_k": neighbours_of(train[1])}


def scores_by(
    probe: Probe, train: Labelled, test: Labelled, seed: int = 0, each_epoch: EachEpoch = lambda epoch, scores: None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Scores of representations (N, D) with labels (N,) by the chosen probe, in percent.

    Also returns the state_dict of the linear layer as checkpoints store it, empty for other probes.
    """
    if probe.probe == "knn":
        return _knn_scores(train, test), {}
    options = {"epochs": probe.probe_epochs, "batch_size": probe.batch_size, "each_epoch": each_epoch}
    if probe.probe == "mlp":
        scores = mlp_probe(train, test, probe.lr, seed, **options).scores
        return {name: scores[name] for name in ("top1", "top5")}, {}
    scores, linear = evaluate(train, test, probe.lr, seed, **options)
    return scores, {"fc.weight": linear.weight.cpu(), "fc.bias": linear.bias.cpu()}


def represent_both(encoder: nn.Module, train: Labelled, test: Labelled, precision: Precision) -> Space:
    """`represent` of labelled uint8 images for training and test, on the precision's device."""
    train, test = (
        (represent(encoder, images, precision), labels.to(precision.device)) for images, labels in (train, test)
    )
    return train, test
