"""How good an encoder is: linear evaluation by two protocols, and nearest neighbours, all on frozen representations."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_aug.datasets import to_float
from utils import Precision, generator, seeded
from victim import image_digests

# Strengths of the L2 penalty that `logistic_regression` chooses from, strongest first.
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


@contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Within it the encoder is in eval mode; afterwards RuntimeError if any parameter or buffer has changed."""
    before = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    training = encoder.training
    encoder.eval()
    yield
    encoder.train(training)
    for key, value in encoder.state_dict().items():
        if not torch.equal(value, before[key]):
            raise RuntimeError(f"evaluation changed the encoder: {key}")


def represent(encoder: nn.Module, images: Tensor, precision: Precision | None = None, batch_size: int = 1000) -> Tensor:
    """Representations (N, D), float32, of uint8 or float images (N, 3, H, W), by the frozen encoder on its device."""
    device = next(encoder.parameters()).device
    precision = precision or Precision("fp32", device)
    parts = []
    with frozen(encoder), torch.no_grad():
        for batch in images.split(batch_size):
            batch = to_float(batch.to(device)).contiguous(memory_format=precision.memory_format)
            with precision.autocast():
                parts.append(encoder(batch).float())
    return torch.cat(parts)


def topk_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share in percent of rows of logits (N, C) whose label (N,) is among the k largest: correct / total."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100.0 * (best == labels[:, None]).any(dim=1).float().mean().item()


@dataclass
class Probe:
    """A linear classifier on representations: `weight` (C, D), `bias` (C,), and what it scored."""

    weight: Tensor
    bias: Tensor
    scores: dict[str, float]


def linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    lr: float = 1e-4,
    epochs: int = 100,
    weight_decay: float = 8e-4,
    batch_size: int = 256,
    seed: int = 0,
    each_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, scores: None,
) -> Probe:
    """The 2022 probe: a linear layer by Adam and cross-entropy, judged after its last epoch.

    train, test: representations (N, D) on one device and labels (N,). Its hyper-parameters are the defaults; lr is
    3e-4 for victims there. `each_epoch(epoch, scores)` gets loss, top1 and top5 (percent) after every epoch.
    """
    (features, labels), (test_features, test_labels) = train, test
    with seeded(seed, "probe"):
        layer = nn.Linear(features.shape[1], int(max(labels.max(), test_labels.max())) + 1).to(features.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    scores: dict[str, float] = {}
    for epoch in range(epochs):
        order = torch.randperm(len(features), generator=generator(seed, "probe order", epoch)).to(features.device)
        total = torch.zeros((), device=features.device)
        for index in order.split(batch_size):
            loss = F.cross_entropy(layer(features[index]), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(index)
        with torch.no_grad():
            logits = layer(test_features)
        scores = {"loss": total.item() / len(features), **_top1_top5(logits, test_labels)}
        each_epoch(epoch, scores)
    return Probe(layer.weight.detach(), layer.bias.detach(), scores)


def _top1_top5(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return {f"top{k}": topk_accuracy(logits, labels, k) for k in (1, 5)}


def logistic_regression(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int = 0) -> Probe:
    """Multinomial logistic regression on standardised representations, trained to convergence by L-BFGS.

    Minimises mean cross-entropy + strength / 2 * |weight|^2; the strength is the one of STRENGTHS that is best on a
    held-out tenth of the training set, and the classifier is then trained on all of it. The weights returned apply to
    the representations as they came.
    """
    (features, labels), (test_features, test_labels) = train, test
    mean, std = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    standard = (features - mean) / std
    # In the basis of the principal components the penalty reads the same, and its Hessian is nearly diagonal.
    spread, basis = torch.linalg.eigh(standard.T @ standard / len(standard))
    rotated = standard @ basis
    classes = int(max(labels.max(), test_labels.max())) + 1
    order = torch.randperm(len(features), generator=generator(seed, "held-out tenth")).to(features.device)
    held, rest = order.split([max(1, len(order) // 10), len(order) - max(1, len(order) // 10)])
    solution = torch.zeros(classes, features.shape[1] + 1, device=features.device)
    best = (-1.0, STRENGTHS[0], solution)
    for strength in STRENGTHS:  # each starts where the stronger penalty ended
        solution = _minimise(rotated[rest], labels[rest], spread, solution, strength)
        accuracy = topk_accuracy(_affine(rotated[held], solution), labels[held])
        best = max(best, (accuracy, strength, solution), key=lambda one: one[0])
    solution = _minimise(rotated, labels, spread, best[2], best[1])
    weight = solution[:, :-1] @ basis.T / std
    bias = solution[:, -1] - weight @ mean
    scores = _top1_top5(F.linear(test_features, weight, bias), test_labels)
    return Probe(weight, bias, {**scores, "strength": best[1]})


def _affine(features: Tensor, solution: Tensor) -> Tensor:
    return F.linear(features, solution[:, :-1], solution[:, -1])


def _minimise(features: Tensor, labels: Tensor, spread: Tensor, start: Tensor, strength: float) -> Tensor:
    """The minimum over (C, D + 1), the bias last and free of the penalty; sums run on the features' device.

    `spread` (D,) is the features' mean square: weights are measured in units of the curvature that it gives them, a
    tenth or so being that of a softmax over ten classes. Without this L-BFGS takes thousands of steps.
    """
    unit = torch.cat([(0.1 * spread.clamp_min(0) + strength).rsqrt(), spread.new_ones(1)])

    scaled = (start / unit).requires_grad_()
    # torch's own L-BFGS: scipy's brings a second pool of threads, which on few cores stands in the way of torch's.
    optimizer = torch.optim.LBFGS(
        [scaled],
        max_iter=500,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        solution = scaled * unit
        loss = F.cross_entropy(_affine(features, solution), labels)
        loss = loss + strength / 2 * solution[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return scaled.detach() * unit


def knn_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], k: int = 200, temperature: float = 0.1
) -> float:
    """Accuracy in percent of k nearest neighbours by cosine, votes weighted by exp(cosine / temperature).

    train, test: representations (N, D) and labels (N,). The weights are those of Wu et al., CVPR 2018, section 3.4.
    With fewer than k training images all of them vote.
    """
    (features, labels), (test_features, test_labels) = train, test
    bank, k = F.normalize(features, dim=1), min(k, len(features))
    classes = int(max(labels.max(), test_labels.max())) + 1
    correct = 0
    for queries, truth in zip(test_features.split(1000), test_labels.split(1000), strict=True):
        similarity, neighbours = (F.normalize(queries, dim=1) @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(queries), classes, device=features.device)
        votes.scatter_add_(1, labels[neighbours], (similarity / temperature).exp())
        correct += (votes.argmax(dim=1) == truth).sum().item()
    return 100.0 * correct / len(test_labels)


def released_probe(
    encoder: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    lr: float,
    precision: Precision,
    epochs: int = 100,
    weight_decay: float = 8e-4,
    batch_size: int = 256,
    test_batch_size: int = 64,
    seed: int = 0,
    each_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, scores: None,
) -> dict[str, float]:
    """The 2022 protocol with its quirks, for comparison only: top1 and top5 in percent.

    train, test: uint8 images and labels. The "frozen" backbone stays in train mode, so it normalises by each batch's
    own statistics (test batches too), and accuracy is the mean of the batches' percentages, however large the last is.
    Works on a copy: the encoder that was given does not change.
    """
    encoder = copy.deepcopy(encoder).requires_grad_(False).train()
    device = precision.device
    (images, labels), (test_images, test_labels) = ((x.to(device), y.to(device)) for x, y in (train, test))
    with seeded(seed, "probe"):
        layer = nn.Linear(encoder.dim, int(max(labels.max(), test_labels.max())) + 1).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    def features(batch: Tensor) -> Tensor:
        with torch.no_grad(), precision.autocast():
            return encoder(to_float(batch).contiguous(memory_format=precision.memory_format)).float()

    scores: dict[str, float] = {}
    for epoch in range(epochs):
        for batch, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            loss = F.cross_entropy(layer(features(batch)), truth)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        batches = []
        with torch.no_grad():
            for batch, truth in zip(
                test_images.split(test_batch_size), test_labels.split(test_batch_size), strict=True
            ):
                batches.append(_top1_top5(layer(features(batch)), truth))
        scores = {key: sum(one[key] for one in batches) / len(batches) for key in ("top1", "top5")}
        each_epoch(epoch, scores)
    return scores


def evaluate(
    encoder: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    lr: float,
    precision: Precision,
    batch_size: int = 256,
    seed: int = 0,
    each_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, scores: None,
) -> tuple[dict[str, float], Probe]:
    """The scores of a frozen encoder, in percent, and the 2022 probe's layer.

    train, test: uint8 images and labels. top1 and top5: `linear_probe`; top1_converged: `logistic_regression`; knn:
    `knn_accuracy`. Representations are computed once.
    """
    device = precision.device
    train, test = ((represent(encoder, images, precision), labels.to(device)) for images, labels in (train, test))
    probe = linear_probe(train, test, lr, batch_size=batch_size, seed=seed, each_epoch=each_epoch)
    converged = logistic_regression(train, test, seed)
    scores = {
        "top1": probe.scores["top1"],
        "top5": probe.scores["top5"],
        "top1_converged": converged.scores["top1"],
        "strength": converged.scores["strength"],
        "knn": knn_accuracy(train, test),
    }
    return scores, probe


def count_queried(images: Tensor, digests: Tensor) -> int:
    """How many of the images (N, 3, H, W) are, pixel for pixel, among those with digests uint8 (M, 16)."""
    queried = {bytes(row) for row in digests.numpy()}
    return sum(digest in queried for digest in image_digests(images))
