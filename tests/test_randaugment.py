"""RandAugment: each operation against torchvision's function for one image, then draws and the whole."""

import math
from collections import Counter

import pytest
import torch
from scipy import stats
from torchvision.transforms import RandAugment
from torchvision.transforms import functional as TF
from torchvision.transforms.autoaugment import _apply_op

from data_aug import augment, randaugment
from data_aug.randaugment import OPERATIONS, draw_operations, rand_augment
from tests.test_augment import LEAST_P, MANY, pil, rate_p, sample_images, seeded

# Ours and torchvision's, in the order of both.
NAMES = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "colour": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterise": "Posterize",
    "solarise": "Solarize",
    "auto_contrast": "AutoContrast",
    "equalise": "Equalize",
}


BLENDS = ("brightness", "colour", "contrast", "sharpness")


def by_tensor(image, name, value):
    """The operation on a uint8 tensor, with the value that `draw_operations` gives."""
    value = 8 - math.log2(value) if name == "posterise" else value
    return _apply_op(image, NAMES[name], value, TF.InterpolationMode.NEAREST, None)


def by_torchvision(image, name, value):
    """The same, but blends on a PIL image: torchvision's tensors have greys of other weights and roundings."""
    return TF.pil_to_tensor(by_tensor(pil(image), name, value)) if name in BLENDS else by_tensor(image, name, value)


def values_of(name, size=32):
    """Every value at four magnitudes."""
    drawn = [draw_operations(300, 2, magnitude, size, seeded(magnitude)) for magnitude in (3, 9, 14, 30)]
    which = list(OPERATIONS).index(name)
    return sorted({value for chosen, values in drawn for value in values[chosen == which].tolist()})


@pytest.mark.parametrize("size", [32, 37])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "identity"])
def test_operations(name, size):
    images, values = sample_images(size, size), values_of(name, size)
    images = torch.cat([images, images[:1] % 2 + 4, images[:1] % 40 + 100])  # of few levels
    assert len(values) == (1 if name in ("auto_contrast", "equalise") else 8 - 4 * (name in ("posterise", "solarise")))
    for value in values:
        before = images.float()
        found = OPERATIONS[name](before, torch.full((len(images),), value))
        assert torch.equal(before, images.float())
        expected = torch.stack([by_torchvision(image, name, value) for image in images])
        if name == "rotate" and abs(value) == 30:  # sin = 1/2: some places lie between two pixels
            assert (found != expected).float().mean() < 2e-3
        else:
            assert torch.equal(found, expected.float())
        if name in BLENDS:
            expected = torch.stack([by_tensor(image, name, value) for image in images])
            assert (found - expected).abs().max() <= 2


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "identity"])
def test_every_image_has_its_own_value(name):
    images, values = sample_images().float(), torch.tensor(values_of(name))
    values = values[torch.arange(len(images)) % len(values)]
    found = OPERATIONS[name](images, values)
    for i in range(len(images)):
        assert torch.equal(found[i], OPERATIONS[name](images[i : i + 1], values[i : i + 1])[0])


def test_draws():
    """Each operation equally often, in each of the two places, with half of the signs."""
    chosen, values = draw_operations(MANY, 2, 14, 32, seeded())
    assert chosen.shape == values.shape == (MANY, 2)
    pairs = Counter(map(tuple, chosen.tolist()))
    assert len(pairs) == 14**2
    assert stats.chisquare(list(pairs.values())).pvalue > LEAST_P
    space = RandAugment(2, 14)._augmentation_space(31, (32, 32))
    assert list(space) == [NAMES[name] for name in OPERATIONS]
    for which, (name, (magnitudes, signed)) in enumerate(zip(OPERATIONS, space.values(), strict=True)):
        magnitude = magnitudes[14].item() if magnitudes.ndim else 0.0
        if name.startswith("translate"):
            magnitude = int(magnitude)
        if name == "posterise":
            magnitude = 2.0 ** (8 - magnitude)
        drawn = values[chosen == which]
        assert (drawn.abs() - magnitude).abs().max() < 1e-5
        assert rate_p(drawn > 0, 0.5) > LEAST_P if signed else (drawn >= 0).all()


@pytest.mark.parametrize("magnitude", range(31))
def test_magnitudes(magnitude):
    space = RandAugment(2, magnitude)._augmentation_space(31, (224, 224))
    chosen, values = draw_operations(300, 2, magnitude, 224, seeded())
    for which, (name, (magnitudes, _)) in enumerate(zip(OPERATIONS, space.values(), strict=True)):
        expected = magnitudes[magnitude].item() if magnitudes.ndim else 0.0
        if name.startswith("translate"):
            expected = int(expected)
        found = values[chosen == which].abs().max().item()
        assert (8 - math.log2(found) if name == "posterise" else found) == pytest.approx(expected, abs=1e-4)


def test_operations_follow_each_other():
    n = 14 * 14 * 2
    images = sample_images()[torch.arange(n) % len(sample_images())]
    chosen = torch.cartesian_prod(torch.arange(14), torch.arange(14)).repeat(2, 1)
    drawn, values = draw_operations(MANY, 1, 14, 32, seeded())
    signs = [values[drawn == which] for which in range(14)]
    value = torch.tensor([[signs[a].max(), signs[b].min()] for a, b in chosen.tolist()])
    value[n // 2 :] = torch.tensor([[signs[a].min(), signs[b].max()] for a, b in chosen[n // 2 :].tolist()])
    found = rand_augment(images, chosen, value, augment._by_groups)
    assert found.dtype == torch.uint8
    names = list(OPERATIONS)
    for i in range(n):
        expected = images[i]
        for which, of in zip(chosen[i].tolist(), value[i].tolist(), strict=True):
            expected = by_torchvision(expected, names[which], of)
        assert torch.equal(found[i], expected), [names[which] for which in chosen[i]]


def test_more_operations_and_none():
    images = sample_images()
    chosen, values = draw_operations(len(images), 4, 9, 32, seeded(1))
    step = images
    for k in range(4):
        step = rand_augment(step, chosen[:, k : k + 1], values[:, k : k + 1], augment._by_groups)
    assert torch.equal(rand_augment(images, chosen, values, augment._by_groups), step)
    assert torch.equal(rand_augment(images, chosen[:, :0], values[:, :0], augment._by_groups), images)
    assert not torch.equal(step, images)
    assert RandAugment().num_magnitude_bins - 1 == randaugment.HIGHEST
