"""Linear evaluation and nearest neighbours against libraries and hand-made cases; the encoder never changes."""

import copy

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from torch import nn

from evaluation import (
    count_queried,
    evaluate,
    frozen,
    knn_accuracy,
    linear_probe,
    logistic_regression,
    released_probe,
    represent,
    topk_accuracy,
)
from utils import Precision, seeded
from victim import image_digests

FP32 = Precision("fp32", torch.device("cpu"))


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


def test_representations_in_batches_are_those_of_single_images(encoder, images):
    h = represent(encoder.train(), images, batch_size=5)
    with torch.no_grad():
        expected = torch.cat([encoder.eval()(image[None] / 255) for image in images])
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)


def test_representing_changes_nothing_and_restores_the_mode(encoder, images):
    encoder.train()
    before = copy.deepcopy(encoder.state_dict())
    represent(encoder, images)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert encoder.training


def test_a_changed_encoder_is_noticed(encoder, images):
    def change_it():
        with frozen(encoder):
            encoder.train()(images / 255)

    with pytest.raises(RuntimeError, match=r"changed the encoder: backbone\.bn1\.running_mean"):
        change_it()


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


def test_evaluate_gives_every_figure_and_counts_all_test_images(encoder, images):
    labels = torch.arange(12) % 3
    before = copy.deepcopy(encoder.state_dict())
    scores, probe = evaluate(encoder, (images, labels), (images[:7], labels[:7]), 1e-3, FP32)
    assert set(scores) == {"top1", "top5", "top1_converged", "strength", "knn"}
    for name in ("top1", "top1_converged", "knn"):
        assert (scores[name] * 7 / 100) == pytest.approx(round(scores[name] * 7 / 100), abs=1e-4)
    assert probe.weight.shape == (3, 256)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_released_protocol_uses_batch_statistics_and_batch_means(encoder, images):
    """Written out for one epoch: backbone in train mode throughout, mean of the batches' percentages."""
    labels = torch.arange(12) % 3
    train, test = (images[:8], labels[:8]), (images[7:], labels[7:])
    before = copy.deepcopy(encoder.state_dict())
    scores = released_probe(encoder, train, test, 1e-2, FP32, epochs=1, batch_size=4, test_batch_size=3)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())

    network = copy.deepcopy(encoder).train()
    with seeded(0, "probe"):
        layer = nn.Linear(256, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2, weight_decay=8e-4)
    for start in (0, 4):
        h = network(train[0][start : start + 4] / 255).detach()
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(h), train[1][start : start + 4]).backward()
        optimizer.step()
    shares = []
    for batch in (slice(0, 3), slice(3, 5)):
        logits = layer(network(test[0][batch] / 255))
        shares.append(100 * (logits.argmax(dim=1) == test[1][batch]).float().mean().item())
    assert scores["top1"] == pytest.approx(sum(shares) / 2)
    assert scores["top5"] == 100


def test_count_queried(images):
    digests = torch.frombuffer(bytearray(b"".join(image_digests(images[:8]))), dtype=torch.uint8).view(-1, 16)
    assert count_queried(images[6:], digests) == 2
    assert count_queried(images[8:], digests) == 0
