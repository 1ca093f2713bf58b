"""The embedded data: reproducible, balanced, disjoint splits, and not to be read without learned features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_aug.shapes import SHAPE_CLASSES, TEXTURE_CLASSES, make_shapes, make_textures
from models import build_encoder

MAKERS = pytest.mark.parametrize("make", [make_shapes, make_textures])


def _digests(images):
    return {image.numpy().tobytes() for image in images}


def _linear_accuracy(train, train_labels, test, test_labels, l2, steps):
    """Test accuracy of multinomial logistic regression (L-BFGS) on standardised features."""
    mean, std = train.mean(0), train.std(0) + 1e-8
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(train.shape[1], 10, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, train_labels) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return ((test @ weight + bias).argmax(1) == test_labels).float().mean().item()


def test_names():
    assert len(set(SHAPE_CLASSES)) == len(set(TEXTURE_CLASSES)) == 10


@MAKERS
def test_kind_shape_and_range(make):
    images, labels = make("train", n=500)
    assert images.shape == (500, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.shape == (500,)
    assert labels.dtype == torch.int64
    # No blank images, and neither black nor white overall.
    assert images.float().std((1, 2, 3)).min() > 2
    assert 90 < images.float().mean() < 165


def test_default_sizes_balance_and_disjoint_splits():
    train, train_labels = make_shapes("train")
    test, test_labels = make_shapes("test")
    assert train_labels.bincount().tolist() == [600] * 10
    assert test_labels.bincount().tolist() == [400] * 10
    digests = _digests(train) | _digests(test)
    assert len(digests) == len(train) + len(test) == 10_000


@MAKERS
def test_any_prefix_is_balanced_and_in_random_order(make):
    _, labels = make("train", n=137)
    counts = labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    assert not torch.equal(labels[:10], labels[10:20])


@MAKERS
def test_deterministic_and_prefix_stable(make):
    images, labels = make("test", n=600, seed=3)
    for n in (0, 1, 250, 333, 600):
        fewer_images, fewer_labels = make("test", n=n, seed=3)
        assert torch.equal(fewer_images, images[:n])
        assert torch.equal(fewer_labels, labels[:n])


@MAKERS
def test_seeds_and_splits_differ(make):
    sets = [_digests(make(split, n=250, seed=seed)[0]) for split in ("train", "test") for seed in (0, 1)]
    assert len(set().union(*sets)) == 1000


@MAKERS
def test_global_random_states_are_neither_read_nor_changed(make):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is what is tested
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, _ = make("train", n=20)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(make("train", n=20)[0], first)


@MAKERS
def test_wrong_arguments(make):
    with pytest.raises(ValueError, match="'validation'"):
        make("validation")
    with pytest.raises(ValueError, match="-1"):
        make("train", n=-1)
    with pytest.raises(ValueError, match="-2"):
        make("train", n=1, seed=-2)


def test_pixels_do_not_tell_the_class():
    train, train_labels = make_shapes("train", n=5000)
    test, test_labels = make_shapes("test", n=2000)
    accuracy = _linear_accuracy(
        train.flatten(1) / 255.0, train_labels, test.flatten(1) / 255.0, test_labels, l2=1e-2, steps=30
    )
    assert accuracy < 0.25


@pytest.mark.slow
def test_random_features_hardly_tell_the_class():
    torch.manual_seed(0)
    encoder = build_encoder("resnet10w32").eval()
    train, train_labels = make_shapes("train", n=4000)
    test, test_labels = make_shapes("test", n=1000)
    with torch.no_grad():
        features, test_features = (
            torch.cat([encoder(batch / 255.0) for batch in images.split(250)]) for images in (train, test)
        )
    assert _linear_accuracy(features, train_labels, test_features, test_labels, l2=1e-4, steps=200) < 0.3
