"""The image operations of random views: each takes a batch of images and a value per image, on any device.

None of them reads a value back to the host, and no shape depends on the values. `augment` draws the values and puts the
operations together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL


def crop_resize(images: Tensor, boxes: Tensor, flip: Tensor | None, size: int) -> Tensor:
    """Cut a box out of each image, resize it to size x size, mirror it where flip says so.

    images uint8 (N, 3, H, W); boxes (N, 4) top, left, height, width in pixels, inside the images; flip (N,) bool, None
    for no mirror -> float32 (N, 3, size, size) in [0, 1]. Bilinear with the antialiasing of PIL: where an axis shrinks,
    the triangle of the filter is as much wider.
    """
    top, left, height, width = boxes.unbind(1)
    rows = _resize_matrix(top, height, images.shape[2], size)
    columns = _resize_matrix(left, width, images.shape[3], size)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return _separable(images.float(), rows / 255, columns)


def shift_flip(images: Tensor, shift: Tensor | None, flip: Tensor | None, padding: int) -> Tensor:
    """Cut a part of the old size out of each image in a black border of `padding` pixels, mirror it where flip says so.

    images (N, 3, H, W) of any type; shift (N, 2) the part's corner in pixels from the top and from the left of the
    border, flip (N,) bool; None for neither -> of the same type and shape.
    """
    if shift is None:
        return images if flip is None else torch.where(per_image(flip), images.flip(3), images)
    count, _, height, width = images.shape
    across = torch.arange(width, device=images.device)
    columns = across if flip is None else torch.where(flip[:, None], across.flip(0), across)
    columns = shift[:, 1:] + columns
    rows = shift[:, :1] + torch.arange(height, device=images.device)
    padded = F.pad(images, (padding,) * 4)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def turned(degrees: Tensor) -> Tensor:
    """The matrices (N, 2, 3) of `sample_affine` that turn images counter-clockwise by these angles (N,)."""
    radians = degrees.double().deg2rad()
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    return torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3).float()


def sample_affine(x: Tensor, source: Tensor) -> Tensor:
    """The nearest pixels at the places that a matrix says, black where nothing was.

    x float32 (N, C, S, S); source (N, 2, 3): a pixel of the result at (a, b), from -1 left to 1 right and from -1 at
    the top to 1, is what x has at source @ (a, b, 1) -> a new tensor.
    """
    grid = F.affine_grid(source, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", align_corners=False)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black: clamp(factor x, 0, 1). x (N, 3, H, W) in [0, 1], factor (N,) >= 0 -> a new tensor."""
    return (x * per_image(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey m of the image: clamp(factor x + (1 - factor) m, 0, 1). As `adjust_brightness`."""
    red, green, blue = x.mean((2, 3)).unbind(1)
    mean = GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue
    return (x * per_image(factor)).add_(per_image((1 - factor) * mean)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey g of the pixel: clamp(factor x + (1 - factor) g, 0, 1). As `adjust_brightness`."""
    return (x * per_image(factor)).add_(_luma(x).mul_(per_image(1 - factor))).clamp_(0, 1)


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
    h = turn.add_(per_image(2 + factor)[:, 0]).frac_().mul_(6)  # + 2: frac of a negative number is negative
    # For h in [0, 6), d is |h - 2| and |h - 4| or both it and d exceed 2; for red it is 3 - |h - 3|.
    out = torch.empty_like(x)
    torch.addcmul(value.sub(chroma, alpha=2), chroma, (h - 3).abs_().clamp_(1, 2), out=out[:, 0])
    top = value.add_(chroma)
    torch.addcmul(top, chroma, (h - 2).abs_().clamp_(1, 2), value=-1, out=out[:, 1])
    torch.addcmul(top, chroma, (h - 4).abs_().clamp_(1, 2), value=-1, out=out[:, 2])
    return out


# In the order of the columns of `augment.ViewDraws.factors`.
JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def to_grey(x: Tensor) -> Tensor:
    """Replace the colour by its luma, 0.299 r + 0.587 g + 0.114 b: (N, 3, H, W) -> the same shape, for reading only."""
    return _luma(x).expand_as(x)


def solarise(x: Tensor) -> Tensor:
    """Invert the values of at least 128 / 255, as PIL's solarize with its default: x in [0, 1] -> a new tensor."""
    return torch.where(x >= 128 / 255, 1 - x, x)


def blur_radius(size: int) -> int:
    """Radius in pixels of the blur that SimCLR gives to views of this size; the kernel has 2 radius + 1 taps."""
    return int(0.1 * size) // 2


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image by its sigma, borders reflected without their edge pixel.

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


def per_image(values: Tensor) -> Tensor:
    """Values (N,) as (N, 1, 1, 1), to combine with images."""
    return values[:, None, None, None]
