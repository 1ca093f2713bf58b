"""Classifiers of representations against libraries, hand-made cases and steps written out."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from torch import nn

from evaluation.probes import (
    FOLDS,
    STRENGTHS,
    Probe,
    classes_of,
    evaluate,
    folds_of,
    knn_accuracy,
    linear_probe,
    logistic_regression,
    mlp_probe,
    neighbours_of,
    scores_by,
    topk_accuracy,
)
from evaluation.rows import packed, unpacked
from utils import seeded


@pytest.fixture
def clusters():
    """Representations of four overlapping classes: train and test."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 10, generator=draw)

    def sample(number):
        labels = torch.randint(0, 4, (number,), generator=draw)
        scale = torch.logspace(-2, 2, 10)  # very different scales: standardising matters
        return (centres[labels] + 1.2 * torch.randn(number, 10, generator=draw)) * scale, labels

    return sample(600), sample(400)


def test_topk_accuracy():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [3, 2, 1, 0]])
    labels = torch.tensor([0, 0, 1])
    assert topk_accuracy(logits, labels) == pytest.approx(100 / 3)
    assert topk_accuracy(logits, labels, 2) == pytest.approx(200 / 3)
    assert topk_accuracy(logits, labels, 5) == 100


def test_converged_regression_agrees_with_scikit_learn(clusters):
    (features, labels), (test_features, test_labels) = clusters
    probe = logistic_regression(*clusters)
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    reference = by_scikit_learn(((features - mean) / std).numpy(), labels.numpy(), probe.scores["strength"])
    expected = torch.from_numpy(reference.decision_function(((test_features - mean) / std).numpy()))
    logits = test_features @ probe.weight.T + probe.bias
    difference = logits.softmax(dim=1) - expected.softmax(dim=1)
    assert difference.abs().max() < 0.01
    accuracy = 100 * (expected.argmax(dim=1) == test_labels).float().mean().item()
    assert probe.scores["top1"] == pytest.approx(accuracy, abs=0.5)


def test_a_strength_that_is_given_is_taken(clusters):
    chosen = logistic_regression(*clusters)
    given = logistic_regression(*clusters, strength=chosen.scores["strength"])
    assert given.scores.keys() == chosen.scores.keys() - {"top1_sd"}
    test = clusters[1][0]
    logits = [test @ probe.weight.T + probe.bias for probe in (chosen, given)]
    assert (logits[0].softmax(dim=1) - logits[1].softmax(dim=1)).abs().max() < 0.01
    other = logistic_regression(*clusters, strength=10.0)
    assert other.scores["strength"] == 10.0
    assert other.weight.norm() < 0.5 * given.weight.norm()


def test_strength_is_chosen_without_the_test_images(clusters):
    train, (features, labels) = clusters
    strength = logistic_regression(train, (features, labels)).scores["strength"]
    assert logistic_regression(train, (features.flip(0), labels)).scores["strength"] == strength


def test_regression_of_pure_noise_prefers_a_strong_penalty():
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(300, 200, generator=draw), torch.randint(0, 10, (300,), generator=draw)
    assert logistic_regression((features, labels), (features, labels)).scores["strength"] >= 0.1


def test_folds_have_equal_shares_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 15 + [2] * 5)
    folds = folds_of(labels)
    assert [torch.bincount(folds[labels == label]).tolist() for label in range(3)] == [[2] * 5, [3] * 5, [1] * 5]
    assert not torch.equal(folds, folds_of(labels, seed=1))


@pytest.fixture(scope="module")
def many_dimensions():
    """Six classes of 60 images in 60 dimensions: too many for weights without a penalty."""
    draw = torch.Generator().manual_seed(0)
    centres = 0.5 * torch.randn(6, 60, generator=draw)

    def sample(number):
        labels = torch.arange(number) % 6
        return centres[labels] + torch.randn(number, 60, generator=draw), labels

    return sample(360), sample(300)


def by_scikit_learn(features, labels, strength):
    """Ours penalises strength / 2 |w|^2 against the mean loss, theirs |w|^2 / 2 against C times the sum."""
    return LogisticRegression(C=1 / (strength * len(labels)), tol=1e-8, max_iter=5000).fit(features, labels)


def test_strength_has_the_least_log_loss_over_five_folds(many_dimensions):
    """One strength after the other and fold by fold, by scikit-learn; also the deviation of the five classifiers."""
    train, test = many_dimensions
    classifier = logistic_regression(train, test)
    mean, std = train[0].mean(dim=0), train[0].std(dim=0, correction=0)
    features, labels = ((train[0] - mean) / std).numpy(), train[1].numpy()
    folds, losses, accuracies = folds_of(train[1]).numpy(), {}, {}
    for strength in STRENGTHS[:9]:
        chances, accuracies[strength] = np.empty(len(labels)), []
        for fold in range(FOLDS):
            out = folds == fold
            reference = by_scikit_learn(features[~out], labels[~out], strength)
            chances[out] = reference.predict_proba(features[out])[np.arange(out.sum()), labels[out]]
            accuracies[strength].append(100 * reference.score(((test[0] - mean) / std).numpy(), test[1].numpy()))
        losses[strength] = -np.log(chances).mean()
    best = min(losses, key=losses.get)
    assert min(losses[STRENGTHS[0]], losses[STRENGTHS[8]]) > 1.25 * losses[best]
    assert classifier.scores["strength"] == best
    assert classifier.scores["top1_sd"] == pytest.approx(np.std(accuracies[best], ddof=1), abs=0.2)


def figure_by_a_single_tenth(train, test, seed):
    """top1 by the strength that is the most accurate on one tenth held out, the strongest of several."""
    mean, std = train[0].mean(dim=0), train[0].std(dim=0, correction=0)
    (features, labels), (test_features, test_labels) = (
        (((h - mean) / std).numpy(), labels.numpy()) for h, labels in (train, test)
    )
    held_out, rest = np.split(np.random.default_rng(seed).permutation(len(labels)), [len(labels) // 10])
    right = [
        by_scikit_learn(features[rest], labels[rest], strength).score(features[held_out], labels[held_out])
        for strength in STRENGTHS[:9]
    ]
    best = by_scikit_learn(features, labels, STRENGTHS[int(np.argmax(right))])
    return 100 * best.score(test_features, test_labels)


def test_the_draw_of_the_folds_hardly_changes_the_figure(many_dimensions):
    """The draw of a single tenth, judged by its accuracy, moves it by three points for the same representations."""
    scores = [logistic_regression(*many_dimensions, seed=seed).scores["top1"] for seed in range(6)]
    assert max(scores) - min(scores) <= 1
    by_a_tenth = [figure_by_a_single_tenth(*many_dimensions, seed) for seed in range(6)]
    assert (min(by_a_tenth), max(by_a_tenth)) == pytest.approx((93.3, 96.3), abs=0.4)


def test_a_few_labels_are_enough_to_choose_by():
    features, labels = torch.eye(3), torch.tensor([0, 1, 1])
    for count in (1, 2, 3):
        scores = logistic_regression((features[:count], labels[:count]), (features, labels)).scores
        assert all(math.isfinite(value) for value in scores.values())


@pytest.mark.parametrize("factor", [4.0, 0.03])
def test_no_figure_depends_on_the_scale_of_the_representations(clusters, factor):
    """The 2022 probe gains 3 to 7 points from a factor of 4."""
    (features, labels), (test_features, test_labels) = clusters
    for probe in (linear_probe, mlp_probe, logistic_regression):
        options = {} if probe is logistic_regression else {"epochs": 3}
        expected = probe(*clusters, **options)
        found = probe((factor * features + 1, labels), (factor * test_features + 1, test_labels), **options)
        assert found.scores["top1"] == pytest.approx(expected.scores["top1"], abs=0.3), probe.__name__
        if expected.weight is not None:
            torch.testing.assert_close(found.weight * factor, expected.weight, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("probe", [linear_probe, logistic_regression])
def test_a_dimension_without_training_is_left_out(probe, clusters):
    """It does not vary in training; what it is in test images says nothing."""
    (features, labels), (test_features, test_labels) = clusters
    train = torch.cat([features, torch.full((600, 1), 7.0)], dim=1)
    scores = []
    for value in (7.0, 1e3):
        test = torch.cat([test_features, torch.full((400, 1), value)], dim=1)
        found = probe((train, labels), (test, test_labels))
        assert (found.weight[:, -1] == 0).all()
        scores.append(found.scores["top1"])
    assert scores[0] == scores[1] > 50


def test_linear_probe_is_adam_on_cross_entropy(clusters):
    """One epoch of one batch against the step written out, with the 2022 weight decay."""
    (features, labels), (test_features, _) = clusters
    probe = linear_probe((features, labels), clusters[1], lr=0.1, epochs=1, batch_size=600)
    with seeded(0, "probe"):
        layer = nn.Linear(10, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=8e-4)
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    nn.functional.cross_entropy(layer((features - mean) / std), labels).backward()
    optimizer.step()
    logits = layer((test_features - mean) / std)
    torch.testing.assert_close(test_features @ probe.weight.T + probe.bias, logits.detach(), rtol=1e-3, atol=1e-3)
    assert torch.equal(probe.predictions, logits.argmax(dim=1))


def test_linear_probe_reports_its_last_epoch(clusters):
    seen = []
    probe = linear_probe(*clusters, lr=0.01, epochs=5, each_epoch=lambda epoch, scores: seen.append((epoch, scores)))
    assert [epoch for epoch, _ in seen] == [0, 1, 2, 3, 4]
    assert probe.scores == seen[-1][1]
    features, labels = clusters[1]
    logits = features @ probe.weight.T + probe.bias
    assert probe.scores["top1"] == pytest.approx(topk_accuracy(logits, labels))


def test_linear_probe_repeats_by_seed(clusters):
    first, second, third = (linear_probe(*clusters, epochs=2, seed=seed).weight for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_mlp_probe_is_adam_on_two_layers(clusters):
    """One epoch of one batch against the step written out."""
    (features, labels), (test_features, _) = clusters
    probe = mlp_probe((features, labels), clusters[1], lr=0.1, hidden=8, epochs=1, batch_size=600)
    with seeded(0, "probe"):
        layers = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(layers.parameters(), lr=0.1, weight_decay=8e-4)
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    nn.functional.cross_entropy(layers((features - mean) / std), labels).backward()
    optimizer.step()
    assert torch.equal(probe.predictions, layers((test_features - mean) / std).argmax(dim=1))
    assert probe.weight is None


def test_mlp_probe_learns_what_no_linear_layer_can():
    """Exclusive or: four clusters on the corners of a square, opposite ones of one class."""
    draw = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 2, (800, 2), generator=draw)
    features = 2.0 * corners - 1 + 0.1 * torch.randn(800, 2, generator=draw)
    both = ((features[:600], corners.sum(dim=1)[:600] % 2), (features[600:], corners.sum(dim=1)[600:] % 2))
    assert linear_probe(*both, lr=0.01, epochs=20).scores["top1"] < 80
    assert mlp_probe(*both, lr=0.01, epochs=20).scores["top1"] == 100


def test_probes_keep_their_predictions(clusters):
    for probe in (linear_probe(*clusters, epochs=2), mlp_probe(*clusters, epochs=2), logistic_regression(*clusters)):
        right = (probe.predictions == clusters[1][1]).float().mean().item()
        assert probe.scores["top1"] == pytest.approx(100 * right)


def test_classes_of_counts_those_of_both_splits():
    features = torch.zeros(2, 3)
    assert classes_of((features, torch.tensor([0, 4])), (features, torch.tensor([1, 2]))) == 5


def slow_knn(train, test, k, temperature=0.1):
    (features, labels), (test_features, test_labels) = train, test
    search = NearestNeighbors(n_neighbors=k, metric="cosine").fit(features.numpy())
    distances, neighbours = search.kneighbors(test_features.numpy())
    correct = 0
    for row, index, truth in zip(distances, neighbours, test_labels, strict=True):
        votes = torch.zeros(4, dtype=torch.float64)
        for distance, i in zip(row, index, strict=True):
            votes[labels[i]] += torch.exp(torch.tensor((1 - distance) / temperature))
        correct += int(votes.argmax() == truth)
    return 100 * correct / len(test_labels)


@pytest.mark.parametrize("k", [1, 20, 200])
def test_knn_agrees_with_scikit_learn(clusters, k):
    assert knn_accuracy(*clusters, k=k) == pytest.approx(slow_knn(*clusters, k=k), abs=0.5)


@pytest.mark.parametrize(("labelled", "classes", "k"), [(50000, 10, 200), (1000, 10, 20), (500, 100, 1), (30, 10, 1)])
def test_knn_asks_a_fifth_of_a_class(labelled, classes, k):
    assert neighbours_of(torch.arange(labelled) % classes) == k


def test_knn_takes_its_k_from_the_labels(clusters):
    assert knn_accuracy(*clusters) == knn_accuracy(*clusters, k=30) != knn_accuracy(*clusters, k=200)


def test_knn_with_fewer_images_than_k():
    features, labels = torch.eye(4), torch.arange(4)
    assert knn_accuracy((features, labels), (features, labels), k=200) == 100


def test_each_probe_gives_the_scores_that_it_measures(clusters):
    seen = []
    settings = {"probe_epochs": 2, "batch_size": 50, "lr": 0.01}
    scores, state = scores_by(Probe("linear", **settings), *clusters, 3, lambda epoch, found: seen.append(epoch))
    expected, linear = evaluate(*clusters, 0.01, 3, epochs=2, batch_size=50)
    assert scores == expected
    assert torch.equal(state["fc.weight"], linear.weight)
    assert torch.equal(state["fc.bias"], linear.bias)
    assert seen == [0, 1]
    layers = mlp_probe(*clusters, 0.01, 3, epochs=2, batch_size=50)
    of_layers = {name: layers.scores[name] for name in ("top1", "top5")}
    assert scores_by(Probe("mlp", **settings), *clusters, 3) == (of_layers, {})
    assert scores_by(Probe("knn"), *clusters) == ({"knn": knn_accuracy(*clusters), "knn_k": 30}, {})
    converged = logistic_regression(*clusters, 3)
    right = converged.predictions == clusters[1][1]
    assert unpacked(scores["right"], 400).tolist() == right.tolist()
    assert scores["top1_converged"] == pytest.approx(100 * right.float().mean().item())
    assert (scores["top1_converged_sd"], scores["knn_k"]) == (converged.scores["top1_sd"], 30)


@pytest.mark.parametrize("count", [1, 8, 13])
def test_packed_booleans_are_read_back(count):
    right = torch.arange(count) % 3 == 0
    assert unpacked(packed(right), count).tolist() == right.tolist()
    with pytest.raises(ValueError, match="bits are not those of"):
        unpacked(packed(right), count + 8)
