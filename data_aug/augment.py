"""Random SimCLR views of a batch of images: one independent draw per image, made on the device that holds them.

The pipeline is the one of SimCLR in torchvision (Chen et al. 2020, appendix A): random resized crop, horizontal flip,
colour jitter with probability 0.8, grey with probability 0.2, Gaussian blur. It differs from torchvision on PIL images
in one thing: values stay float32 between the steps, where PIL rounds to 8 bits.

All draws are made on the CPU (`draw_views`), so that a seed gives the same views on every device, and so that the host
knows without asking the device which images each operation is for. Applying them (`apply_views`) is free of host
synchronisation on CUDA.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CROP_AREA = (0.08, 1.0)  # of the area of the image
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
CROP_ATTEMPTS = 10
FLIP_RATE, JITTER_RATE, GREY_RATE = 0.5, 0.8, 0.2
# Factors of brightness, contrast, saturation and hue, in the order of the columns of ViewDraws.factors.
JITTER_LOW, JITTER_HIGH = (0.2, 0.2, 0.2, -0.2), (1.8, 1.8, 1.8, 0.2)
BLUR_SIGMA = (0.1, 2.0)  # pixels
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in PIL
CHUNK_FLOATS = 1 << 19  # of views that the CPU works on at a time; measured, see apply_views


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
        boxes=_draw_boxes(n, height, width, generator),
        flip=uniform(0.0, 1.0) < FLIP_RATE,
        jitter=uniform(0.0, 1.0) < JITTER_RATE,
        factors=uniform(JITTER_LOW, JITTER_HIGH, 4),
        order=uniform(0.0, 1.0, 4).argsort(1),
        grey=uniform(0.0, 1.0) < GREY_RATE,
        sigma=uniform(*BLUR_SIGMA),
        size=size,
    )


def apply_views(images: Tensor, draws: ViewDraws) -> Tensor:
    """Make the drawn views: uint8 (N, 3, H, W) on any device -> float32 (N, 3, size, size) in [0, 1] on that device.

    Raises ValueError if images have another type or shape, if their number is not that of the draws, or if a crop box
    reaches outside them. With torch.set_float32_matmul_precision below "highest", crop and blur follow it.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 of shape (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    if len(images) != len(draws):
        raise ValueError(f"{len(draws)} draws for {len(images)} images")
    if ((draws.boxes[:, :2] + draws.boxes[:, 2:]) > torch.tensor(images.shape[2:])).any():
        raise ValueError(f"a crop box reaches outside the images of {images.shape[2]} x {images.shape[3]} pixels")
    return _apply(images, draws)


def random_views(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw and make one view per image; shapes and errors as in `draw_views` and `apply_views`.

    For several views of an image, repeat it in the batch: every row has its own draws.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be of shape (N, 3, H, W), not {tuple(images.shape)}")
    return apply_views(images, draw_views(len(images), images.shape[2], images.shape[3], size, generator))


@torch.no_grad()
def _apply(images, draws):
    device = images.device
    # bfloat16 would leave 8 bits of each weight of a crop, hence no autocast.
    with torch.autocast(device.type, enabled=False):
        views = crop_resize(images, draws.boxes, draws.flip, draws.size)
        factors = _send(draws.factors, device)
        for step in draws.order.T:
            for column, operation in enumerate(_JITTER):
                rows = _send((draws.jitter & (step == column)).nonzero()[:, 0], device)
                if len(rows):
                    views.index_copy_(0, rows, operation(views[rows], factors[rows, column]))
        rows = _send(draws.grey.nonzero()[:, 0], device)
        views.index_copy_(0, rows, to_grey(views[rows]))
        return gaussian_blur(views, _send(draws.sigma, device), blur_radius(draws.size)).clamp_(0, 1)


def crop_resize(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cut a box out of each image, resize it to size x size, mirror it where flip says so.

    images uint8 (N, 3, H, W); boxes (N, 4) top, left, height, width; flip (N,) bool -> float32 (N, 3, size, size).
    """
    device = images.device
    boxes, flip = _send(boxes, device), _send(flip, device)
    rows = _resize_matrix(boxes[:, 0], boxes[:, 2], images.shape[2], size)
    columns = _resize_matrix(boxes[:, 1], boxes[:, 3], images.shape[3], size, flip)
    return _separable(images.float(), rows / 255, columns)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * _each(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    means = x.mean((2, 3))
    mean = GREY_WEIGHTS[0] * means[:, 0] + GREY_WEIGHTS[1] * means[:, 1] + GREY_WEIGHTS[2] * means[:, 2]
    return (x * _each(factor)).add_(_each((1 - factor) * mean)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    grey = _luma(x).mul_(_each(1 - factor))
    return (x * _each(factor)).add_(grey).clamp_(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    value, chroma = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    torch.sub(value, chroma, out=chroma)
    blue = (r - g).add_(chroma, alpha=4)
    green = (b - r).add_(chroma, alpha=2)
    hue = torch.where(r == value, g - b, torch.where(g == value, green, blue))
    hue.div_(chroma.clamp_min(1e-12)).add_(6 * factor[:, None, None]).remainder_(6)
    out = torch.empty_like(x)
    low = value - 2 * chroma
    torch.addcmul(low, chroma, (hue - 3).abs_().clamp_(1, 2), out=out[:, 0])
    high = value.add_(chroma)
    torch.addcmul(high, chroma, (hue - 2).abs_().clamp_(1, 2), value=-1, out=out[:, 1])
    torch.addcmul(high, chroma, (hue - 4).abs_().clamp_(1, 2), value=-1, out=out[:, 2])
    return out


_JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def to_grey(x: Tensor) -> Tensor:
    return _luma(x).expand_as(x)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    if radius == 0:
        return x.clone()
    size = x.shape[-1]
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights /= weights.sum(1, keepdim=True)
    place = torch.arange(size, device=x.device)[:, None] + offsets
    place = (size - 1) - ((size - 1) - place.abs()).abs()
    matrix = x.new_zeros(len(x), size, size)
    matrix.scatter_add_(2, place.expand(len(x), -1, -1), weights[:, None].expand(-1, size, -1))
    return _separable(x, matrix, matrix)


def blur_radius(size):
    return int(0.1 * size) // 2


def _luma(x):
    r, g, b = x.split(1, 1)
    return (r * GREY_WEIGHTS[0]).add_(g, alpha=GREY_WEIGHTS[1]).add_(b, alpha=GREY_WEIGHTS[2])


def _each(v):
    return v[:, None, None, None]


def _separable(x, rows, columns):
    n, channels, height, width = x.shape
    t = torch.bmm(x.reshape(n, channels * height, width), columns.transpose(1, 2)).view(n, channels, height, -1)
    return torch.matmul(rows[:, None], t)


def _resize_matrix(start, length, extent, size, flip=None):
    scale = (length / size)[:, None, None]
    steps = torch.arange(size, device=start.device)
    places = torch.arange(extent, device=start.device) - start[:, None]
    if flip is not None:
        steps = torch.where(flip[:, None], size - 1 - steps, steps)[:, :, None]
    else:
        steps = steps[:, None]
    centre = (steps + 0.5) * scale
    weights = (places[:, None] + 0.5 - centre).abs_().div_(scale.clamp_min(1)).neg_().add_(1).clamp_(min=0)
    weights *= ((places >= 0) & (places < length[:, None]))[:, None]
    return weights.div_(weights.sum(2, keepdim=True))


def _send(t, device):
    if device.type == "cuda" and t.device.type == "cpu":
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def _draw_boxes(n, height, width, generator):
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator, dtype=torch.float64)

    area = height * width * uniform(*CROP_AREA, CROP_ATTEMPTS)
    ratio = uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), CROP_ATTEMPTS).exp()
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 2).round().long()  # height, width
    limit = torch.tensor([height, width])
    fits = ((sides > 0) & (sides <= limit)).all(2)
    first = fits.int().argmax(1)
    chosen = sides[torch.arange(n), first]
    corner = (uniform(0.0, 1.0, 2) * (limit - chosen + 1)).long()
    w = width
    h = height
    if width / height < CROP_RATIO[0]:
        h = round(width / CROP_RATIO[0])
    elif width / height > CROP_RATIO[1]:
        w = round(height * CROP_RATIO[1])
    fallback = torch.tensor([(height - h) // 2, (width - w) // 2, h, w])
    return torch.where(fits.any(1)[:, None], torch.cat([corner, chosen], 1), fallback)
