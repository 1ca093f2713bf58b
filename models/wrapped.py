"""Other people's networks as backbones: any module, and the architectures of timm by their names.

build_encoder("timm:vit_tiny_patch16_224")      # timm is optional, and imported only then
Victim(module, dim=512)                         # any module: images (B, 3, H, W) -> rows (B, 512)
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from utils import UserError

TIMM = "timm:"
SIDE = 32  # of images, where nothing else is said
FEW, GRID = 128, 8  # images of a smaller side than this are cut into so many patches a side


class Wrapped(nn.Module):
    """Another library's network as a backbone: images (B, 3, H, W) -> `fc` of the representation (B, dim).

    `input_size`: the only side of images that the network takes, or None.
    """

    def __init__(self, model: nn.Module, read: Callable[[object], Tensor], dim: int, input_size: int | None = None):
        super().__init__()
        self.model, self.read, self.dim, self.input_size = model, read, dim, input_size
        self.fc: nn.Module = nn.Identity()

    def represent(self, x: Tensor) -> Tensor:
        """Representation h (B, dim) of images (B, 3, H, W): `read` of the network's output."""
        return self.read(self.model(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.represent(x))


def check_rows(dim: int, rows: object) -> Tensor:
    """The rows (B, dim) that a module gave. ValueError where it gave something else."""
    if not isinstance(rows, Tensor) or rows.shape[1:] != (dim,):
        found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"the module gives {found} for a batch of images, not rows of dim={dim} numbers")
    return rows


class Architectures(dict[str, Callable[[], nn.Module]]):
    """Functions that build a backbone, by the architecture's name; `timm:NAME` is one of them without being listed."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(TIMM))

    def __missing__(self, name: str) -> Callable[[], nn.Module]:
        if name not in self:
            raise KeyError(name)
        return timm_architecture(name)

    def at(self, name: str, size: int | None) -> Callable[[], nn.Module]:
        """As `[name]`; a network that takes images of one size only is built for images of size x size."""
        return timm_architecture(name, size or SIDE) if name.startswith(TIMM) else self[name]


@functools.cache  # the same function for the same name, as in a table
def timm_architecture(name: str, size: int = SIDE) -> Callable[[], Wrapped]:
    """The function that builds `timm:NAME` with fresh weights."""
    return functools.partial(_build_timm, name, size)


def open_timm(name: str) -> ModuleType:
    """The library, which has the architecture `timm:NAME`. UserError where it is absent, or has no such network."""
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise UserError(f"{name} needs the package timm: pip install timm") from None
    plain = name.removeprefix(TIMM)
    if not (plain.isidentifier() and timm.is_model(plain)):  # other texts timm would look up on the internet
        raise UserError(f"timm {timm.__version__} has no architecture {plain!r}: timm.list_models() has their names")
    return timm


def _build_timm(name: str, size: int) -> Wrapped:
    """A network for images of a fixed size is built for size x size, in its own patches or, below FEW pixels, smaller.

    There the patches, where it has any, are the largest that divide the image into GRID x GRID or more.
    """
    timm, plain = open_timm(name), name.removeprefix(TIMM)
    configuration = timm.models.get_pretrained_cfg(plain)
    fixed = bool(configuration and configuration.fixed_input_size)
    small = size < FEW and {"patch_size": max(part for part in range(1, max(1, size // GRID) + 1) if size % part == 0)}
    attempts = [{"img_size": size, **small}] if fixed and small else []
    for arguments in [*attempts, {"img_size": size} if fixed else {}]:
        try:
            model = timm.create_model(plain, pretrained=False, num_classes=0, **arguments)
            patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
            if size % patch:  # the rest would be cut off
                raise ValueError(f"its patches are of {patch} x {patch} pixels")
            with torch.no_grad():
                row = model.eval()(torch.zeros(1, 3, size, size))
            break
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # it has no patches, or takes no such
            said = next(iter(str(error).splitlines()), type(error).__name__)[:160]
    else:
        raise UserError(f"{name} cannot be built for images of {size} x {size}, give another --size: {said}")
    if not isinstance(row, Tensor) or row.dim() != 2:
        raise UserError(f"{name} does not give an image a single vector: choose another architecture")
    return Wrapped(model.train(), nn.Identity(), row.shape[1], size if fixed else None)
