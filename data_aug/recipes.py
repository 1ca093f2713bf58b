"""Recipes of random views: which operations a view gets, how often and how strongly. `augment` draws and makes them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ViewRecipe:
    """The random operations of a view, in this order. An operation at None or 0 is left out, and costs nothing.

    crop_area    range of the area of the crop, as a share of the image's: it is resized to the view's size. Without it,
                 an image of another size than the view's is resized whole
    crop_ratio   range of width / height of the crop
    randaugment  number of operations and magnitude of RandAugment (`randaugment`)
    padding      pixels of a black border around the view, out of which a part of the view's size is cut
    flip_rate    probability of mirroring left and right
    jitter       strengths of brightness, contrast, saturation and hue, as of torchvision's ColorJitter
    jitter_rate  probability of the jitter; its four operations come in random order
    grey_rate    probability of removing the colours
    blur_rate    probability of the Gaussian blur
    blur_sigma   range of its standard deviation in pixels of the view
    blur_radius  radius of its kernel in pixels; None for SimCLR's, a twentieth of the view's size
    solarise_rate  probability of inverting the values of at least 128 / 255
    """

    crop_area: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    randaugment: tuple[int, int] | None = None
    padding: int = 0
    flip_rate: float = 0.0
    jitter: tuple[float, float, float, float] | None = None
    jitter_rate: float = 0.8
    grey_rate: float = 0.0
    blur_rate: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_radius: int | None = None
    solarise_rate: float = 0.0


def _rda(area: float) -> ViewRecipe:
    """Square crops of a fixed area. The blur there is PIL's, with a wide kernel: here three times the largest sigma."""
    return ViewRecipe(
        crop_area=(area, area),
        crop_ratio=(1.0, 1.0),
        flip_rate=0.5,
        jitter=(0.4, 0.4, 0.4, 0.2),
        grey_rate=0.2,
        blur_rate=0.1,
        blur_radius=6,
        solarise_rate=0.1,
    )


VIEW_RECIPES = {
    # Chen et al. 2020, appendix A, with the blur on every view as in the code of Dziedzic et al. 2022.
    "simclr": ViewRecipe(
        crop_area=(0.08, 1.0), flip_rate=0.5, jitter=(0.8, 0.8, 0.8, 0.2), grey_rate=0.2, blur_rate=1.0
    ),
    # Chen et al. 2020, appendix B.9, for 32 x 32 pixels: no blur, and the jitter at half the strength.
    "simclr-cifar": ViewRecipe(crop_area=(0.08, 1.0), flip_rate=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grey_rate=0.2),
    # Wu et al., ECCV 2024, as released: what the victim is sent, and what the copy sees.
    "rda-query": _rda(0.9),
    "rda-copy": _rda(0.75),
    # Liu et al., CCS 2022, as released.
    "stolenencoder": ViewRecipe(flip_rate=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grey_rate=0.2),
    # Sha et al., CVPR 2023, as released, except that RandAugment is torchvision's: see `randaugment`.
    "contsteal": ViewRecipe(randaugment=(2, 14), padding=4, flip_rate=0.5),
    # The usual views of supervised training on CIFAR-10 (He et al. 2016).
    "crop-flip": ViewRecipe(padding=4, flip_rate=0.5),
    # This project's own: little is lost of an image, at any size.
    "mild": ViewRecipe(crop_area=(0.8, 1.0), crop_ratio=(0.9, 1 / 0.9), flip_rate=0.5, jitter=(0.2, 0.2, 0.2, 0.05)),
    # The image itself.
    "none": ViewRecipe(),
}
