"""Dataset inference on representations made up for it: where it must separate, and where it must not."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import v2

from data_aug.augment import draw_boxes
from data_aug.datasets import load_dataset
from defenses.dataset_inference import (
    Mixture,
    halves,
    log_likelihoods,
    published_mixture,
    random_crops,
    under_determined,
)
from evaluation.statistics import cohens_d, welch
from utils import UserError, generator

FOUR = Mixture("diag", 4)


def test_halves_are_disjoint_and_random():
    first, second = halves(101, seed=1)
    assert len(first) == len(second) == 50
    assert len({*first.tolist(), *second.tolist()}) == 100
    assert first.tolist() != sorted(first.tolist())
    assert torch.equal(first, halves(101, seed=1)[0])
    assert not torch.equal(first, halves(101, seed=2)[0])
    first, second = halves(101, 20)
    assert len({*first.tolist(), *second.tolist()}) == 20


@pytest.mark.parametrize(
    ("count", "number", "message"),
    [
        (101, 102, "was trained on 101 images, give 101 or less"),
        (101, 3, "too few for dataset inference: give --num-train 4 or more"),
        (3, None, "3 training images are too few for dataset inference: try --method watermark"),
    ],
)
def test_halves_of_too_many_or_too_few_are_refused(count, number, message):
    with pytest.raises(UserError, match=message):
        halves(count, number)


# ---- the mixture ----


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("cifar10", ("full", 10, False)),
        ("svhn-merged", ("full", 10, False)),
        ("npz:data/mine.npz", ("full", 10, False)),
        ("imagenet", ("diag", 50, True)),
        ("folder:/data/ImageNet-100", ("diag", 50, True)),
        ("folder:/data/imagenet/train", ("diag", 50, True)),
        ("folder:/data/my-imagenet/train", ("full", 10, False)),
    ],
)
def test_settings_are_those_published_for_the_data_set(dataset, expected):
    mixture = published_mixture(dataset)
    assert (mixture.covariance, mixture.components, mixture.standardise) == expected


def draw_rows():
    return torch.randn(2, 40, 5, dtype=torch.float64, generator=generator(0, "test"))


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_a_single_component_is_a_normal_density_of_directions(covariance, standardise):
    """Against scipy's, with mean and covariance of the unit rows and 1e-6 on the diagonal."""
    fitted, seen = draw_rows() * torch.tensor([1, 2, 3, 4, 5.0]) + 3
    rows = [fitted, seen]
    if standardise:
        rows = [(x - fitted.mean(dim=0)) / fitted.std(dim=0, correction=0) for x in rows]
    fit, judged = ((x / x.norm(dim=1, keepdim=True)).numpy() for x in rows)
    spread = np.cov(fit.T, bias=True) + 1e-6 * np.eye(5)
    expected = stats.multivariate_normal(fit.mean(axis=0), spread if covariance == "full" else np.diag(np.diag(spread)))
    found = log_likelihoods(fitted, seen, mixture=Mixture(covariance, 1, standardise))[0]
    assert found.numpy() == pytest.approx(expected.logpdf(judged))


def test_the_length_of_a_representation_does_not_count():
    fitted, seen = draw_rows()
    lengths = torch.rand(40, 1, generator=generator(1, "test")) + 0.5
    (plain,) = log_likelihoods(fitted, seen, mixture=FOUR)
    (scaled,) = log_likelihoods(fitted, seen * lengths, mixture=FOUR)
    torch.testing.assert_close(plain, scaled)


def test_the_mixture_follows_from_the_seed():
    fitted, seen = torch.rand(2, 60, 5, generator=generator(0, "test"))
    first, again, other = (log_likelihoods(fitted, seen, mixture=FOUR, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_full_covariances_of_too_few_images_are_named():
    """Ten covariances of 512 dimensions need 5,130 images; the published halves of CIFAR-10 have 25,000."""
    words = under_determined(Mixture(), 1000, 512)
    assert "1000 fitted images do not determine 10 full covariances of 512 dimensions, which need 5130" in words
    assert "--num-train, fewer --components or --covariance diag" in words
    assert under_determined(Mixture(), 25_000, 512) is None
    assert under_determined(Mixture(), 5129, 512)
    assert under_determined(Mixture(), 5130, 512) is None
    assert under_determined(Mixture("diag"), 10, 512) is None


def test_a_mixture_that_cannot_be_fitted_is_a_line():
    with pytest.raises(UserError, match=r"mixture of 5 full covariances of 5 dimensions cannot be fitted to 4 images"):
        log_likelihoods(draw_rows()[0][:4], mixture=Mixture("full", 5))


# ---- images ----


def test_crops_are_torchvisions_in_8_bits(images):
    crops = random_crops(images, generator(0, "crops"))
    assert (crops.dtype, crops.shape) == (torch.uint8, images.shape)
    assert torch.equal(crops, random_crops(images, generator(0, "crops")))
    boxes = draw_boxes(len(images), 32, 32, generator(0, "crops"))
    for image, box, crop in zip(images, boxes.tolist(), crops, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        cut = v2.functional.resized_crop(picture, *box, [32, 32], antialias=True)
        assert np.abs(np.asarray(cut).astype(int) - crop.permute(1, 2, 0).numpy()).max() <= 1


def test_svhns_splits_are_merged_and_drawn_again(data):
    """48 and 32 images: 64 to train on, 16 to test by, with the same images in all, and both kinds in either."""
    parts = [load_dataset("svhn", data, split)[0] for split in ("train", "test")]
    train, test = (load_dataset("svhn-merged", data, split) for split in ("train", "test"))
    assert (len(train[0]), len(train[1]), len(test[0]), len(test[1])) == (64, 64, 16, 16)

    def pictures(images):
        return [bytes(image.numpy()) for image in images]

    assert sorted(pictures(torch.cat(parts))) == sorted(pictures(torch.cat([train[0], test[0]])))
    assert set(pictures(parts[0])) & set(pictures(test[0]))
    assert set(pictures(parts[1])) & set(pictures(train[0]))
    labels = {image: label for part in ("train", "test") for image, label in labelled(data, part)}
    assert all(labels[image] == label for image, label in zip(pictures(test[0]), test[1].tolist(), strict=True))


def labelled(root, split):
    images, labels = load_dataset("svhn", root, split)
    return [(bytes(image.numpy()), label) for image, label in zip(images, labels.tolist(), strict=True)]


# ---- what it finds ----


def p_value(trained, unseen, seed, mixture=FOUR):
    first, second = halves(len(trained), seed=seed)
    return welch(*log_likelihoods(trained[first], trained[second], unseen, mixture=mixture, seed=seed))


def test_images_that_an_encoder_knows_are_told_from_others():
    """What it knows it holds nearer to what is common to its classes."""
    draws = generator(0, "test")
    classes = torch.randn(4, 16, generator=draws)
    trained = classes.repeat(50, 1) + 0.3 * torch.randn(200, 16, generator=draws)
    unseen = classes.repeat(50, 1) + 0.4 * torch.randn(200, 16, generator=draws)
    assert p_value(trained, unseen, seed=0) < 1e-6
    first, second = halves(200)
    assert cohens_d(*log_likelihoods(trained[first], trained[second], unseen, mixture=FOUR)) > 0.5


def test_full_covariances_see_what_diagonal_ones_do_not():
    """Two dimensions that go together in images that are known, and not in others, each spread alike."""
    draws = generator(0, "test")
    trained, unseen = torch.randn(2, 2_000, 6, generator=draws)
    trained[:, 1] = 0.8 * trained[:, 0] + 0.6 * trained[:, 1]
    p_full, p_diag = (p_value(trained, unseen, 0, Mixture(covariance, 1)) for covariance in ("full", "diag"))
    assert p_full < 1e-20 < 1e-4 < p_diag


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_images_that_an_encoder_does_not_know_are_not_told_from_others(covariance):
    """Over 40 draws from one distribution a test at the level 0.2 errs 8 times, give or take 2.5.

    Halves that overlapped would be found each time: the mixture is fitted to what it is tested on.
    """
    p_values = []
    for seed in range(40):
        draws = generator(seed, "test")
        centres = torch.randn(4, 16, generator=draws)
        rows = centres.repeat(100, 1) + 0.4 * torch.randn(400, 16, generator=draws)
        p_values.append(p_value(rows[:200], rows[200:], seed, Mixture(covariance, 4)))
    assert 1 <= sum(p < 0.2 for p in p_values) <= 17
    assert math.isfinite(sum(p_values))
