"""Rows of random views alone: ours, kornia, torchvision in batches, torchvision on PIL images; and of each recipe."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from benchmarks import peers
from benchmarks.row import Ratio, make_row
from benchmarks.timing import Contest, Effort, Missing
from data_aug.augment import apply_views, draw_views, random_views
from data_aug.recipes import VIEW_RECIPES, ViewRecipe
from utils import generator

SIZE = 32
SIMCLR = VIEW_RECIPES["simclr"]
ALONE = {
    "crop": ViewRecipe(crop_area=SIMCLR.crop_area, crop_ratio=SIMCLR.crop_ratio),
    "flip": ViewRecipe(flip_rate=SIMCLR.flip_rate),
    "jitter": ViewRecipe(jitter=SIMCLR.jitter, jitter_rate=SIMCLR.jitter_rate),
    "grey": ViewRecipe(grey_rate=SIMCLR.grey_rate),
    "blur": ViewRecipe(blur_rate=1.0, blur_sigma=SIMCLR.blur_sigma),
}
ONE_SET = "torchvision v2 draws one set of choices for the whole batch, which is less than SimCLR's views need"


def smooth_images(count: int) -> Tensor:
    """uint8 (count, 3, SIZE, SIZE), smooth as photographs are."""
    small = torch.rand(count, 3, 8, 8, generator=generator(0, "images"))
    large = F.interpolate(small, (SIZE, SIZE), mode="bicubic")
    return (large.clamp(0, 1) * 255).to(torch.uint8)


def our_views(images: Tensor, batches: int, recipe: ViewRecipe = SIMCLR) -> Callable[[], None]:
    """A function that does what an epoch of so many batches does: its table of draws, and each batch's views."""
    draws = generator(0, "views")

    def work() -> None:
        table = draw_views(batches * len(images), SIZE, SIZE, SIZE, draws, recipe).to(images.device)
        for rows in torch.arange(batches * len(images), device=images.device).split(len(images)):
            apply_views(images, table[rows])

    return work


def by_pil(images: Tensor, only: str | None = None) -> Callable[[], Tensor]:
    """A function that makes a batch of views of PIL images in this process, one after the other."""
    pictures, view = [to_pil_image(image) for image in images.cpu()], peers.pil_view(SIZE, only)
    return lambda: torch.stack([view(picture) for picture in pictures])


def in_batches(make: Callable[..., peers.Views], images: Tensor, **options: Any) -> Callable[[], Tensor]:
    """A function that makes a batch of views with another library."""
    view = make(SIZE, **options)
    return torch.no_grad()(lambda: view(images))


def views(effort: Effort) -> dict[str, Any]:
    """The row of SimCLR's views: milliseconds for a batch of 512."""
    count, batches = effort.size(512, 512, 8), effort.size(8, 195, 2)
    images, contest = smooth_images(count).to(effort.device), Contest(effort)

    def compiled() -> Callable[[], Tensor]:
        if effort.quick:
            raise Missing("left out by --quick")
        return in_batches(peers.kornia_views, images, compiled=True)

    contest.add("ours", lambda: our_views(images, batches), batches)
    draws = generator(0, "more views")
    contest.add("ours, each batch drawn by itself", lambda: lambda: random_views(images, SIZE, draws), repeat=True)
    contest.add("kornia", lambda: in_batches(peers.kornia_views, images), repeat=True, ours=False)
    contest.add("kornia, compiled", compiled, repeat=True, ours=False)
    contest.add(
        "torchvision v2, batched", lambda: in_batches(peers.batched_torchvision_views, images), repeat=True, ours=False
    )
    contest.add("torchvision on PIL, one process", lambda: by_pil(images), ours=False)
    contest.run()
    limits = {"kornia, compiled": 3.0} if effort.on_gpu else {"kornia": 5.0}
    names = ("kornia", "kornia, compiled", "torchvision v2, batched", "torchvision on PIL, one process")
    ratios = [Ratio("ours", name, limits.get(name)) for name in names]
    notes = (f"ours: an epoch's table of draws for {batches} batches, and their views", ONE_SET)
    return make_row(f"SimCLR's views of {SIZE} px, {count} in a batch", contest, "ms", ratios, notes)


def operations(effort: Effort) -> dict[str, Any]:
    """The row of each operation by itself: milliseconds for a batch of 512, with the change from uint8 to float."""
    count, batches = effort.size(512, 512, 8), effort.size(8, 100, 2)
    images, contest = smooth_images(count).to(effort.device), Contest(effort)
    for only in peers.OPERATIONS:
        ways = {
            "ours": lambda only=only: our_views(images, batches, ALONE[only]),
            "kornia": lambda only=only: in_batches(peers.kornia_views, images, only=only),
            "torchvision v2": lambda only=only: in_batches(peers.batched_torchvision_views, images, only=only),
            "PIL": lambda only=only: by_pil(images, only),
        }
        for name, make in ways.items():
            ours = name == "ours"
            contest.add(f"{only}, {name}", make, batches if ours else 1, repeat=not ours and name != "PIL", ours=ours)
    contest.run()
    ratios = [Ratio(f"{only}, ours", f"{only}, kornia") for only in peers.OPERATIONS]
    title = f"Operations of {SIZE} px by themselves, {count} in a batch"
    return make_row(title, contest, "ms", ratios, (ONE_SET, "jitter and grey at SimCLR's rates, blur of all images"))


def recipes(effort: Effort) -> dict[str, Any]:
    """The row of every recipe of views: milliseconds for a batch of 512."""
    count, batches = effort.size(512, 512, 8), effort.size(4, 50, 1)
    images, contest = smooth_images(count).to(effort.device), Contest(effort)
    for name, recipe in VIEW_RECIPES.items():
        contest.add(name, lambda recipe=recipe: our_views(images, batches, recipe), batches)
    contest.run()
    return make_row(f"Recipes of views, {SIZE} px, {count} in a batch", contest, "ms")
