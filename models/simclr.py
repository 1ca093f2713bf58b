"""The SimCLR model: a backbone, and a projection head that lives in `backbone.fc` as in the 2022 code."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.resnet import ResNet, resnet10w32, resnet18, resnet34, resnet50

# A new architecture is one row here.
ARCHITECTURES = {
    "resnet10w32": resnet10w32,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
}


def projection_head(dim: int, out_dim: int, batch_norm: bool = False) -> nn.Sequential:
    """The head g: Linear(dim, dim), [BatchNorm], ReLU, Linear(dim, out_dim) (Chen et al., ICML 2020, section 2)."""
    norm = [nn.BatchNorm1d(dim)] if batch_norm else []
    return nn.Sequential(nn.Linear(dim, dim), *norm, nn.ReLU(), nn.Linear(dim, out_dim))


class SimCLREncoder(nn.Module):
    """An encoder with an optional projection head.

    `encoder(images)` gives representations h (B, dim), `encoder.project(images)` projections z = g(h) (B, out_dim).
    Images are float (B, 3, H, W) in [0, 1]. With `normalize` = (mean, std), one number per channel, the encoder
    normalises them itself, so that nobody who holds it has to know.
    """

    def __init__(
        self,
        backbone: ResNet,
        arch: str,
        head: nn.Module | None = None,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.arch = arch
        self.normalize = normalize
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
        return self.backbone.fc[-1].out_features if self.has_head else None

    def forward(self, images: Tensor) -> Tensor:
        if self.normalize:
            images = (images - self.mean) / self.std
        return self.backbone.represent(images)

    def project(self, images: Tensor) -> Tensor:
        """Projections z (B, out_dim) of images (B, 3, H, W); ValueError when the encoder has no head."""
        if not self.has_head:
            raise ValueError("this encoder has no projection head: it was stolen through its representations")
        return self.backbone.fc(self(images))


def build_encoder(
    arch: str,
    out_dim: int | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    batch_norm_head: bool = False,
) -> SimCLREncoder:
    """A new encoder with PyTorch's default initialisation, drawn from the global generator (see utils.seeded).

    `out_dim` None leaves the projection head out. KeyError for an unknown `arch`; ARCHITECTURES names them.
    """
    backbone = ARCHITECTURES[arch]()
    head = None if out_dim is None else projection_head(backbone.dim, out_dim, batch_norm_head)
    return SimCLREncoder(backbone, arch, head, normalize)
