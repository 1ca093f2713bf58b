"""Random SimCLR views of a batch of images: one independent draw per image, made on the device that holds them.

The pipeline is the one of SimCLR in torchvision (Chen et al. 2020, appendix A): random resized crop, horizontal flip,
colour jitter with probability 0.8, grey with probability 0.2, Gaussian blur. It differs from torchvision on PIL images
in one thing: values stay float32 between the steps, where PIL rounds to 8 bits.

All draws are made on the CPU (`draw_views`), so that a seed gives the same views on every device, and so that the host
knows without asking the device which images each operation is for. Applying them (`apply_views`) is free of host
synchronisation on CUDA.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed import Part

CROP_AREA = (0.08, 1.0)  # of the area of the image
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
CROP_ATTEMPTS = 10
FLIP_RATE, JITTER_RATE, GREY_RATE = 0.5, 0.8, 0.2
# Bounds for brightness, contrast, saturation and hue, as the columns of ViewDraws.factors.
JITTER_LOW, JITTER_HIGH = (0.2, 0.2, 0.2, -0.2), (1.8, 1.8, 1.8, 0.2)
BLUR_SIGMA = (0.1, 2.0)  # pixels of the view
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL
# The CPU makes this many values at a time, so that the parts stay in its caches. Measured on one core in CPU time, 2^21
# took 114 ms for 2048 views of 32 x 32 and 255 ms for 48 views of 224 x 224; all at once took 159 ms and 302 ms.
CHUNK_VALUES = 1 << 21


@dataclass(frozen=True)
class ViewDraws:
    """The random choices for N views, as CPU tensors.

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

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: slice | Tensor) -> "ViewDraws":
        """The draws of some of the views."""
        tensors = {field.name: getattr(self, field.name)[rows] for field in fields(self) if field.name != "size"}
        return ViewDraws(**tensors, size=self.size)


def draw_views(n: int, height: int, width: int, size: int, generator: torch.Generator) -> ViewDraws:
    """Draw the choices for n views of height x width images.

    generator is a CPU generator, the only source of randomness. Raises ValueError if a size is not positive.
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


@torch.no_grad()
def apply_views(images: Tensor, draws: ViewDraws) -> Tensor:
    """Make the drawn views: uint8 (N, 3, H, W) on any device -> float32 (N, 3, size, size) in [0, 1] on that device.

    Raises ValueError if images have another type or shape, if their number is not that of the draws, or if a crop box
    is empty or reaches outside them. Crop and blur are matrix products, so they follow
    torch.set_float32_matmul_precision; they ignore autocast, as bfloat16 holds no more than 8 bits of a value.
    """
    _check_images(images)
    if len(images) != len(draws):
        raise ValueError(f"{len(draws)} draws for {len(images)} images")
    corners, sides, limits = draws.boxes[:, :2], draws.boxes[:, 2:], torch.tensor(images.shape[2:])
    if not ((corners >= 0) & (sides > 0) & (corners + sides <= limits)).all():
        raise ValueError(f"a crop box is empty or outside the images of {limits[0]} x {limits[1]} pixels")
    on_cpu = images.device.type == "cpu"
    step = max(1, CHUNK_VALUES // (3 * draws.size**2) if on_cpu else len(images))
    views = torch.empty(len(images), 3, draws.size, draws.size, device=images.device)
    with torch.autocast(images.device.type, enabled=False):
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            torch.clamp(_make_views(images[part], draws[part]), 0, 1, out=views[part])
    return views


def random_views(images: Tensor, size: int, generator: torch.Generator, part: Part | None = None) -> Tensor:
    """Draw and make one view per image; shapes and errors as in `draw_views` and `apply_views`.

    For several views of an image, repeat it in the batch: every row has its own draws. Where the images are a process's
    `part` of a batch, draws are made for all of it, so that they don't depend on the number of processes.
    """
    _check_images(images)
    draws = draw_views(part.total if part else len(images), *images.shape[-2:], size, generator)
    return apply_views(images, draws[part.rows] if part else draws)


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4, part: Part | None = None) -> Tensor:
    """The views of supervised training: a crop of the image's size out of it with a black border, mirrored or not.

    images uint8 (N, 3, H, W) -> float32 (N, 3, H, W) in [0, 1]; every image has its own draws, made on the CPU. For
    `part` see `random_views`.
    """
    _check_images(images)
    count, _, height, width = images.shape
    total, rows = (part.total, part.rows) if part else (count, slice(None))
    top, left = torch.randint(0, 2 * padding + 1, (2, total, 1), generator=generator)[:, rows]
    flip = (torch.rand(total, 1, generator=generator) < FLIP_RATE)[rows]
    columns = left + torch.where(flip, torch.arange(width).flip(0), torch.arange(width))
    rows, columns = (send(x, images.device) for x in (top + torch.arange(height), columns))
    padded = F.pad(images, (padding,) * 4)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).float() / 255


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images turned about their centres, the nearest pixel taken, black where nothing was.

    uint8 (N, 3, S, S), degrees (N,) counter-clockwise -> float32 (N, 3, S, S) in [0, 1] on the images' device; as
    torchvision's rotate of tensors with its defaults.
    """
    _check_images(images)
    radians = send(degrees.double().deg2rad(), images.device)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    source = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3).float()
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(source, list(images.shape), align_corners=False)
        return F.grid_sample(images.float() / 255, grid, mode="nearest", align_corners=False)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 of shape (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")


def _make_views(images: Tensor, draws: ViewDraws) -> Tensor:
    device = images.device
    views = crop_resize(images, draws.boxes, draws.flip, draws.size)
    groups = [draws.jitter & (column == i) for column in draws.order.T for i in range(len(_JITTER))]
    groups = [group.nonzero()[:, 0] for group in [*groups, draws.grey]]
    *jitter_rows, grey_rows = send(torch.cat(groups), device).split([len(group) for group in groups])
    factors = send(draws.factors, device)
    for i, rows in enumerate(jitter_rows):
        if len(rows):
            i %= len(_JITTER)
            changed = _JITTER[i](views.index_select(0, rows), factors[:, i].index_select(0, rows))
            views.index_copy_(0, rows, changed)
    views.index_copy_(0, grey_rows, to_grey(views.index_select(0, grey_rows)))
    return gaussian_blur(views, send(draws.sigma, device), blur_radius(draws.size))


def crop_resize(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cut a box out of each image, resize it to size x size, mirror it where flip says so.

    images uint8 (N, 3, H, W); boxes (N, 4) top, left, height, width in pixels, inside the images; flip (N,) bool
    -> float32 (N, 3, size, size) in [0, 1]. Bilinear with the antialiasing of PIL: where an axis shrinks, the triangle
    of the filter is as much wider.
    """
    (top, left, height, width), flip = send(boxes, images.device).unbind(1), send(flip, images.device)
    rows = _resize_matrix(top, height, images.shape[2], size)
    columns = _resize_matrix(left, width, images.shape[3], size)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return _separable(images.float(), rows / 255, columns)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black: clamp(factor x, 0, 1). x (N, 3, H, W) in [0, 1], factor (N,) >= 0 -> a new tensor."""
    return (x * _per_image(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey m of the image: clamp(factor x + (1 - factor) m, 0, 1). As `adjust_brightness`."""
    red, green, blue = x.mean((2, 3)).unbind(1)
    mean = GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue
    return (x * _per_image(factor)).add_(_per_image((1 - factor) * mean)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey g of the pixel: clamp(factor x + (1 - factor) g, 0, 1). As `adjust_brightness`."""
    return (x * _per_image(factor)).add_(_luma(x).mul_(_per_image(1 - factor))).clamp_(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue at fixed HSV value and saturation. x (N, 3, H, W) in [0, 1], factor (N,) in turns, [-1, 1] -> new.

    With V = max, m = min, C = V - m, the hue in sixths of a turn is h = ±(1 + (g + b - r - m) / C), the sign that of
    g - b: in every sextant the same as the three cases of the HSV definition (Smith 1978), without their masks. Back,
    a channel whose hue lies d sixths away from h is V - C clamp(d - 1, 0, 1), with hues r 0, g 2, b 4.
    """
    r, g, b = x.unbind(1)
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    # Where C = 0 the hue is arbitrary but must be finite, for it is multiplied by C later.
    turn = (g + b).sub_(r).sub_(low).div_((6 * chroma).clamp_(min=1e-30)).add_(1 / 6).copysign_(g - b)
    h = turn.add_(_per_image(2 + factor)[:, 0]).frac_().mul_(6)  # + 2: frac of a negative number is negative
    # For h in [0, 6), d is |h - 2| and |h - 4| or both it and d exceed 2; for red it is 3 - |h - 3|.
    out = torch.empty_like(x)
    torch.addcmul(value.sub(chroma, alpha=2), chroma, (h - 3).abs_().clamp_(1, 2), out=out[:, 0])
    top = value.add_(chroma)
    torch.addcmul(top, chroma, (h - 2).abs_().clamp_(1, 2), value=-1, out=out[:, 1])
    torch.addcmul(top, chroma, (h - 4).abs_().clamp_(1, 2), value=-1, out=out[:, 2])
    return out


_JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def to_grey(x: Tensor) -> Tensor:
    """Replace the colour by its luma, 0.299 r + 0.587 g + 0.114 b: (N, 3, H, W) -> the same shape, for reading only."""
    return _luma(x).expand_as(x)


def blur_radius(size: int) -> int:
    """Radius in pixels of the blur that SimCLR gives to views of this size; the kernel has 2 radius + 1 taps."""
    return int(0.1 * size) // 2


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image with its own sigma, borders reflected without their edge pixel.

    x float32 (N, C, S, S); sigma (N,) in pixels, > 0; radius in pixels, < S -> a new tensor. Weights as in
    torchvision: exp(-offset² / (2 sigma²)) at whole pixels up to the radius, normalised to sum 1.
    """
    size = x.shape[-1]
    offset = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    weights /= weights.sum(1, keepdim=True)
    pixel = torch.arange(size, device=x.device)
    source = (size - 1 - (size - 1 - (pixel + offset[:, None]).abs()).abs()).abs()
    # (taps, S, S): 1 where a tap of an output pixel reads an input pixel. One product with it makes all matrices.
    reads = (source[:, :, None] == pixel).to(x.dtype)
    matrix = (weights @ reads.flatten(1)).view(len(x), size, size)
    return _separable(x, matrix, matrix)


def _separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ x @ columns^T in each channel: (N, C, H, W), (N, S, H), (N, T, W) -> (N, C, S, T)."""
    n, channels, height, width = x.shape
    across = torch.bmm(x.reshape(n, channels * height, width), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], across.view(n, channels, height, columns.shape[1]))


def _resize_matrix(start: Tensor, length: Tensor, extent: int, size: int) -> Tensor:
    """Weights (N, size, extent) that resize `length` pixels from `start` of an axis of `extent` to `size` pixels."""
    scale = (length / size)[:, None, None]
    place = torch.arange(extent, device=start.device) - start[:, None]  # in the crop
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    weights = (place[:, None] + 0.5 - centre).abs_().div_(scale.clamp(min=1)).neg_().add_(1).clamp_(min=0)
    weights *= ((place >= 0) & (place < length[:, None]))[:, None]
    return weights.div_(weights.sum(2, keepdim=True))


def _luma(x: Tensor) -> Tensor:
    r, g, b = x.split(1, 1)
    return (r * GREY_WEIGHTS[0]).add_(g, alpha=GREY_WEIGHTS[1]).add_(b, alpha=GREY_WEIGHTS[2])


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for it to arrive."""
    # Only from pinned memory does a copy to CUDA return before it is done.
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def draw_boxes(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Boxes (n, 4) as RandomResizedCrop.get_params of torchvision draws them, all attempts at once."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator, dtype=torch.float64)

    area = height * width * uniform(*CROP_AREA, CROP_ATTEMPTS)
    ratio = uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), CROP_ATTEMPTS).exp()
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 2).round().long()
    limits = torch.tensor([height, width])
    fits = ((sides > 0) & (sides <= limits)).all(2)
    chosen = sides[torch.arange(n), fits.int().argmax(1)]  # the first that fits, as argmax takes the first of equals
    corner = (uniform(0.0, 1.0, 2) * (limits - chosen + 1)).long()
    whole_height, whole_width = height, width
    if width / height < CROP_RATIO[0]:
        whole_height = round(width / CROP_RATIO[0])
    elif width / height > CROP_RATIO[1]:
        whole_width = round(height * CROP_RATIO[1])
    centred = [(height - whole_height) // 2, (width - whole_width) // 2, whole_height, whole_width]
    return torch.where(fits.any(1)[:, None], torch.cat([corner, chosen], 1), torch.tensor(centred))
