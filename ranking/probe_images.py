"""The images on which encoders are compared with a victim when many suspects are ranked.

Images of the victim's own data say whether an encoder was trained on them, and how close it is to the victim there.
Noise and textures are like nothing that a training set has: what encoders make of them is left to chance, so that
encoders which were not copied from each other differ there more than on photographs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data_aug.shapes import make_textures
from evaluation.candidates import TRAINED
from utils import UserError, derive_seed, generator

CELLS = (4, 8, 16, 32)  # the noise images are grids of so many cells, in turn


@dataclass(frozen=True)
class ProbeImages:
    """Four sets of uint8 images (N, 3, H, W), of any numbers.

    trained: the victim was trained on them; unseen: no encoder is known to have been trained on them or to have queried
    them; noise: `noise_images`; textures: those of `data_aug.shapes`.
    """

    trained: Tensor
    unseen: Tensor
    noise: Tensor
    textures: Tensor

    def sets(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def counts(self) -> dict[str, int]:
        """The number of images of each set."""
        return {f"{name}_images": len(images) for name, images in vars(self).items()}


def make_probes(trained: Tensor, unseen: Tensor, number: int, seed: int) -> ProbeImages:
    """The victim's images with `number` images of noise and as many textures, of the size of its images."""
    size = trained.shape[2:]
    textures = make_textures("test", number, derive_seed(seed, "probe textures") % 2**31)[0]
    if textures.shape[2:] != size:
        resized = F.interpolate(textures.float(), tuple(size), mode="bilinear", antialias=True)
        textures = resized.round().clamp(0, 255).byte()
    return ProbeImages(trained, unseen, noise_images(number, tuple(size), generator(seed, "probe noise")), textures)


def noise_images(number: int, size: tuple[int, int], draws: torch.Generator) -> Tensor:
    """uint8 (number, 3, H, W): grids of 4, 8, 16 and 32 cells a side, in turn, of uniform random colours."""
    images = []
    for position in range(number):
        cells = CELLS[position % len(CELLS)]
        grid = torch.randint(0, 256, (1, 3, cells, cells), generator=draws)
        images.append(F.interpolate(grid.float(), size, mode="nearest").byte())
    return torch.cat(images)


def choose_trained(count: int, number: int | None, spare: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the victim's training images that encoders are scored on, and of the others, which shadows get.

    `number` images, or TRAINED at most. spare: half of the images at least are left for the shadows. UserError for
    more images than there are.
    """
    most = count // 2 if spare else count
    if number is not None and number > most:
        left = ", and half of them train the shadows" if spare else ""
        raise UserError(f"--num-train {number}: the victim was trained on {count} images{left}: give {most} or less")
    number = min(most, TRAINED) if number is None else number
    if number < 4:
        raise UserError(f"{number} training images of the victim are too few to score encoders by: give 4 or more")
    order = torch.randperm(count, generator=generator(seed, "ranking"))
    return order[:number], order[number:].sort().values


def contested_values(common: Tensor, share: float) -> Tensor:
    """For each of N encoders, its mean shared neighbours on the images where the other N - 1 share the fewest.

    common (N, M): of each encoder and image, the share in [0, 1] of neighbours that it has in common with the victim.
    `share` of the M images are chosen, anew for each encoder, by all others: an encoder never chooses its own images.
    Returns (N,) in percent.
    """
    count = max(1, round(share * common.shape[1]))
    common = common.double()
    others = (common.sum(dim=0) - common).round(decimals=6)  # (N, M): for each encoder, without its own row
    chosen = others.argsort(dim=1, stable=True)[:, :count]
    return 100 * common.gather(1, chosen).mean(dim=1)
