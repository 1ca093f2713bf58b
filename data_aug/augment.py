"""Random SimCLR views of batches of images, made on the device that holds the images.

    table = draw_views(2 * len(images), 32, 32, 32, generator).to(device)  # for an epoch: a row per image and view
    views = apply_views(batch.repeat(2, 1, 1, 1), table[rows_of(index, 2, len(images))])

The pipeline is SimCLR's in torchvision (Chen et al. 2020, appendix A): random resized crop, horizontal flip, colour
jitter with probability 0.8, grey with probability 0.2, Gaussian blur. It differs from torchvision on PIL images in one
thing: values stay float32 between the steps, where PIL rounds to 8 bits.

Draws are made on the CPU, so that a seed gives the same views on every device. Applying them on another device copies
nothing to it, reads nothing back from it, and has no shapes that depend on the draws: it can go into a CUDA graph.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from data_aug.operations import JITTER, blur_radius, crop_resize, gaussian_blur, per_image, to_grey

CROP_AREA = (0.08, 1.0)  # of the area of the image
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
CROP_ATTEMPTS = 10
FLIP_RATE, JITTER_RATE, GREY_RATE = 0.5, 0.8, 0.2
# Bounds for brightness, contrast, saturation and hue, as the columns of ViewDraws.factors.
JITTER_LOW, JITTER_HIGH = (0.2, 0.2, 0.2, -0.2), (1.8, 1.8, 1.8, 0.2)
BLUR_SIGMA = (0.1, 2.0)  # pixels of the view
# The CPU makes this many values at a time, so that they stay in its caches. Measured on one core in CPU time, 2^21
# took 114 ms for 2048 views of 32 x 32 and 255 ms for 48 views of 224 x 224; all at once took 159 ms and 302 ms.
CHUNK_VALUES = 1 << 21


# ---- draws -----------------------------------------------------------------------------------------------------------


class _Table:
    """Base of the tables of draws: dataclasses of tensors with one row per image and view."""

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The table of some rows: a slice, or an index tensor on the table's device."""
        return self._with_each(lambda column: column[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same table on a device."""
        return self._with_each(lambda column: column.to(device))

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: change(x) if isinstance(x, Tensor) else x for name, x in values.items()})


@dataclass(frozen=True)
class ViewDraws(_Table):
    """The random choices for N views.

    boxes   (N, 4) int64, top, left, height, width of the crop in pixels
    flip    (N,)   bool, mirror left and right
    jitter  (N,)   bool, change the colours
    factors (N, 4) float32, for brightness, contrast, saturation (1 = unchanged) and hue (turns, 0 = unchanged)
    order   (N, 4) int64, a permutation of the columns of factors: the operation to apply first, second, ...
    grey    (N,)   bool, remove the colours
    sigma   (N,)   float32, standard deviation of the blur in pixels of the view
    size    side of the square views in pixels
    """

    boxes: Tensor
    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grey: Tensor
    sigma: Tensor
    size: int


def draw_views(n: int, height: int, width: int, size: int, generator: torch.Generator) -> ViewDraws:
    """Draw the choices for n views of height x width images, on the CPU; every box lies inside the images.

    generator: a CPU generator, the only source of randomness. A row depends on n, so a table is drawn whole. ValueError
    for a size that is not positive.
    """
    if n < 0 or min(height, width, size) < 1:
        raise ValueError(f"cannot draw {n} views of size {size} from images of {height} x {width} pixels")

    def uniform(low, high, *shape: int) -> Tensor:
        low, high = torch.as_tensor(low), torch.as_tensor(high)
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    return ViewDraws(
        boxes=draw_boxes(n, height, width, generator),
        flip=uniform(0.0, 1.0) < FLIP_RATE,
        jitter=uniform(0.0, 1.0) < JITTER_RATE,
        factors=uniform(JITTER_LOW, JITTER_HIGH, 4),
        order=uniform(0.0, 1.0, 4).argsort(1),
        grey=uniform(0.0, 1.0) < GREY_RATE,
        sigma=uniform(*BLUR_SIGMA),
        size=size,
    )


def draw_boxes(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Crop boxes (n, 4), distributed as those of torchvision's RandomResizedCrop.get_params; see `ViewDraws`."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator, dtype=torch.float64)

    areas = height * width * uniform(*CROP_AREA, CROP_ATTEMPTS)
    ratios = uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), CROP_ATTEMPTS)
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
    sides = min(height, round(width / CROP_RATIO[0])), min(width, round(height * CROP_RATIO[1]))
    boxes[left] = torch.tensor([(height - sides[0]) // 2, (width - sides[1]) // 2, *sides])
    return boxes


@dataclass(frozen=True)
class CropDraws(_Table):
    """The random choices for N views of supervised training.

    top, left (N,) int64, corner of the crop in pixels of the padded image
    flip      (N,) bool, mirror left and right
    """

    top: Tensor
    left: Tensor
    flip: Tensor


def draw_crops(n: int, generator: torch.Generator, padding: int = 4) -> CropDraws:
    """Draw the choices for n crops out of images with a border of `padding` pixels, on the CPU; see `draw_views`."""
    top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    return CropDraws(top, left, torch.rand(n, generator=generator) < FLIP_RATE)


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


def random_views(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw and make one view per image; shapes and errors as in `draw_views` and `apply_views`.

    For several views of an image, repeat it in the batch: every row is drawn anew.
    """
    check_images(images)
    return apply_views(images, draw_views(len(images), *images.shape[-2:], size, generator).to(images.device))


def apply_crops(images: Tensor, draws: CropDraws, padding: int = 4) -> Tensor:
    """The views of supervised training: the image in a black border, cropped to its size, mirrored or not.

    uint8 (N, 3, H, W) -> float32 (N, 3, H, W) in [0, 1], on the device of both; `padding` is that of `draw_crops`.
    """
    check_images(images)
    count, _, height, width = images.shape
    if count != len(draws):
        raise ValueError(f"{len(draws)} draws for {count} images")
    across = torch.arange(width, device=images.device)
    rows = draws.top[:, None] + torch.arange(height, device=images.device)
    columns = draws.left[:, None] + torch.where(draws.flip[:, None], across.flip(0), across)
    padded = F.pad(images, (padding,) * 4)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).float() / 255


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images turned about their centres, the nearest pixel taken, black where nothing was.

    uint8 (N, 3, S, S), degrees (N,) counter-clockwise -> float32 (N, 3, S, S) in [0, 1], on the device of both; as
    torchvision's rotate of tensors with its defaults.
    """
    check_images(images)
    radians = degrees.double().deg2rad()
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    source = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3).float()
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(source, list(images.shape), align_corners=False)
        return F.grid_sample(images.float() / 255, grid, mode="nearest", align_corners=False)


def check_images(images: Tensor) -> None:
    """ValueError for anything but uint8 images (N, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 of shape (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")


# ---- the pipeline ----------------------------------------------------------------------------------------------------


def _make_views(images: Tensor, draws: ViewDraws) -> Tensor:
    views = crop_resize(images, draws.boxes, draws.flip, draws.size)
    change_colours = _by_groups if images.device.type == "cpu" else _by_masks
    return gaussian_blur(change_colours(views, draws), draws.sigma, blur_radius(draws.size))


def _by_groups(views: Tensor, draws: ViewDraws) -> Tensor:
    """Jitter and grey, in place: each operation on its rows only. The host has to know which rows these are."""
    for position in draws.order.T:
        for i, operation in enumerate(JITTER):
            rows = (draws.jitter & (position == i)).nonzero()[:, 0]
            if len(rows):
                views.index_copy_(0, rows, operation(views.index_select(0, rows), draws.factors[:, i][rows]))
    rows = draws.grey.nonzero()[:, 0]
    return views.index_copy_(0, rows, to_grey(views.index_select(0, rows)))


def _by_masks(views: Tensor, draws: ViewDraws) -> Tensor:
    """The same pixels as `_by_groups`: each operation on all rows, the result taken where it is wanted."""
    for position in draws.order.T:
        for i, operation in enumerate(JITTER):
            wanted = per_image(draws.jitter & (position == i))
            views = torch.where(wanted, operation(views, draws.factors[:, i]), views)
    return torch.where(per_image(draws.grey), to_grey(views), views)
