"""Embedded data for demonstrations and tests: drawn shapes and, as a second domain, textures.

Nothing is downloaded or stored: every image follows from (data set, split, seed, position). All arithmetic is in
float64 with NumPy's PCG64 streams, so that the last-bit differences between processors vanish in the 8-bit rounding.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray

SIZE = 32  # pixels per side
SPLITS = {"train": 6_000, "test": 4_000}
_CLASSES = 10
_BLOCK = 250  # images per random stream: a multiple of the ten classes, small enough for the processor's cache
# How hard the shapes are. Properties that random features read easily, or that SimCLR's views discard (contrast,
# colour, size), vary much; properties that all crops of an image share, other than its class, vary little.
RADIUS = (4.0, 7.0)  # of a motif, pixels
SHAPE_CONTRAST = (0.2, 0.7)  # luminance between shape and background
SHAPE_CHROMA = 0.15
CLOUDS = 0.15  # amplitude of the coloured clouds, at most
_LUMINANCE = np.array([0.299, 0.587, 0.114])


# ---- signed distances of the shapes ---------------------------------------------------------------------------------
# x, y: coordinates in units of the motif's radius. Negative inside; the unit circle contains every shape.


def _star(x: Array, y: Array) -> Array:
    # Fold the plane into a tenth, where the outline is the line from a tip (radius 1) to a notch (radius 0.4).
    sector = np.pi / 5
    radius, angle = np.hypot(x, y), np.abs((np.arctan2(y, x) + sector) % (2 * sector) - sector)
    notch_x, notch_y = 0.4 * np.cos(sector), 0.4 * np.sin(sector)
    length = np.hypot(1 - notch_x, notch_y)
    along_x, along_y = radius * np.cos(angle), radius * np.sin(angle)
    return ((along_x - 1) * notch_y + along_y * (1 - notch_x)) / length


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.92, np.minimum(x, y) - 0.25)


def _dots(x: Array, y: Array) -> Array:
    # Three dots at the corners of a triangle.
    angles = np.pi * np.array([1, 5, 9]) / 6
    return np.minimum.reduce([np.hypot(x - 0.6 * np.cos(a), y - 0.6 * np.sin(a)) for a in angles]) - 0.33


_SHAPES = {
    "disc": lambda x, y: np.hypot(x, y) - 0.8,
    "triangle": lambda x, y: np.maximum(-y, np.abs(x) * 0.75**0.5 + y * 0.5) - 0.5,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.7,
    "star": _star,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.2,
    "cross": _cross,
    "half-disc": lambda x, y: np.maximum(np.hypot(x, y + 0.4) - 0.95, -0.4 - y),
    "arc": lambda x, y: np.maximum(np.abs(np.hypot(x, y + 0.35) - 0.8) - 0.2, -0.35 - y),
    "bars": lambda x, y: np.maximum(np.abs(np.abs(x) - 0.45) - 0.2, np.abs(y) - 0.8),
    "dots": _dots,
}
SHAPE_CLASSES = tuple(_SHAPES)


# ---- common parts: random numbers, coordinates, colours -------------------------------------------------------------


def _uniform(rng: np.random.Generator, n: int, low: float, high: float) -> Array:
    """n uniform numbers in [low, high), shaped (n, 1, 1) to broadcast over images."""
    return low + (high - low) * rng.random((n, 1, 1))


def _log_uniform(rng: np.random.Generator, n: int, low: float, high: float) -> Array:
    return np.exp(_uniform(rng, n, np.log(low), np.log(high)))


def _rotate(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _plane(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Coordinates (n, SIZE, SIZE) in pixels from the centre of the image, rotated by a random angle."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    return _rotate(x, y, _uniform(rng, n, 0, 2 * np.pi))


def _noise(rng: np.random.Generator, n: int, cells: int) -> Array:
    """Smooth noise (n, SIZE, SIZE) in [-1, 1]: a cells x cells random grid, linearly interpolated."""
    position = np.linspace(0, cells - 1, SIZE)
    weights = np.clip(1 - np.abs(position[:, None] - np.arange(cells)), 0, None)
    return weights @ (2 * rng.random((n, cells, cells)) - 1) @ weights.T


def _two_colours(
    rng: np.random.Generator, n: int, contrast_range: tuple[float, float], chroma: float
) -> tuple[Array, Array]:
    """Two colours (n, 3) in [0, 1], drawn alike; their luminances differ, so that grey views keep what is drawn."""
    contrast = _log_uniform(rng, n, *contrast_range).reshape(n, 1)
    middle = 0.15 + contrast / 2 + (0.7 - contrast) * rng.random((n, 1))
    contrast *= np.where(rng.random((n, 1)) < 0.5, -1, 1)
    colours = []
    for sign in (-0.5, 0.5):
        tint = rng.random((n, 3)) - 0.5
        tint -= (tint @ _LUMINANCE)[:, None]  # of luminance 0
        colours.append(np.clip(middle + sign * contrast + chroma * tint, 0, 1))
    return colours[0], colours[1]


def _paint(rng: np.random.Generator, amount: Array, contrast_range: tuple[float, float], chroma: float) -> Array:
    """Images (n, 3, SIZE, SIZE) that blend two random colours by `amount` (n, SIZE, SIZE) in [0, 1]."""
    first, second = (c[:, :, None, None] for c in _two_colours(rng, len(amount), contrast_range, chroma))
    return first + (second - first) * amount[:, None]


# ---- images of shapes -----------------------------------------------------------------------------------------------


def _shape_masks(rng: np.random.Generator, labels: Array) -> Array:
    """Coverage (n, SIZE, SIZE) in [0, 1] by a motif that is repeated on a rotated square lattice.

    The repetition lets a crop of a twelfth of the image still show the class. Every copy is rotated differently;
    otherwise a common direction would identify an image's crops better than the class does.
    """
    n = len(labels)
    radius = _log_uniform(rng, n, *RADIUS)
    period = 2 * radius * _uniform(rng, n, 1.05, 1.2)
    x, y = (z / period + _uniform(rng, n, 0, 1) for z in _plane(rng, n))
    column, row = np.floor(x), np.floor(y)
    turn, turn_by_column, turn_by_row = (_uniform(rng, n, 0, 2 * np.pi) for _ in range(3))
    x, y = ((z - cell - 0.5) * period / radius for z, cell in ((x, column), (y, row)))
    x, y = _rotate(x, y, turn + column * turn_by_column + row * turn_by_row)
    distance = np.empty_like(x)
    for label, shape in enumerate(_SHAPES.values()):
        chosen = labels == label
        distance[chosen] = shape(x[chosen], y[chosen])
    return np.clip(0.5 - distance * radius, 0, 1)  # an edge one pixel wide: anti-aliased


def _draw_shapes(rng: np.random.Generator, labels: Array) -> Array:
    n = len(labels)
    images = _paint(rng, _shape_masks(rng, labels), SHAPE_CONTRAST, SHAPE_CHROMA)
    for cells in (4, 12):  # tinted clouds over shape and background
        tint = (rng.random((n, 3, 1, 1)) - 0.5) * _uniform(rng, n, 0, CLOUDS)[:, None]
        images += tint * _noise(rng, n, cells)[:, None]
    return images


# ---- images of textures: amounts (n, SIZE, SIZE), mapped to [0, 1] by the caller ------------------------------------


def _stripes(rng: np.random.Generator, n: int) -> Array:
    x, _ = _plane(rng, n)
    return 3 * np.sin(x * 2 * np.pi / _log_uniform(rng, n, 4, 14) + _uniform(rng, n, 0, 6.28))


def _checks(rng: np.random.Generator, n: int) -> Array:
    x, y = _plane(rng, n)
    period = _log_uniform(rng, n, 6, 18)
    return 4 * np.sin((x + _uniform(rng, n, 0, 9)) * 2 * np.pi / period) * np.sin(y * 2 * np.pi / period)


def _waves(rng: np.random.Generator, n: int) -> Array:
    waves = []
    for _ in range(4):
        x, _y = _plane(rng, n)
        waves.append(np.sin(x * 2 * np.pi / _log_uniform(rng, n, 5, 20) + _uniform(rng, n, 0, 6.28)))
    return sum(waves) / 1.5


def _centred(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    x, y = _plane(rng, n)
    return x + _uniform(rng, n, -12, 12), y + _uniform(rng, n, -12, 12)


def _rays(rng: np.random.Generator, n: int) -> Array:
    x, y = _centred(rng, n)
    return 3 * np.sin(np.arctan2(y, x) * np.floor(_uniform(rng, n, 4, 10)))


def _blobs(rng: np.random.Generator, n: int) -> Array:
    total = np.full((n, SIZE, SIZE), -1.0)
    for _ in range(6):
        x, y = _plane(rng, n)
        square = (x + _uniform(rng, n, -16, 16)) ** 2 + (y + _uniform(rng, n, -16, 16)) ** 2
        total += 2 * np.exp(-square / _log_uniform(rng, n, 2, 6) ** 2 / 2)
    return total


def _zigzag(rng: np.random.Generator, n: int) -> Array:
    x, y = _plane(rng, n)
    period = _log_uniform(rng, n, 6, 16)
    fold = np.abs((y + _uniform(rng, n, 0, 9)) % period - period / 2)
    return 3 * np.sin((x + 1.3 * fold) * 2 * np.pi / _log_uniform(rng, n, 5, 12))


_TEXTURES = {
    "stripes": _stripes,
    "checks": _checks,
    "gradient": lambda rng, n: _plane(rng, n)[0] / 16 + _uniform(rng, n, -0.5, 0.5),
    "fine noise": lambda rng, n: 1.5 * _noise(rng, n, SIZE),
    "coarse noise": lambda rng, n: 1.5 * _noise(rng, n, 6),
    "waves": _waves,
    "rings": lambda rng, n: 2 * np.sin(np.hypot(*_centred(rng, n)) * 2 * np.pi / _log_uniform(rng, n, 4, 12)),
    "rays": _rays,
    "blobs": _blobs,
    "zigzag": _zigzag,
}
TEXTURE_CLASSES = tuple(_TEXTURES)


def _draw_textures(rng: np.random.Generator, labels: Array) -> Array:
    amounts = np.empty((len(labels), SIZE, SIZE))
    for label, texture in enumerate(_TEXTURES.values()):
        amounts[labels == label] = texture(rng, int((labels == label).sum()))
    return _paint(rng, np.clip(amounts / 2 + 0.5, 0, 1), (0.2, 0.7), 0.8)


# ---- the two data sets ----------------------------------------------------------------------------------------------


def _make(
    draw: Callable[[np.random.Generator, Array], Array], domain: int, split: str, n: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw images in blocks with separate random streams, so the first n images do not depend on how many follow."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    n = SPLITS[split] if n is None else n
    if min(n, seed) < 0:
        raise ValueError(f"n and seed must not be negative, got {n} and {seed}")
    images = torch.empty((n, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.empty(n, dtype=torch.int64)
    for start in range(0, n, _BLOCK):
        entropy = [domain, list(SPLITS).index(split), seed, start // _BLOCK]
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        # Every ten images have each class once, so any prefix is as balanced as possible.
        block_labels = np.argsort(rng.random((_BLOCK // _CLASSES, _CLASSES)), axis=1).reshape(-1)
        block = np.rint(255 * np.clip(draw(rng, block_labels), 0, 1)).astype(np.uint8)
        stop = min(start + _BLOCK, n)
        images[start:stop] = torch.from_numpy(block)[: stop - start]
        labels[start:stop] = torch.from_numpy(block_labels)[: stop - start]
    return images, labels


def make_shapes(split: str = "train", n: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ten classes of drawn shapes (`SHAPE_CLASSES`) in random colours, sizes, places and directions.

    Returns images, uint8 (n, 3, 32, 32), and labels, int64 (n,). `n` defaults to 6,000 for "train" and 4,000 for
    "test"; a smaller n gives the first of these images. Every ten successive images have each class once, in random
    order. The same arguments give the same images. ValueError for an unknown split, a negative n or a negative seed.
    """
    return _make(_draw_shapes, 0, split, n, seed)


def make_textures(split: str = "train", n: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ten families of coloured textures without shapes (`TEXTURE_CLASSES`): queries from outside the domain.

    Arguments, results and errors are those of `make_shapes`; a label is the texture's family.
    """
    return _make(_draw_textures, 1, split, n, seed)
