"""The SimCLR model: a backbone with a projection head in `backbone.fc`, as in the 2022 code."""

from collections.abc import Collection, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import ResNet, resnet10w32, resnet18, resnet34, resnet50, resnet101
from models.wrapped import TIMM, Architectures, Wrapped, check_rows, open_timm
from utils import UserError

# A new architecture is a row here; those of timm are there by their names, such as timm:vit_tiny_patch16_224.
ARCHITECTURES = Architectures(
    {
        "resnet10w32": resnet10w32,
        "resnet18": resnet18,
        "resnet34": resnet34,
        "resnet50": resnet50,
        "resnet10w32-imagenet": partial(resnet10w32, "imagenet"),
        "resnet18-imagenet": partial(resnet18, "imagenet"),
        "resnet34-imagenet": partial(resnet34, "imagenet"),
        "resnet50-imagenet": partial(resnet50, "imagenet"),
        "resnet101-imagenet": partial(resnet101, "imagenet"),
        "resnet18-padding2": partial(resnet18, "padding2"),
        "resnet50-padding2": partial(resnet50, "padding2"),
        "resnet18-norelu": partial(resnet18, "norelu"),
        "resnet34-norelu": partial(resnet34, "norelu"),
        "resnet50-norelu": partial(resnet50, "norelu"),
    }
)

# Architectures with the ImageNet stem, by the names that the scripts of ImageNet scale use.
LARGE = [name.removesuffix("-imagenet") for name in ARCHITECTURES if name.endswith("-imagenet")]

USUAL = "resnet10w32, resnet18, resnet34 or resnet50 (`help` lists all), or timm:NAME"


def arch_name(text: str, names: Collection[str] = ARCHITECTURES) -> str:
    """The name itself if it is an architecture; `help` prints all names and exits. UserError for any other text."""
    if text == "help":
        print(*names, sep="\n")
        raise SystemExit(0)
    if text not in names:
        raise UserError(f"unknown architecture {text!r}: choose from {', '.join(names)}")
    if text.startswith(TIMM):
        open_timm(text)
    return text


def large_arch_name(text: str) -> str:
    """As `arch_name`, for architectures with the ImageNet stem."""
    return arch_name(text, LARGE)


Normalize = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel


def projection_head(dim: int, out_dim: int, kind: str = "mlp") -> nn.Module:
    """The head g from h (B, dim) to z (B, out_dim), of three kinds.

    `mlp` is Linear(dim, dim), ReLU, Linear(dim, out_dim) (Chen et al., ICML 2020, section 2), `mlp-bn` the same with a
    BatchNorm before the ReLU, `linear` a single Linear: a classifier, or the map from a copy's width to its victim's.
    """
    if kind == "linear":
        return nn.Linear(dim, out_dim)
    norm = [nn.BatchNorm1d(dim)] if kind == "mlp-bn" else []
    return nn.Sequential(nn.Linear(dim, dim), *norm, nn.ReLU(), nn.Linear(dim, out_dim))


class SimCLREncoder(nn.Module):
    """An encoder with an optional projection head.

    `encoder(images)` gives representations h (B, dim), `encoder.project(images)` projections z = g(h) (B, out_dim).
    Images are float (B, 3, H, W) in [0, 1]. With `normalize` = (mean, std), a number per channel each, the encoder
    normalises them itself, so that callers need not know; with `input_size` it first resizes images of another size to
    input_size x input_size, as an API does. `report` says how a file was read.
    """

    report = ""

    def __init__(
        self,
        backbone: ResNet | Wrapped,
        arch: str,
        head: nn.Module | None = None,
        normalize: Normalize | None = None,
        input_size: int | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.arch = arch
        self.normalize = normalize
        self.input_size = input_size
        if head is not None:
            self.backbone.fc = head
        # Not persistent: the 2022 checkpoints have no such keys, and ours must stay readable by its code.
        mean, std = normalize or ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def dim(self) -> int:
        """Width of the representation h."""
        return self.backbone.dim

    @property
    def has_head(self) -> bool:
        return not isinstance(self.backbone.fc, nn.Identity)

    @property
    def out_dim(self) -> int | None:
        """Width of the projection z; None without a head."""
        head = self.backbone.fc
        return (head[-1] if isinstance(head, nn.Sequential) else head).out_features if self.has_head else None

    @property
    def output_dim(self) -> int:
        """Width of `output`."""
        return self.out_dim or self.dim

    def forward(self, images: Tensor) -> Tensor:
        size = self.input_size
        if size and images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        if self.normalize:
            images = (images - self.mean) / self.std
        return self.backbone.represent(images)

    def project(self, images: Tensor) -> Tensor:
        """Projections z (B, out_dim) of images (B, 3, H, W); ValueError when the encoder has no head."""
        if not self.has_head:
            raise ValueError("this encoder has no projection head: it was stolen through its representations")
        return self.backbone.fc(self(images))

    def output(self, images: Tensor) -> Tensor:
        """The features by which a copy is trained (B, output_dim): z with a head, h without."""
        return self.project(images) if self.has_head else self(images)


def build_encoder(
    arch: str,
    out_dim: int | None = None,
    normalize: Normalize | None = None,
    head: str = "mlp",
    input_size: int | None = None,
) -> SimCLREncoder:
    """A new encoder with its architecture's initialisation, drawn from the global generator (see utils.seeded).

    `out_dim` None: no head. `projection_head` lists the kinds of heads. KeyError for an `arch` not in ARCHITECTURES.
    """
    backbone = ARCHITECTURES.at(arch, input_size)()
    fc = None if out_dim is None else projection_head(backbone.dim, out_dim, head)
    return SimCLREncoder(backbone, arch, fc, normalize, input_size or getattr(backbone, "input_size", None))


def as_encoder(module: nn.Module, dim: int | None = None) -> SimCLREncoder:
    """An encoder as it is, or any module around which one is made: images (B, 3, H, W) in [0, 1] -> rows (B, dim).

    ValueError where `dim` is missing, or not an encoder's.
    """
    known = module.dim if isinstance(module, SimCLREncoder) else None
    if (known or dim) is None or dim not in (None, known or dim):
        raise ValueError(f"give dim, the width of the rows of {type(module).__name__}{f': {known}' if known else ''}")
    if known:
        return module
    return SimCLREncoder(Wrapped(module, partial(check_rows, dim), dim), type(module).__name__)


def build_copy(
    arch: str,
    width: int,
    normalize: Normalize | None = None,
    head: bool = False,
    input_size: int | None = None,
) -> SimCLREncoder:
    """A new encoder whose `output` has the width of a victim's answers.

    With `head` it has a projection head (Linear, ReLU, Linear). Without, the output is the representation, or a linear
    map of it where the widths differ. Heads are trained with the copy and left out of its evaluation.
    """
    copy = build_encoder(arch, width if head else None, normalize, input_size=input_size)
    if not head and copy.dim != width:
        copy.backbone.fc = projection_head(copy.dim, width, "linear")
    return copy
