"""RandAugment (Cubuk et al., 2020) on batches, as torchvision.transforms.RandAugment has it: an operation per image.

An image gets a few of fourteen operations, each drawn with equal probability and repetition, all of the same magnitude
on a scale of 0 to 30; where a sign makes sense, it is drawn too. Geometry takes the nearest pixel, black where nothing
was. Images hold whole levels of 0 to 255 after every operation, those that PIL gives them.

The magnitude 14 is read on torchvision's scale: shears of 0.14, moves by 21 % of the side, turns by 14 degrees, blends
with the factors 1 ± 0.42, 6 bits, a threshold of 136. Cont-Steal's released code takes another package's RandAugment(2,
14), on images of 224 x 224. Instead of the identity, that has inversion, adding to dark values and a grey square; it
posterises to 1 bit, and its blends have the factor 0.94 without a sign. Its other strengths are about the same.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data_aug.operations import per_image, sample_affine, turned

HIGHEST = 30  # magnitude


def draw_operations(
    n: int, number: int, magnitude: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """For n images of size x size: which `OPERATIONS` they get, int64 (n, number), and their values, float32."""
    share = magnitude / HIGHEST
    signed = {"shear_x": 0.3 * share, "shear_y": 0.3 * share, "rotate": 30 * share}
    signed |= dict.fromkeys(("translate_x", "translate_y"), int(150 / 331 * size * share))
    signed |= dict.fromkeys(("brightness", "colour", "contrast", "sharpness"), 0.9 * share)
    values = signed | {"posterise": 2 ** round(4 * share), "solarise": 255 - 255 * share}
    chosen = torch.randint(len(OPERATIONS), (n, number), generator=generator)
    minus = torch.randint(2, (n, number), generator=generator).bool()
    value = torch.tensor([float(values.get(name, 0)) for name in OPERATIONS])[chosen]
    has_sign = torch.tensor([name in signed for name in OPERATIONS])[chosen]
    return chosen, torch.where(has_sign & minus, -value, value)


def rand_augment(images: Tensor, chosen: Tensor, values: Tensor, change: Callable[..., Tensor]) -> Tensor:
    """Apply the drawn operations: uint8 (N, 3, S, S), draws (N, number) -> the same type and shape.

    change(x, wanted, operation, values) applies an operation to the wanted rows.
    """
    x = images.float()
    for which, value in zip(chosen.T, values.T, strict=True):
        for i, operation in enumerate(OPERATIONS.values()):
            if operation:
                x = change(x, which == i, operation, value)
    return x.to(torch.uint8)


# ---- operations: whole levels of 0 to 255, float32 (N, 3, S, S), and a value (N,) -> new levels ----------------------


def shear_x(x: Tensor, slope: Tensor) -> Tensor:
    """Move each row to the left, in proportion to its distance from the top edge."""
    source = _in_place(x)
    source[:, 0, 1:] = slope[:, None]
    return sample_affine(x, source)


def shear_y(x: Tensor, slope: Tensor) -> Tensor:
    """Move each column upwards, in proportion to its distance from the left edge."""
    source = _in_place(x)
    source[:, 1, ::2] = slope[:, None]
    return sample_affine(x, source)


def translate_x(x: Tensor, pixels: Tensor) -> Tensor:
    """Move to the right by whole pixels."""
    source = _in_place(x)
    source[:, 0, 2] = -2 * pixels / x.shape[3]
    return sample_affine(x, source)


def translate_y(x: Tensor, pixels: Tensor) -> Tensor:
    """Move downwards by whole pixels."""
    source = _in_place(x)
    source[:, 1, 2] = -2 * pixels / x.shape[2]
    return sample_affine(x, source)


def turn(x: Tensor, degrees: Tensor) -> Tensor:
    """Turn about the centre, counter-clockwise."""
    return sample_affine(x, turned(degrees))


def brightness(x: Tensor, change: Tensor) -> Tensor:
    """Blend with black."""
    return _blend(x, torch.zeros_like(x), change)


def colour(x: Tensor, change: Tensor) -> Tensor:
    """Blend with the grey of the pixel."""
    return _blend(x, _grey(x), change)


def contrast(x: Tensor, change: Tensor) -> Tensor:
    """Blend with the mean grey of the image."""
    return _blend(x, (_grey(x).mean((2, 3), keepdim=True) + 0.5).floor_(), change)


def sharpness(x: Tensor, change: Tensor) -> Tensor:
    """Blend with the mean of 3 x 3 pixels, the middle one five times; edge pixels stay."""
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = ((9 * F.avg_pool2d(x, 3, 1) + 4 * x[:, :, 1:-1, 1:-1]) / 13).round()
    return _blend(x, smooth, change)


def posterise(x: Tensor, step: Tensor) -> Tensor:
    """Round down to multiples of the step, a power of 2."""
    step = per_image(step)
    return (x / step).floor_() * step


def solarise_from(x: Tensor, threshold: Tensor) -> Tensor:
    """Invert levels from the threshold on."""
    return torch.where(x >= per_image(threshold), 255 - x, x)


def auto_contrast(x: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel linearly to 0 and 255; a channel of a single level stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = ((x - low) * (255 / (high - low).clamp(min=1))).clamp_(0, 255).floor_()
    return torch.where(high > low, stretched, x)


def equalise(x: Tensor, _: Tensor) -> Tensor:
    """Map the levels of each channel so that they become equally frequent.

    Level v becomes (pixels below v + step // 2) // step, at most 255, with step = (pixels below the highest level) //
    255; a channel where this step is 0 stays.
    """
    levels = x.long().flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    step = (levels.shape[2] - counts.gather(2, levels.amax(2, keepdim=True))) // 255
    known = step.clamp(min=1)
    table = ((counts.cumsum(2) - counts + known // 2) // known).clamp_(max=255)
    return torch.where(step[..., None] > 0, table.gather(2, levels).view(x.shape).to(x.dtype), x)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "identity": None,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": turn,
    "brightness": brightness,
    "colour": colour,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterise": posterise,
    "solarise": solarise_from,
    "auto_contrast": auto_contrast,
    "equalise": equalise,
}


def _in_place(x: Tensor) -> Tensor:
    """The matrices (N, 2, 3) of `sample_affine` that leave every pixel where it is."""
    source = torch.zeros(len(x), 2, 3, device=x.device)
    source[:, 0, 0] = source[:, 1, 1] = 1
    return source


def _grey(x: Tensor) -> Tensor:
    """PIL's luma (N, 1, S, S) in whole levels; its weights, of 65536, keep every number here exact in float32."""
    r, g, b = x.split(1, 1)
    return ((19595 * r + 38470 * g + 7471 * b + 32768) / 65536).floor_()


def _blend(x: Tensor, other: Tensor, change: Tensor) -> Tensor:
    return (other + per_image(1 + change) * (x - other)).clamp_(0, 255).floor_()
