"""Classifiers of frozen representations: linear by two protocols, a small network, and nearest neighbours."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from settings import Command, Settings, setting
from training.represent import represent
from utils import Precision, UserError, generator, seeded

# Strengths of the L2 penalty that `logistic_regression` chooses from, strongest first.
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

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
        3e-4, "Adam's learning rate", above=0, acts=_without_training, otherwise="1e-4 for copies, else 3e-4"
    )
    title = "probe"


def topk_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share in percent of rows of logits (N, C) whose label (N,) is among the k largest: correct / total."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100.0 * (best == labels[:, None]).any(dim=1).float().mean().item()


def top1_top5(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """`topk_accuracy` of logits (N, C) for k = 1 and 5, as `top1` and `top5`."""
    return {f"top{k}": topk_accuracy(logits, labels, k) for k in (1, 5)}


@dataclass
class Classifier:
    """Scores and predictions of a classifier; a linear classifier also has `weight` (C, D) and `bias` (C,)."""

    scores: dict[str, float]
    predictions: Tensor  # of the test images (N,)
    weight: Tensor | None = None
    bias: Tensor | None = None


def linear_probe(train: Labelled, test: Labelled, lr: float = 1e-4, seed: int = 0, **options) -> Classifier:
    """The 2022 probe: a linear layer trained with Adam and cross-entropy, judged after its last epoch.

    train, test: representations (N, D) and labels (N,), all on one device. The defaults are the 2022 code's (other
    options: `_train_layers`); for victims its lr is 3e-4.
    """
    with seeded(seed, "probe"):
        layer = nn.Linear(train[0].shape[1], classes_of(train, test))
    classifier = _train_layers(layer, train, test, lr, seed, **options)
    classifier.weight, classifier.bias = layer.weight.detach(), layer.bias.detach()
    return classifier


def mlp_probe(
    train: Labelled, test: Labelled, lr: float = 1e-4, seed: int = 0, hidden: int = 512, **options
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
    """Train layers on representations; `each_epoch(epoch, scores)` gets loss, top1 and top5 (percent) after each."""
    (features, labels), (test_features, test_labels) = train, test
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


def logistic_regression(train: Labelled, test: Labelled, seed: int = 0) -> Classifier:
    """Multinomial logistic regression on standardised representations, trained to convergence by L-BFGS.

    Minimises mean cross-entropy + strength / 2 * |weight|^2, with the strength of STRENGTHS that is best on a held-out
    tenth of the training set; the classifier is then trained on all of it. The weights returned apply to the
    representations as given.
    """
    (features, labels), (test_features, test_labels) = train, test
    mean, std = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    standard = (features - mean) / std
    # In the basis of the principal components the penalty is the same, and the loss's Hessian is nearly diagonal.
    # In float64: the float32 routine fails on some low-rank matrices, such as those of fewer images than dimensions.
    spread, basis = (x.float() for x in torch.linalg.eigh((standard.T @ standard / len(standard)).double()))
    rotated = standard @ basis
    classes = classes_of(train, test)
    order = torch.randperm(len(features), generator=generator(seed, "held-out tenth")).to(features.device)
    tenth = max(1, len(order) // 10)
    held_out, rest = order.split([tenth, len(order) - tenth])
    solution = torch.zeros(classes, features.shape[1] + 1, device=features.device)
    tried = []
    for strength in STRENGTHS:  # each starts where the stronger penalty ended
        solution = _minimise(rotated[rest], labels[rest], spread, solution, strength)
        tried.append((topk_accuracy(_affine(rotated[held_out], solution), labels[held_out]), strength, solution))
    _, strength, solution = max(tried, key=lambda one: one[0])
    solution = _minimise(rotated, labels, spread, solution, strength)
    weight = solution[:, :-1] @ basis.T / std
    bias = solution[:, -1] - weight @ mean
    logits = F.linear(test_features, weight, bias)
    scores = {**top1_top5(logits, test_labels), "strength": strength}
    return Classifier(scores, logits.argmax(dim=1), weight, bias)


def _affine(features: Tensor, solution: Tensor) -> Tensor:
    return F.linear(features, solution[:, :-1], solution[:, -1])


def _minimise(features: Tensor, labels: Tensor, spread: Tensor, start: Tensor, strength: float) -> Tensor:
    """The minimising weights (C, D + 1), the bias last and not penalised; sums run on the features' device.

    `spread` (D,) is the features' mean square. It gives the curvature by which weights are scaled (the factor 0.1 is
    about that of a softmax over ten classes). Without scaling L-BFGS takes thousands of steps.
    """
    unit = torch.cat([(0.1 * spread.clamp_min(0) + strength).rsqrt(), spread.new_ones(1)])
    scaled = (start / unit).requires_grad_()
    # torch's L-BFGS: scipy's has a second pool of threads, which on few cores competes with torch's.
    limits = {"max_iter": 500, "tolerance_grad": 1e-5, "tolerance_change": 1e-7, "history_size": 10}
    optimizer = torch.optim.LBFGS([scaled], line_search_fn="strong_wolfe", **limits)

    def objective() -> Tensor:
        optimizer.zero_grad()
        solution = scaled * unit
        loss = F.cross_entropy(_affine(features, solution), labels)
        loss = loss + strength / 2 * solution[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return scaled.detach() * unit


def knn_accuracy(train: Labelled, test: Labelled, k: int = 200, temperature: float = 0.1) -> float:
    """Accuracy in percent of k nearest neighbours by cosine, votes weighted by exp(cosine / temperature).

    train, test: representations (N, D) and labels (N,). The weights are those of Wu et al., CVPR 2018, section 3.4.
    With fewer than k training images all of them vote.
    """
    (features, labels), (test_features, test_labels) = train, test
    bank, k = F.normalize(features, dim=1), min(k, len(features))
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
    train: Labelled, test: Labelled, lr: float, seed: int = 0, **options
) -> tuple[dict[str, float], Classifier]:
    """The scores of representations (N, D) with labels (N,), in percent, and the 2022 probe's classifier.

    top1 and top5: `linear_probe`, which gets the options; top1_converged: `logistic_regression`; knn: `knn_accuracy`.
    """
    linear = linear_probe(train, test, lr, seed, **options)
    converged = logistic_regression(train, test, seed)
    scores = {name: linear.scores[name] for name in ("top1", "top5")}
    scores |= {"top1_converged": converged.scores["top1"], "strength": converged.scores["strength"]}
    return {**scores, "knn": knn_accuracy(train, test)}, linear


def scores_by(
    probe: Probe, train: Labelled, test: Labelled, seed: int = 0, each_epoch: EachEpoch = lambda epoch, scores: None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Scores of representations (N, D) with labels (N,) by the chosen probe, in percent.

    Also returns the state_dict of the linear layer as checkpoints store it, empty for other probes.
    """
    if probe.probe == "knn":
        return {"knn": knn_accuracy(train, test)}, {}
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
