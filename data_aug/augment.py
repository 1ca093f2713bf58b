"""Random views of batches of images, made on the device that holds the images.

    table = draw_views(2 * len(images), 32, 32, 32, generator, VIEW_RECIPES["mild"]).to(device)  # a row per image, view
    views = apply_views(batch.repeat(2, 1, 1, 1), table[rows_of(index, 2, len(images))])

The operations are torchvision's. Which of them a view gets is said by a recipe of `recipes`, by default SimCLR's.
Values stay float32 between the steps, where PIL reduces them to 8 bits.

Draws are made on the CPU, so that a seed gives the same views on every device. Applying them on another device copies
nothing to it, reads nothing back from it, and has no shapes that depend on the draws: it can go into a CUDA graph.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from data_aug.operations import (
    JITTER,
    blur_radius,
    crop_resize,
    gaussian_blur,
    per_image,
    sample_affine,
    shift_flip,
    solarise,
    to_grey,
    turned,
)
from data_aug.randaugment import draw_operations, rand_augment
from data_aug.recipes import VIEW_RECIPES, ViewRecipe

SIMCLR = VIEW_RECIPES["simclr"]
CROP_ATTEMPTS = 10
FLIP_RATE = 0.5
# The CPU makes this many values at a time, so that they stay in its caches. Measured on one core in CPU time, 2^21
# took 114 ms for 2048 views of 32 x 32 and 255 ms for 48 views of 224 x 224; all at once took 159 ms and 302 ms.
CHUNK_VALUES = 1 << 21


# ---- draws -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewDraws:
    """The random choices for N views of a recipe, a row for each image and view; None for what the recipe leaves out.

    boxes     (N, 4) int64, top, left, height, width in pixels of what becomes the view: a crop, or the whole image
    flip      (N,)   bool, mirror left and right
    jitter    (N,)   bool, change the colours
    factors   (N, 4) float32, for brightness, contrast, saturation (1 = unchanged) and hue (turns, 0 = unchanged)
    order     (N, 4) int64, a permutation of the columns of factors: the operation to apply first, second, ...
    grey      (N,)   bool, remove the colours
    sigma     (N,)   float32, standard deviation of the blur in pixels of the view
    blur      (N,)   bool, blur; None for all views, if there is a sigma
    solarise  (N,)   bool, invert the bright values
    shift     (N, 2) int64, downwards and to the right: corner of the part that is kept, in pixels of the padded view
    operations  (N, K) int64, the first to the K-th operation of RandAugment, in `randaugment.OPERATIONS`
    values    (N, K) float32, what these are given
    size      side of the square views in pixels
    recipe    where the choices are from
    """

    boxes: Tensor
    flip: Tensor | None
    jitter: Tensor | None
    factors: Tensor | None
    order: Tensor | None
    grey: Tensor | None
    sigma: Tensor | None
    blur: Tensor | None
    solarise: Tensor | None
    shift: Tensor | None
    operations: Tensor | None
    values: Tensor | None
    size: int
    recipe: ViewRecipe

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The table of some rows: a slice, or an index tensor on the table's device."""
        return self._with_each(lambda column: column[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same table on a device."""
        return self._with_each(lambda column: column.to(device))

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: change(x) if isinstance(x, Tensor) else x for name, x in values.items()})


def draw_views(
    n: int, height: int, width: int, size: int, generator: torch.Generator, recipe: ViewRecipe = SIMCLR
) -> ViewDraws:
    """Draw the choices for n views of height x width images, on the CPU; every box lies inside the images.

    generator: a CPU generator, the only source of randomness. A row depends on n, so a table is drawn whole. ValueError
    for a size that is not positive.
    """
    if n < 0 or min(height, width, size) < 1:
        raise ValueError(f"cannot draw {n} views of size {size} from images of {height} x {width} pixels")

    def uniform(low, high, *shape: int) -> Tensor:
        low, high = torch.as_tensor(low), torch.as_tensor(high)
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def switch(rate: float) -> Tensor | None:
        return uniform(0.0, 1.0) < rate if rate else None

    # The order of the draws is fixed: a seed's views depend on it.
    jitter = recipe.jitter
    low, high = _bounds(jitter) if jitter else (None, None)
    draws = ViewDraws(
        boxes=draw_boxes(n, height, width, generator, recipe),
        shift=torch.randint(0, 2 * recipe.padding + 1, (2, n), generator=generator).T if recipe.padding else None,
        flip=switch(recipe.flip_rate),
        jitter=switch(recipe.jitter_rate) if jitter else None,
        factors=uniform(low, high, 4) if jitter else None,
        order=uniform(0.0, 1.0, 4).argsort(1) if jitter else None,
        grey=switch(recipe.grey_rate),
        sigma=uniform(*recipe.blur_sigma) if recipe.blur_rate else None,
        blur=switch(recipe.blur_rate) if recipe.blur_rate < 1 else None,
        solarise=switch(recipe.solarise_rate),
        operations=None,
        values=None,
        size=size,
        recipe=recipe,
    )
    if recipe.randaugment is None:
        return draws
    operations, values = draw_operations(n, *recipe.randaugment, size, generator)
    return replace(draws, operations=operations, values=values)


def _bounds(jitter: tuple[float, float, float, float]) -> tuple[list[float], list[float]]:
    """Bounds of the columns of `ViewDraws.factors`, as in torchvision's ColorJitter."""
    *strengths, hue = jitter
    return [max(0.0, 1 - x) for x in strengths] + [-hue], [1 + x for x in strengths] + [hue]


def draw_boxes(n: int, height: int, width: int, generator: torch.Generator, recipe: ViewRecipe = SIMCLR) -> Tensor:
    """Crop boxes (n, 4), distributed as those of torchvision's RandomResizedCrop.get_params; see `ViewDraws`."""
    if recipe.crop_area is None:
        return torch.tensor([0, 0, height, width]).repeat(n, 1)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator, dtype=torch.float64)

    narrow, wide = recipe.crop_ratio
    areas = height * width * uniform(*recipe.crop_area, CROP_ATTEMPTS)
    ratios = uniform(math.log(narrow), math.log(wide), CROP_ATTEMPTS)
    limits = torch.tensor([height, width])
    chosen = torch.ones(n, 2, dtype=torch.int64)
    left = torch.arange(n)  # rows without a box that fits, few after the first attempt
    for attempt in range(CROP_ATTEMPTS):
        area, ratio = areas[left, attempt], ratios[left, attempt].exp()
        sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 1).round().long()
        fits = ((sides > 0) & (sides <= limits)).all(1)
        chosen[left[fits]] = sides[fits]
        left = left[~fits]
    corner = (uniform(0.0, 1.0, 2) * (limits - chosen + 1)).long()
    boxes = torch.cat([corner, chosen], 1)
    # Where no attempt fits: the centre, as large as the aspect ratios allow.
    sides = min(height, round(width / narrow)), min(width, round(height * wide))
    boxes[left] = torch.tensor([(height - sides[0]) // 2, (width - sides[1]) // 2, *sides])
    return boxes


def rows_of(index: Tensor, views: int, count: int) -> Tensor:
    """The rows (views * B,) of the images at index (B,) in a view-major table of views * count rows; view-major too."""
    return torch.cat([index + view * count for view in range(views)])


# ---- views -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def apply_views(images: Tensor, draws: ViewDraws) -> Tensor:
    """Make the drawn views: uint8 (N, 3, H, W) -> float32 (N, 3, size, size) in [0, 1], on the device of both.

    ValueError for images of another type or shape, or draws for another number of images or on another device, and on
    the CPU for crop boxes that are empty or reach outside the images: elsewhere, looking at them would make the host
    wait. Crop and blur are matrix products, so they follow torch.set_float32_matmul_precision; they ignore autocast, as
    bfloat16 holds no more than 8 bits of a value.
    """
    check_images(images)
    if len(images) != len(draws):
        raise ValueError(f"{len(draws)} draws for {len(images)} images")
    if images.device != draws.boxes.device:
        raise ValueError(f"draws on {draws.boxes.device} for images on {images.device}")
    on_cpu = images.device.type == "cpu"
    if on_cpu:
        corners, sides, limits = draws.boxes[:, :2], draws.boxes[:, 2:], torch.tensor(images.shape[2:])
        if not ((corners >= 0) & (sides > 0) & (corners + sides <= limits)).all():
            raise ValueError(f"a crop box is empty or outside the images of {tuple(images.shape[2:])} pixels")
    step = max(1, CHUNK_VALUES // (3 * draws.size**2) if on_cpu else len(images))
    views = torch.empty(len(images), 3, draws.size, draws.size, device=images.device)
    with torch.autocast(images.device.type, enabled=False):
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            torch.clamp(_make_views(images[part], draws[part]), 0, 1, out=views[part])
    return views


def random_views(images: Tensor, size: int, generator: torch.Generator, recipe: ViewRecipe = SIMCLR) -> Tensor:
    """Draw and make one view per image; shapes and errors as in `draw_views` and `apply_views`.

    For several views of an image, repeat it in the batch: every row is drawn anew.
    """
    check_images(images)
    return apply_views(images, draw_views(len(images), *images.shape[-2:], size, generator, recipe).to(images.device))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images turned about their centres, the nearest pixel taken, black where nothing was.

    uint8 (N, 3, S, S), degrees (N,) counter-clockwise -> float32 (N, 3, S, S) in [0, 1], on the device of both; as
    torchvision's rotate of tensors with its defaults.
    """
    check_images(images)
    with torch.autocast(images.device.type, enabled=False):
        return sample_affine(images.float() / 255, turned(degrees))


def check_images(images: Tensor) -> None:
    """ValueError for anything but uint8 images (N, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 of shape (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")


# ---- the pipeline ----------------------------------------------------------------------------------------------------


def _make_views(images: Tensor, draws: ViewDraws) -> Tensor:
    change = _by_groups if images.device.type == "cpu" else _by_masks
    return _blur_solarise(_change_colours(_cut(images, draws, change), draws, change), draws, change)


def _cut(images: Tensor, draws: ViewDraws, change: Callable) -> Tensor:
    """The parts of the images (N, 3, H, W) that become the views, float32 (N, 3, size, size) in [0, 1]."""
    recipe, size = draws.recipe, draws.size
    if recipe.crop_area and not (recipe.randaugment or recipe.padding):
        return crop_resize(images, draws.boxes, draws.flip, size)
    if recipe.crop_area or images.shape[2:] != (size, size):
        images = crop_resize(images, draws.boxes, None, size)
    if recipe.randaugment:
        levels = images if images.dtype == torch.uint8 else (255 * images).round().to(torch.uint8)
        images = rand_augment(levels, draws.operations, draws.values, change)
    views = shift_flip(images, draws.shift, draws.flip, recipe.padding)
    return views.float().div_(255) if views.dtype == torch.uint8 else views


def _change_colours(views: Tensor, draws: ViewDraws, change: Callable) -> Tensor:
    if draws.jitter is not None:
        for position in draws.order.T:
            for i, operation in enumerate(JITTER):
                views = change(views, draws.jitter & (position == i), operation, draws.factors[:, i])
    return views if draws.grey is None else change(views, draws.grey, to_grey)


def _blur_solarise(views: Tensor, draws: ViewDraws, change: Callable) -> Tensor:
    if draws.sigma is not None:
        radius = blur_radius(draws.size) if draws.recipe.blur_radius is None else draws.recipe.blur_radius
        blur = functools.partial(gaussian_blur, radius=min(radius, draws.size - 1))
        views = blur(views, draws.sigma) if draws.blur is None else change(views, draws.blur, blur, draws.sigma)
    return views if draws.solarise is None else change(views, draws.solarise, solarise)


def _by_groups(views: Tensor, wanted: Tensor, operation: Callable, *values: Tensor) -> Tensor:
    """Apply an operation, in place, to the wanted rows (N,) only. The host has to know which rows these are."""
    rows = wanted.nonzero()[:, 0]
    if not len(rows):
        return views
    return views.index_copy_(0, rows, operation(views.index_select(0, rows), *(value[rows] for value in values)))


def _by_masks(views: Tensor, wanted: Tensor, operation: Callable, *values: Tensor) -> Tensor:
    """The same pixels as `_by_groups`: the operation on all rows, the result taken where it is wanted."""
    return torch.where(per_image(wanted), operation(views, *values), views)
