"""Classifiers of representations against libraries, hand-made cases and steps written out."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from torch import nn

from evaluation.probes import (
    STRENGTHS,
    Probe,
    classes_of,
    evaluate,
    knn_accuracy,
    linear_probe,
    logistic_regression,
    mlp_probe,
    scores_by,
    topk_accuracy,
)
from utils import generator, seeded


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
    mean, std = features.mean(dim=0), features.std(dim=0)
    # Ours penalises strength / 2 |w|^2 against the mean loss, theirs |w|^2 / 2 against C times the sum.
    reference = LogisticRegression(C=1 / (probe.scores["strength"] * len(features)), tol=1e-8, max_iter=5000)
    reference.fit(((features - mean) / std).numpy(), labels.numpy())
    expected = torch.from_numpy(reference.decision_function(((test_features - mean) / std).numpy()))
    logits = test_features @ probe.weight.T + probe.bias
    difference = logits.softmax(dim=1) - expected.softmax(dim=1)
    assert difference.abs().max() < 0.01
    accuracy = 100 * (expected.argmax(dim=1) == test_labels).float().mean().item()
    assert probe.scores["top1"] == pytest.approx(accuracy, abs=0.5)


def test_strength_is_chosen_on_held_out_images_only(clusters):
    train, (features, labels) = clusters
    strength = logistic_regression(train, (features, labels)).scores["strength"]
    assert logistic_regression(train, (features.flip(0), labels)).scores["strength"] == strength


def test_regression_of_pure_noise_prefers_a_strong_penalty():
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(300, 200, generator=draw), torch.randint(0, 10, (300,), generator=draw)
    assert logistic_regression((features, labels), (features, labels)).scores["strength"] >= 1e-3


def test_regression_takes_the_penalty_that_is_best_on_the_held_out_tenth():
    """A rare class beyond a threshold: under a strong penalty everything is taken for the other class."""
    draw = torch.Generator().manual_seed(0)

    def sample(number):
        features = torch.randn(number, 5, generator=draw)
        return features, (features[:, 0] > 1.3).long()

    train, test = sample(800), sample(400)
    classifier = logistic_regression(train, test)
    features, labels = (train[0] - train[0].mean(dim=0)) / train[0].std(dim=0), train[1]
    order = torch.randperm(800, generator=generator(0, "held-out tenth"))
    held_out, rest = order[:80], order[80:]
    accuracy = {}
    for strength in STRENGTHS:
        reference = LogisticRegression(C=1 / (strength * len(rest)), tol=1e-8, max_iter=5000)
        reference.fit(features[rest].numpy(), labels[rest].numpy())
        accuracy[strength] = reference.score(features[held_out].numpy(), labels[held_out].numpy())
    assert accuracy[STRENGTHS[0]] < max(accuracy.values()) - 0.04
    assert accuracy[classifier.scores["strength"]] == pytest.approx(max(accuracy.values()), abs=1 / 79)
    assert classifier.scores["top1"] > 96


def test_linear_probe_is_adam_on_cross_entropy(clusters):
    """One epoch of one batch against the step written out, with the 2022 weight decay."""
    (features, labels), test = clusters
    probe = linear_probe((features, labels), test, lr=0.1, epochs=1, batch_size=600)
    with seeded(0, "probe"):
        layer = nn.Linear(10, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=8e-4)
    nn.functional.cross_entropy(layer(features), labels).backward()
    optimizer.step()
    torch.testing.assert_close(probe.weight, layer.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.bias, layer.bias.detach(), rtol=1e-4, atol=1e-5)


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
    nn.functional.cross_entropy(layers(features), labels).backward()
    optimizer.step()
    assert torch.equal(probe.predictions, layers(test_features).argmax(dim=1))
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
    assert scores_by(Probe("knn"), *clusters) == ({"knn": knn_accuracy(*clusters)}, {})
