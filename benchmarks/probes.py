"""Rows of judging a frozen encoder: linear evaluation against the classic way, a converged probe against sklearn's."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.row import Ratio, claim, make_row, median_of, rounded
from benchmarks.steps import pictures
from benchmarks.timing import Contest, Effort, peer, seconds_of
from evaluation import Classifier, Labelled, linear_probe, logistic_regression, represent
from evaluation.probes import FOLDS, STRENGTHS, folds_of, standardising
from models import SimCLREncoder, build_encoder
from utils import generator

TRAIN, TEST, EPOCHS, CLASSES = 50_000, 10_000, 100, 10
OURS, OUR_FIT = "ours", "ours, one fit"
ONE_FIT, SEARCH = "sklearn, one fit", "sklearn, the same search"


def made_up(count: int, width: int, seed: int) -> Labelled:
    """Representations (count, width) of ten classes that overlap, with a few strong directions, and their labels."""
    draws, classes = generator(seed, "representations"), generator(0, "classes")
    spread = torch.arange(1, width + 1) ** -0.5
    mix = torch.randn(width, width, generator=classes) / width**0.5
    centres = 0.2 * torch.randn(CLASSES, width, generator=classes)
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, width, generator=draws)
    return F.relu(((centres[labels] + noise) * spread) @ mix), labels


def classic_evaluation(encoder: SimCLREncoder, train: Labelled, test: Labelled) -> Callable[[], None]:
    """A function that does another epoch the classic way: the backbone runs over all images, train and test."""
    layer = nn.Linear(encoder.dim, CLASSES).to(train[0].device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-4, weight_decay=8e-4)

    def epoch() -> None:
        for images, truth in zip(train[0].split(256), train[1].split(256), strict=True):
            with torch.no_grad():
                h = encoder(images / 255)
            loss = F.cross_entropy(layer(h), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for images in test[0].split(256):
                layer(encoder(images / 255))

    return epoch


def linear_evaluation(effort: Effort, arch: str) -> dict[str, Any]:
    """The row of 100 epochs of a linear layer on CIFAR-10's numbers of images: seconds."""
    count = effort.size(1000, 10_000, 20)
    numbers = {"train": count, "test": count // 5}
    images = pictures(count).to(effort.device)
    train, test = ((images[:n], torch.arange(n, device=effort.device) % CLASSES) for n in numbers.values())
    plain = build_encoder(arch).eval().to(effort.device)
    encoder = build_encoder(arch).eval().to(effort.device, memory_format=effort.precision.memory_format)
    sizes = (TRAIN, TEST) if not effort.quick else (200, 100)
    ready = [tuple(x.to(effort.device) for x in made_up(n, encoder.dim, seed)) for seed, n in enumerate(sizes)]
    both, contest = torch.cat([train[0], test[0]]), Contest(effort)
    times = (TRAIN + TEST) / len(both)

    def ours() -> float:
        layer = seconds_of(lambda: linear_probe(*ready, epochs=EPOCHS))
        return times * seconds_of(lambda: represent(encoder, both, effort.precision)) + layer

    contest.add(OURS, lambda: ours, own_clock=True)
    contest.add("classic", lambda: classic_evaluation(plain, train, test), 1 / (times * EPOCHS), ours=False)
    contest.run()
    limit = claim("seconds of ours", median_of(contest, OURS), at_most=15) if effort.on_gpu else None
    more = {
        "timed": f"representations of {len(both):,} images, {EPOCHS} epochs of a layer on {sizes[0]:,} + {sizes[1]:,}; "
        f"classic: an epoch of {len(both):,} images",
        "scaled_to": f"{TRAIN:,} + {TEST:,} images, {EPOCHS} epochs",
        "claims": [limit] if limit else [],
    }
    notes = ("classic: the backbone runs over all images in every epoch, float32, NCHW",)
    return make_row(f"Linear evaluation, {arch}", contest, "s", [Ratio(OURS, "classic", 100.0)], notes, **more)


# ---- the converged probe ---------------------------------------------------------------------------------------------


def objective(train: Labelled, weight: Tensor, bias: Tensor, strength: float) -> float:
    """What both minimise on standardised representations: mean cross-entropy + strength / 2 * |weight|^2."""
    loss = F.cross_entropy(F.linear(train[0], weight, bias), train[1])
    return (loss + strength / 2 * weight.square().sum()).item()


def sklearn_fit(train: Labelled, strength: float, start: Any = None) -> Any:
    """sklearn's regression, fitted until it has converged, from zero or from an earlier fit's weights."""
    linear_model = peer("sklearn.linear_model")
    options = {"C": 1 / (strength * len(train[1])), "tol": 1e-5, "max_iter": 10_000, "warm_start": True}
    fit = linear_model.LogisticRegression(**options)
    if start is not None:
        fit.coef_, fit.intercept_, fit.classes_ = start.coef_, start.intercept_, start.classes_
    return fit.fit(*(x.cpu().numpy() for x in train))


def sklearn_search(train: Labelled, strengths: Sequence[float]) -> float:
    """Seconds of sklearn's fits on FOLDS parts at these strengths, strongest first, scaled from one part."""
    inside = folds_of(train[1]) != 0
    part, started, fit = (train[0][inside], train[1][inside]), time.perf_counter(), None
    for strength in strengths:
        fit = sklearn_fit(part, strength, fit)
    return FOLDS * (time.perf_counter() - started)


def probe(effort: Effort) -> dict[str, Any]:
    """The row of a converged linear classifier on ready representations: seconds."""
    count, test_count, width = effort.size((TRAIN, TEST, 512), (TRAIN, TEST, 512), (400, 200, 16))
    train, test = (
        tuple(x.to(effort.device) for x in made_up(n, width, seed)) for seed, n in enumerate((count, test_count))
    )
    mean, deviation = standardising(train[0])
    standard, standard_test = (((h - mean) / deviation, labels) for h, labels in (train, test))
    contest, title = Contest(effort), f"Converged probe, {count:,} x {width} representations"
    ours: list[Classifier] = []
    contest.add(OURS, lambda: lambda: ours.append(logistic_regression(train, test)))
    if not ours:
        return make_row(title, contest, "s")
    result, strength = ours[0], ours[0].scores["strength"]
    tried = STRENGTHS[: STRENGTHS.index(strength) + 2]
    found: list[Any] = []
    contest.add(OUR_FIT, lambda: lambda: logistic_regression(train, test, strength=strength))
    contest.add(ONE_FIT, lambda: lambda: found.append(sklearn_fit(standard, strength)), ours=False)
    contest.add(SEARCH, lambda: lambda: sklearn_search(standard, tried), warm_up=False, own_clock=True, ours=False)
    contest.run()
    weight = result.weight * deviation.masked_fill(deviation.isinf(), 0)
    scores = {"ours": _scores(standard, standard_test, weight, result.bias + result.weight @ mean, strength)}
    if found:
        kept = (torch.as_tensor(x, device=effort.device).float() for x in (found[-1].coef_, found[-1].intercept_))
        scores["sklearn"] = _scores(standard, standard_test, *kept, strength)
        scores["sklearn"]["iterations"] = int(max(found[-1].n_iter_))
    more = {"strength": strength, "scores": scores, "claims": _equal(scores)}
    more |= {"timed": f"{SEARCH}: one of {FOLDS} folds", "scaled_to": f"{FOLDS} folds"}
    notes = (
        f"ours: `logistic_regression`, {FOLDS} folds x {len(tried)} strengths to choose one, then a fit of all",
        f"{OUR_FIT}: the same function with that strength given",
        f"{ONE_FIT}: LogisticRegression (L-BFGS) on the same standardised representations, at the strength ours chose",
        f"{SEARCH}: such fits of the same folds at the same strengths, each from the weights of the one before",
    )
    ratios = [Ratio(OUR_FIT, ONE_FIT, 20.0 if effort.on_gpu else 5.0), Ratio(OURS, SEARCH)]
    return make_row(title, contest, "s", ratios, notes, **more)


def _scores(train: Labelled, test: Labelled, weight: Tensor, bias: Tensor, strength: float) -> dict[str, float]:
    top1 = (F.linear(test[0], weight, bias).argmax(1) == test[1]).float().mean().item()
    return {"top1": rounded(100 * top1), "objective": float(f"{objective(train, weight, bias, strength):.7g}")}


def _equal(scores: dict[str, dict[str, float]]) -> list[dict]:
    """Whether both have converged: their objectives differ by no more than a thousandth."""
    if len(scores) < 2:
        return []
    ours, theirs = (scores[name]["objective"] for name in ("ours", "sklearn"))
    difference = abs(ours - theirs) / theirs if theirs and math.isfinite(ours) else math.inf
    return [claim("difference of the two objectives, as a share", difference, at_most=1e-3)]
