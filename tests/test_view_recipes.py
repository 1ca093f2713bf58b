"""Each recipe against torchvision's functions for one image, its draws, and what a recipe leaves out."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF

from data_aug import operations
from data_aug.augment import ViewDraws, apply_views, draw_views, random_views
from data_aug.randaugment import OPERATIONS
from data_aug.recipes import VIEW_RECIPES, ViewRecipe
from tests.test_augment import LEAST_P, MANY, assert_close, pil, rate_p, sample_images, seeded
from tests.test_randaugment import by_torchvision

JITTER = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
PLAIN = [name for name, recipe in VIEW_RECIPES.items() if not recipe.randaugment]
EVERYTHING = ViewRecipe(
    crop_area=(0.3, 0.6),
    padding=3,
    flip_rate=0.5,
    jitter=(0.3, 0.2, 0.4, 0.1),
    grey_rate=0.2,
    blur_rate=0.5,
    blur_radius=3,
    solarise_rate=0.3,
)


def one_view(image: Tensor, draws: ViewDraws, i: int) -> Tensor:
    """The view by torchvision, on a float image so that only rounding to float32 separates the two."""
    recipe, size = draws.recipe, [draws.size, draws.size]
    x = image.float() / 255
    if recipe.crop_area or image.shape[1:] != tuple(size):
        x = TF.resized_crop(x, *draws.boxes[i].tolist(), size, antialias=True)
    if recipe.randaugment:
        levels = (255 * x).round().to(torch.uint8)
        for which, value in zip(draws.operations[i].tolist(), draws.values[i].tolist(), strict=True):
            levels = by_torchvision(levels, list(OPERATIONS)[which], value)
        x = levels / 255
    if recipe.padding:
        x = TF.crop(TF.pad(x, recipe.padding), *draws.shift[i].tolist(), *size)
    if recipe.flip_rate and draws.flip[i]:
        x = TF.hflip(x)
    if recipe.jitter and draws.jitter[i]:
        for k in draws.order[i].tolist():
            x = JITTER[k](x, draws.factors[i, k].item())
    if recipe.grey_rate and draws.grey[i]:
        x = TF.rgb_to_grayscale(x, 3)
    if recipe.blur_rate and (recipe.blur_rate == 1 or draws.blur[i]):
        radius = int(0.1 * draws.size) // 2 if recipe.blur_radius is None else recipe.blur_radius
        x = TF.gaussian_blur(x, [2 * radius + 1] * 2, [draws.sigma[i].item()] * 2)
    return TF.solarize(x, 128 / 255) if recipe.solarise_rate and draws.solarise[i] else x


@pytest.mark.parametrize(("height", "width", "size", "n"), [(32, 32, 32, 120), (48, 40, 32, 60)])
@pytest.mark.parametrize("recipe", [*VIEW_RECIPES.values(), EVERYTHING], ids=[*VIEW_RECIPES, "everything"])
def test_whole_recipes(recipe, height, width, size, n):
    images = sample_images(height, width)[torch.arange(n) % len(sample_images())]
    draws = draw_views(n, height, width, size, seeded(5), recipe)
    found = apply_views(images, draws)
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 1
    expected = torch.stack([one_view(image, draws, i) for i, image in enumerate(images)])
    off = (found - expected).abs() > 2e-3
    # Pixels near the threshold of solarisation; and those halfway between two levels when RandAugment gets them.
    halfway = recipe.randaugment and height != size
    assert off.float().mean() <= (5e-3 if halfway else 5e-4 if recipe.solarise_rate else 0)
    assert torch.equal(found, random_views(images, size, seeded(5), recipe))
    assert not torch.equal(found, random_views(images, size, seeded(6), recipe)) or recipe == ViewRecipe()


def test_none_is_the_image_itself():
    images = sample_images()
    assert torch.equal(random_views(images, 32, seeded(), VIEW_RECIPES["none"]), images.float() / 255)
    larger = sample_images(48, 40)
    found = random_views(larger, 32, seeded(), VIEW_RECIPES["none"])
    assert_close(found, [TF.resize(image.float() / 255, [32, 32], antialias=True) for image in larger], 1e-4)
    generator = seeded()
    draw_views(20, 32, 32, 32, generator, VIEW_RECIPES["none"])
    assert torch.equal(generator.get_state(), seeded().get_state())


@pytest.mark.parametrize("name", ["crop-flip", "contsteal"])
def test_padded_crops_are_torchvisions(name):
    """Every view is what torchvision makes from one of the 2 x 81 possible draws, and all draws are as frequent."""
    images = sample_images()[:1].expand(MANY // 4, -1, -1, -1)
    recipe = dataclasses.replace(VIEW_RECIPES[name], randaugment=None)
    assert recipe == ViewRecipe(padding=4, flip_rate=0.5)
    framed = TF.pad(pil(images[0]), 4)
    possible = {}
    for top in range(9):
        for left in range(9):
            for mirrored in (False, True):
                view = TF.crop(framed, top, left, 32, 32)
                view = TF.to_tensor(TF.hflip(view) if mirrored else view)
                possible[view.numpy().tobytes()] = (top, left, mirrored)
    drawn = [possible[view.numpy().tobytes()] for view in random_views(images, 32, seeded(), recipe)]
    for values, number in zip(zip(*drawn, strict=True), (9, 9, 2), strict=True):
        counts = [values.count(value) for value in sorted(set(values))]
        assert len(counts) == number
        assert stats.chisquare(counts).pvalue > LEAST_P


@pytest.mark.parametrize("name", VIEW_RECIPES)
def test_rates_and_ranges_of_the_draws(name):
    recipe, draws = VIEW_RECIPES[name], draw_views(MANY, 32, 32, 32, seeded(3), VIEW_RECIPES[name])
    rates = {"flip": recipe.flip_rate, "grey": recipe.grey_rate, "solarise": recipe.solarise_rate}
    rates["jitter"] = recipe.jitter_rate if recipe.jitter else 0
    rates["blur"] = recipe.blur_rate % 1
    for column, rate in rates.items():
        switches = getattr(draws, column)
        assert switches is None if rate == 0 else rate_p(switches, rate) > LEAST_P
    for column, strength in enumerate(recipe.jitter or ()):
        low = -strength if column == 3 else 1 - strength
        found = draws.factors[:, column].double()
        assert stats.kstest(found, stats.uniform(low, 2 * strength).cdf).pvalue > LEAST_P
    assert (draws.sigma is None) == (recipe.blur_rate == 0)


def test_the_recipes_as_published():
    """By hand, from the authors' code."""
    rda = {"flip_rate": 0.5, "jitter": (0.4, 0.4, 0.4, 0.2), "jitter_rate": 0.8, "grey_rate": 0.2, "blur_rate": 0.1}
    for name, area, side in (("rda-query", 0.9, 30), ("rda-copy", 0.75, 28)):
        recipe = VIEW_RECIPES[name]
        assert dataclasses.asdict(recipe).items() >= {**rda, "crop_area": (area, area), "solarise_rate": 0.1}.items()
        boxes = draw_views(MANY, 32, 32, 32, seeded(), recipe).boxes
        assert (boxes[:, 2:] == side).all()
        for corner in boxes[:, :2].T:
            counts = corner.unique(return_counts=True)[1]
            assert len(counts) == 33 - side
            assert stats.chisquare(counts.numpy()).pvalue > LEAST_P
        expected = transforms.RandomResizedCrop.get_params(torch.empty(3, 32, 32), [area, area], [1.0, 1.0])
        assert expected[2:] == (side, side)
    stolenencoder = ViewRecipe(flip_rate=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_rate=0.8, grey_rate=0.2)
    assert VIEW_RECIPES["stolenencoder"] == stolenencoder
    assert VIEW_RECIPES["contsteal"] == ViewRecipe(randaugment=(2, 14), padding=4, flip_rate=0.5)
    assert VIEW_RECIPES["none"] == ViewRecipe()
    half = tuple(0.5 * strength for strength in (0.8, 0.8, 0.8, 0.2))  # --color_jitter_strength=0.5 --use_blur=False
    views = ViewRecipe(crop_area=(0.08, 1.0), flip_rate=0.5, jitter=half, jitter_rate=0.8, grey_rate=0.2)
    assert VIEW_RECIPES["simclr-cifar"] == views
    mild = VIEW_RECIPES["mild"]
    assert (mild.grey_rate, mild.blur_rate, mild.solarise_rate, mild.randaugment) == (0, 0, 0, None)


def test_a_recipe_draws_what_another_with_more_at_its_end_draws():
    """So that leaving out an operation does not change those before it."""
    whole, shorter = (
        draw_views(50, 32, 32, 32, seeded(), recipe)
        for recipe in (VIEW_RECIPES["rda-copy"], dataclasses.replace(VIEW_RECIPES["rda-copy"], solarise_rate=0))
    )
    assert shorter.solarise is None
    assert torch.equal(shorter.factors, whole.factors)
    assert torch.equal(shorter.blur, whole.blur)


def test_solarise():
    images = sample_images()
    expected = [TF.to_tensor(ImageOps.solarize(pil(image))) for image in images]
    assert_close(operations.solarise(images.float() / 255), expected, 1e-6)


def test_the_blur_of_rda_is_about_that_of_pil():
    """PIL's is three boxes instead of a Gaussian, on whole levels: both lie nearer to each other than to no blur."""
    images, radius = sample_images()[5:7], VIEW_RECIPES["rda-copy"].blur_radius  # smooth gradients and squares
    for sigma in (0.5, 1.0, 2.0):
        blurred = [TF.to_tensor(pil(image).filter(ImageFilter.GaussianBlur(sigma))) for image in images]
        found = operations.gaussian_blur(images.float() / 255, torch.full((2,), sigma), radius)
        moved = (torch.stack(blurred) - images.float() / 255).abs().mean()
        assert (found - torch.stack(blurred)).abs().mean() < 0.2 * moved


def test_pil_truncates_in_blends_and_rounds_elsewhere():
    """What docs/fidelity.md says of the levels of 8 bits."""
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    exact = array * np.float32(0.7)
    assert (np.asarray(ImageEnhance.Brightness(image).enhance(0.7)) == np.floor(exact)).all()
    grey = array @ np.array(operations.GREY_WEIGHTS)
    assert (np.asarray(image.convert("L")) == np.round(grey)).mean() > 0.99
    smooth = TF.resize(torch.tensor(array).permute(2, 0, 1).double(), [20, 20], antialias=True)
    shrunk = np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR)) - smooth.permute(1, 2, 0).numpy()
    assert abs(shrunk.mean()) < 0.05
