"""Each step of the views against the function of torchvision for one image, then the whole, then the draws."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from data_aug import augment, operations
from data_aug.augment import ViewDraws, apply_views, draw_boxes, draw_views, random_views, rotate, rows_of
from data_aug.recipes import VIEW_RECIPES, ViewRecipe

CLOSE = 2 / 255
FACTORS = (0.2, 0.5, 0.97, 1.0, 1.4, 1.8)
HUES = (-0.5, -0.2, -0.07, 0.0, 0.01, 0.2, 0.5)
MANY = 20_000
LEAST_P = 1e-4  # the seeds are fixed, so a test either always passes or always fails


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The operations are small: where cores are shared, threads would spend most of the time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample_images(height: int = 32, width: int = 32) -> Tensor:
    """uint8 images: noise, smooth gradients, the corners of the colour cube in squares and in lines, greys."""
    noise = torch.rand(3, 3, height, width, generator=seeded())
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    smooth = torch.stack([y.expand(height, width), x.expand(height, width), (1 - y) * x])
    corners = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 1, 1.0]])
    corner = (torch.arange(height)[:, None] // 5 + torch.arange(width) // 7) % 8
    greys = [smooth[:1].expand(3, -1, -1), noise[0, :1].expand(3, -1, -1), torch.full((3, height, width), 0.3)]
    dark = torch.stack([noise[0] * 0.02, 1 - noise[1] * 0.02])
    squares = corners[corner].permute(2, 0, 1)
    lines = corners[torch.arange(height) % 8].T[:, :, None].expand(3, height, width)
    images = torch.cat([noise, dark, torch.stack([smooth, squares, lines, *greys])])
    return (images * 255).round().to(torch.uint8)


def sample_floats() -> Tensor:
    return sample_images().float() / 255


def pil(image: Tensor):
    return TF.to_pil_image(image)


def assert_close(found: Tensor, expected: list[Tensor], tolerance: float = CLOSE) -> None:
    expected = torch.stack(list(expected))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def several_boxes(height: int, width: int, count: int) -> Tensor:
    """Drawn boxes, and by hand the whole image, one pixel, a row, a column and a square in the last corner."""
    by_hand = [
        [0, 0, height, width],
        [height - 1, 0, 1, 1],
        [height // 2, 0, 1, width],
        [0, width - 1, height, 1],
        [height - 9, width - 9, 9, 9],
    ]
    return torch.cat([torch.tensor(by_hand), draw_views(count, height, width, 8, seeded(1)).boxes])


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (96, 96, 32), (48, 40, 32), (40, 48, 7), (256, 240, 224)]
)
def test_crop_resize(height, width, size):
    boxes = several_boxes(height, width, 3 if size == 224 else 35)
    images = sample_images(height, width)
    images = images[torch.arange(len(boxes)) % len(images)]
    flip = torch.arange(len(boxes)) % 3 == 1
    found = operations.crop_resize(images, boxes, flip, size)
    on_pil, on_floats = [], []
    for image, box, mirror in zip(images, boxes.tolist(), flip, strict=True):
        cut = TF.resized_crop(pil(image), *box, [size, size], TF.InterpolationMode.BILINEAR, antialias=True)
        on_pil.append(TF.to_tensor(TF.hflip(cut) if mirror else cut))
        cut = TF.resized_crop(image.double() / 255, *box, [size, size], TF.InterpolationMode.BILINEAR, antialias=True)
        on_floats.append(TF.hflip(cut) if mirror else cut)
    assert_close(found, on_pil)
    assert_close(found, on_floats, 1e-4)  # coordinates are float32, to 1e-5 at pixel 200


def test_crop_shows_nothing_from_outside():
    boxes = several_boxes(48, 40, 100)
    images = torch.zeros(len(boxes), 3, 48, 40, dtype=torch.uint8)
    images[:, 0] = 255
    for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = torch.tensor([0, 100, 255])[:, None, None]
    for size in (8, 32):
        found = operations.crop_resize(images, boxes, torch.zeros(len(boxes), dtype=torch.bool), size)
        assert (found[:, 0] == 0).all()
        assert_close(
            found[:, 1:], torch.tensor([100, 255])[:, None, None].expand(len(boxes), 2, size, size) / 255, 1e-6
        )


@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation"])
def test_blends(name):
    images, x = sample_images(), sample_floats()
    ours, theirs = getattr(operations, name), getattr(TF, name)
    for factor in FACTORS:
        found = ours(x, torch.full((len(x),), factor))
        assert_close(found, [TF.to_tensor(theirs(pil(image), factor)) for image in images])
        # torchvision's luma weights for tensors are rounded to 0.2989, 0.587, 0.114, hence no less than 1e-4.
        assert_close(found, [theirs(image, factor) for image in x], 5e-4)


def test_hue():
    # Against tensors: on PIL, hue and saturation are quantised to 8 bits, which moves pixels by up to 1/10.
    x = sample_floats()
    for factor in HUES:
        found = operations.adjust_hue(x, torch.full((len(x),), factor))
        assert_close(found, [TF.adjust_hue(image, factor) for image in x], 1e-5)


def test_hue_of_every_colour_in_a_grid():
    steps = torch.linspace(0, 1, 18)
    x = torch.cartesian_prod(steps, steps, steps).T.reshape(1, 3, 18, 324).contiguous()
    for factor in HUES:
        assert_close(operations.adjust_hue(x, torch.tensor([factor])), [TF.adjust_hue(x[0], factor)], 1e-5)


def test_grey():
    images, x = sample_images(), sample_floats()
    found = operations.to_grey(x)
    assert_close(found, [TF.to_tensor(TF.rgb_to_grayscale(pil(image), 3)) for image in images])
    assert_close(found, [TF.rgb_to_grayscale(image, 3) for image in x], 5e-4)


@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"])
def test_every_image_has_its_own_factor_and_the_argument_stays(name):
    x = sample_floats()
    before = x.clone()
    factors = torch.linspace(-0.2, 0.2, len(x)) if name == "adjust_hue" else torch.linspace(0.2, 1.8, len(x))
    found = getattr(operations, name)(x, factors)
    expected = [getattr(TF, name)(image, factor) for image, factor in zip(x, factors.tolist(), strict=True)]
    assert_close(found, expected, 5e-4)
    assert torch.equal(x, before)


@pytest.mark.parametrize("radius", [0, 1, 4, 11, 31])
def test_gaussian_blur(radius):
    x = sample_floats()
    sigma = torch.linspace(0.1, 2.0, len(x))
    kernel = 2 * radius + 1
    expected = [TF.gaussian_blur(image, [kernel] * 2, [s] * 2) for image, s in zip(x, sigma.tolist(), strict=True)]
    assert_close(operations.gaussian_blur(x, sigma, radius), expected, 1e-5)


def test_blur_kernel_sizes():
    assert [2 * operations.blur_radius(size) + 1 for size in (8, 32, 96, 224)] == [1, 3, 9, 23]


def one_view(image: Tensor, draws: ViewDraws, i: int) -> Tensor:
    """The view by torchvision, on a float image so that only rounding to float32 separates the two."""
    size = [draws.size, draws.size]
    x = TF.resized_crop(image.float() / 255, *draws.boxes[i].tolist(), size, antialias=True)
    if draws.flip[i]:
        x = TF.hflip(x)
    if draws.jitter[i]:
        operations = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
        for k in draws.order[i].tolist():
            x = operations[k](x, draws.factors[i, k].item())
    if draws.grey[i]:
        x = TF.rgb_to_grayscale(x, 3)
    kernel = int(0.1 * draws.size) // 2 * 2 + 1
    return TF.gaussian_blur(x, [kernel, kernel], [draws.sigma[i].item()] * 2)


@pytest.mark.parametrize(
    ("height", "width", "size", "n"), [(32, 32, 32, 400), (96, 96, 32, 60), (48, 40, 32, 60), (256, 256, 224, 9)]
)
def test_whole_pipeline(height, width, size, n):
    """400 views hold every order of the colour operations."""
    images = sample_images(height, width)
    images = images[torch.arange(n) % len(images)]
    draws = draw_views(n, height, width, size, seeded(5))
    found = apply_views(images, draws)
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert_close(found, [one_view(image, draws, i) for i, image in enumerate(images)], 2e-3)


def test_chunks_change_nothing(monkeypatch):
    images = sample_images()
    draws = draw_views(len(images), 32, 32, 32, seeded(2))
    whole = apply_views(images, draws)
    for views in (1, 4):
        monkeypatch.setattr(augment, "CHUNK_VALUES", views * 3 * 32 * 32)
        assert (apply_views(images, draws) - whole).abs().max() < 1e-6


def rate_p(switches: Tensor, rate: float) -> float:
    return stats.binomtest(int(switches.sum()), len(switches), rate).pvalue


def test_rates_and_ranges_of_the_draws():
    draws = draw_views(MANY, 32, 32, 32, seeded(3))
    assert rate_p(draws.flip, 0.5) > LEAST_P
    assert rate_p(draws.jitter, 0.8) > LEAST_P
    assert rate_p(draws.grey, 0.2) > LEAST_P
    # Joint rates, as each switch has its own draw.
    assert rate_p(draws.flip & draws.jitter & draws.grey, 0.5 * 0.8 * 0.2) > LEAST_P
    for low, high, column in [(0.2, 1.8, 0), (0.2, 1.8, 1), (0.2, 1.8, 2), (-0.2, 0.2, 3)]:
        assert stats.kstest(draws.factors[:, column].double(), stats.uniform(low, high - low).cdf).pvalue > LEAST_P
    assert stats.kstest(draws.sigma.double(), stats.uniform(0.1, 1.9).cdf).pvalue > LEAST_P
    independent = torch.cat(
        [draws.factors.T, draws.sigma[None], draws.flip[None], draws.jitter[None], draws.grey[None]]
    )
    correlation = torch.corrcoef(independent) - torch.eye(len(independent))
    assert correlation.abs().max() < 4.5 / math.sqrt(MANY)


def test_orders_are_uniform():
    order = draw_views(MANY, 32, 32, 32, seeded(4)).order
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(MANY, 4))
    counts = (order @ torch.tensor([64, 16, 4, 1])).unique(return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > LEAST_P


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 40), (20, 64), (64, 20)])
def test_boxes_are_distributed_as_in_torchvision(height, width):
    """20 x 64 and 64 x 20 make several of the ten attempts fail."""
    boxes = draw_views(MANY, height, width, 32, seeded(6)).boxes
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(MANY // 4)]
    theirs = torch.tensor(theirs)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor([height, width])).all()
    measures = [
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2],
        lambda b: b[:, 1] + b[:, 3],
    ]
    for measure in measures:
        ours, expected = (np.asarray(measure(b).double()) for b in (boxes, theirs))
        assert stats.ks_2samp(ours, expected).pvalue > LEAST_P


@pytest.mark.parametrize(("height", "width"), [(4, 400), (400, 4), (1, 1), (7, 9)])
def test_box_when_no_attempt_fits(height, width):
    """With areas beyond the image no attempt ever fits, so that torchvision's box is the fallback, which is fixed."""
    boxes = draw_boxes(50, height, width, seeded(), ViewRecipe(crop_area=(3.0, 4.0)))
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [3.0, 4.0], [3 / 4, 4 / 3])
    assert torch.equal(boxes, torch.tensor(expected).expand(50, 4))


def test_images_of_a_batch_have_their_own_draws():
    views = random_views(sample_images()[:1].expand(20, -1, -1, -1), 32, seeded())
    difference = (views[:, None] - views).abs().amax((2, 3, 4))
    assert (difference[~torch.eye(20, dtype=torch.bool)] > 0.05).all()


def test_the_generator_is_the_only_randomness():
    images = sample_images()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    generator = seeded(8)
    first, second = (random_views(images, 32, generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(random_views(images, 32, seeded(8)), first)
    assert not torch.allclose(first, second, atol=0.05)
    assert torch.equal(apply_views(images, draw_views(len(images), 32, 32, 32, seeded(8))), first)


def test_views_are_made_in_float32_under_autocast_and_leave_the_images():
    images = sample_images()
    before = images.clone()
    expected = random_views(images, 32, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        found = random_views(images, 32, seeded())
    assert torch.equal(found, expected)
    assert torch.equal(images, before)


def test_batches_without_images_or_colour_changes():
    assert random_views(sample_images()[:0], 32, seeded()).shape == (0, 3, 32, 32)
    images = sample_images()
    draws = draw_views(len(images), 32, 32, 16, seeded())
    off = torch.zeros(len(images), dtype=torch.bool)
    draws = dataclasses.replace(draws, jitter=off, grey=off)
    found = apply_views(images, draws)
    assert_close(
        found, operations.crop_resize(images, draws.boxes, draws.flip, 16).clamp(0, 1), 1e-6
    )  # no blur below 20


def test_errors():
    images = sample_images()
    draws = draw_views(len(images), 32, 32, 32, seeded())
    for wrong in (images.float(), images[:, :1], images[0], images.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="uint8 of shape"):
            random_views(wrong, 32, seeded())
    with pytest.raises(ValueError, match="draws for"):
        apply_views(images[:3], draws)
    with pytest.raises(ValueError, match="crop box"):
        apply_views(images[:, :, :20], draws)
    with pytest.raises(ValueError, match="crop box"):
        apply_views(images, dataclasses.replace(draws, boxes=torch.zeros_like(draws.boxes)))
    with pytest.raises(ValueError, match="size 0"):
        random_views(images, 0, seeded())


@pytest.mark.parametrize("recipe", VIEW_RECIPES.values(), ids=VIEW_RECIPES)
def test_a_row_is_its_images_whatever_the_batch_and_the_order(recipe):
    """A table of two views of each image of an epoch: every image gets its own rows in any batches of any order."""
    images, views = sample_images(), 2
    count = len(images)
    table = draw_views(views * count, 32, 32, 32, seeded(9), recipe)
    whole = apply_views(images.repeat(views, 1, 1, 1), table).unflatten(0, (views, count))
    for seed, size in ((0, 1), (1, 4), (2, count)):
        seen = []
        for index in torch.randperm(count, generator=seeded(seed)).split(size):
            rows, batch = rows_of(index, views, count), images[index].repeat(views, 1, 1, 1)
            found = apply_views(batch, table[rows]).unflatten(0, (views, len(index)))
            assert (found - whole[:, index]).abs().max() < 1e-6
            seen.append(rows)
        assert torch.equal(torch.cat(seen).sort().values, torch.arange(views * count))


@pytest.mark.parametrize("recipe", VIEW_RECIPES.values(), ids=VIEW_RECIPES)
def test_rows_of_a_table(recipe):
    table = draw_views(20, 32, 32, 32, seeded(), recipe)
    tensors = [name for name, column in vars(table).items() if isinstance(column, Tensor)]
    for rows in (slice(3, 9), torch.tensor([7, 2, 2, 19]), slice(0, 0)):
        part = table[rows]
        assert len(part) == len(torch.arange(20)[rows])
        assert len(table) == 20
        for name in tensors:
            assert torch.equal(getattr(part, name), getattr(table, name)[rows])
    assert vars(table[:3]).keys() == vars(table).keys()
    assert (table[:3].size, table[:3].recipe) == (32, recipe)
    assert {getattr(table.to("meta"), name).device.type for name in tensors} == {"meta"}


def test_rows_of_images_are_view_major():
    assert rows_of(torch.tensor([3, 0]), 3, 10).tolist() == [3, 0, 13, 10, 23, 20]
    assert rows_of(torch.tensor([3, 0]), 1, 10).tolist() == [3, 0]


@pytest.mark.parametrize("recipe", VIEW_RECIPES.values(), ids=VIEW_RECIPES)
@pytest.mark.parametrize(("height", "width", "size", "n"), [(32, 32, 32, 200), (48, 40, 32, 40)])
def test_masks_make_the_same_pixels_as_groups(height, width, size, n, recipe, monkeypatch):
    images = sample_images(height, width)
    images = images[torch.arange(n) % len(images)]
    draws = draw_views(n, height, width, size, seeded(5), recipe)
    by_groups = augment._make_views(images, draws)
    monkeypatch.setattr(augment, "_by_groups", augment._by_masks)
    # Matrix products of other sizes add in another order.
    assert (augment._make_views(images, draws) - by_groups).abs().max() < 1e-6


@pytest.mark.parametrize("recipe", VIEW_RECIPES.values(), ids=VIEW_RECIPES)
@pytest.mark.parametrize("side", [32, 40])
def test_nothing_is_read_from_or_copied_to_a_device(side, recipe):
    """On the meta device there are no values to read, and other devices' tensors cannot take part."""
    images = sample_images(side, side)
    draws = draw_views(len(images), side, side, 32, seeded(), recipe).to("meta")
    assert augment._make_views(images.to("meta"), draws).device.type == "meta"


def test_groups_read_from_the_device():
    """So that the test above can fail."""
    x, wanted = torch.zeros(2, 3, 8, 8, device="meta"), torch.zeros(2, dtype=torch.bool, device="meta")
    with pytest.raises(NotImplementedError, match="nonzero"):
        augment._by_groups(x, wanted, operations.to_grey)


def test_errors_of_tables():
    images = sample_images()
    with pytest.raises(ValueError, match="draws on meta"):
        apply_views(images, draw_views(len(images), 32, 32, 32, seeded()).to("meta"))
    for wrong in (images.float(), images[:, :1]):
        with pytest.raises(ValueError, match="uint8 of shape"):
            rotate(wrong, torch.zeros(len(wrong)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recipe", VIEW_RECIPES.values(), ids=VIEW_RECIPES)
def test_cuda_makes_the_same_views_without_waiting(recipe):
    images = sample_images()
    draws = draw_views(len(images), 32, 32, 32, seeded(), recipe)
    expected = apply_views(images, draws)
    on_device, draws, rows = images.cuda(), draws.to("cuda"), torch.arange(len(images)).cuda()
    apply_views(on_device, draws[rows])  # loads the kernels, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = apply_views(on_device, draws[rows])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.device.type == "cuda"
    # A level more or less, where RandAugment truncates what differs in the last bit.
    tolerance = 1.01 / 255 if recipe.randaugment else 1e-4
    assert ((found.cpu() - expected).abs() > tolerance).float().mean() < (1e-3 if recipe.randaugment else 1e-9)
    assert ((random_views(on_device, 32, seeded(), recipe) - found).abs() > 1e-4).sum() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recipe", VIEW_RECIPES.values(), ids=VIEW_RECIPES)
def test_views_go_into_a_cuda_graph(recipe):
    images = sample_images().cuda()
    table = draw_views(2 * len(images), 32, 32, 32, seeded(), recipe).to("cuda")
    rows = torch.arange(len(images), device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        apply_views(images, table[rows])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = apply_views(images, table[rows])
    rows += len(images)  # the graph reads the rows that are there when it is replayed
    graph.replay()
    assert (found - apply_views(images, table[rows])).abs().max() < 1e-4
