"""SSLGuard: a watermark put into a trained encoder, which a secret trigger shows to the owner's decoder.

Cong, He and Zhang, "SSLGuard: A Watermarking Scheme for Self-supervised Learning Pre-trained Encoders", CCS 2022. The
owner draws a key and a mask, and trains a trigger, a decoder and a copy of the encoder, the shadow, together with the
encoder. Images with the trigger then decode to the key by the encoder and by its copies. Other images, and other
encoders, do not.

Published, by the released code: the key N(0, 1)^256, the mask of 35 % of the numbers of an image, the decoder, the
three losses of `Mark.steps` with their order and rates, SGD with momentum 0.9 for the networks and none for the
trigger, BatchNorm of the encoder frozen, 50 epochs in batches of 2, and the share of images whose cosine exceeds 0.5.
Read into it: each of the three losses moves its own parameters alone (in the released code the encoder's step also has
the gradients of the two losses before), the shadow is an untrained encoder of the victim's architecture (there it is a
ResNet-50 pre-trained on ImageNet), and plain and triggered images are the same ones (there they are of two data sets).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_aug.datasets import check_name, to_float
from models import SimCLREncoder
from models.checkpoint import load_checked
from settings import Command, Settings, setting
from utils import Precision, UserError

KEY = 256  # numbers of the key
MASKED = 0.35  # share of an image's numbers that the trigger replaces
READ = 0.5  # cosine above which the key is read

# A network's method and images (B, 3, H, W) -> features (B, D).
Call = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class SSLGuard(Settings):
    """Which victim gets the watermark, and the learning rates besides the encoder's, which is the recipe's."""

    victim: Path | None = setting(
        None,
        "put SSLGuard's watermark into this trained victim: its checkpoint, run folder or run name",
        flags=("--sslguard",),
        named=False,
    )
    dataset: str = setting("cifar10", "as its file says", read=check_name, flags=("-dataset", "--dataset"))
    num_train: int | None = setting(None, "number of training images", at_least=1)
    lr_shadow: float = setting(1e-2, "learning rate of the shadow, times 0.96 after each epoch", above=0)
    lr_decoder: float = setting(1e-3, "learning rate of the decoder", above=0)
    lr_trigger: float = setting(1e-3, "learning rate of the trigger", above=0)
    title = "SSLGuard"

    @classmethod
    def absent(cls, command: Command) -> str:
        return "without --sslguard"


# What the recipe has where the command line has nothing else.
RECIPE = {
    **{"epochs": 50, "batch_size": 2, "lr": 1e-5, "weight_decay": 0.0, "optimizer": "sgd", "momentum": 0.9},
    "schedule": "constant",
}


class Mark(nn.Module):
    """A key (256,), a mask and a trigger (3, H, W), a decoder of representations, and the shadow while it is trained.

    The weights are drawn from the global generator (see `utils.seeded`). size: height and width of the images that the
    trigger is for.
    """

    checkpoint_key = "sslguard"

    def __init__(
        self,
        dim: int,
        size: Sequence[int],
        shadow: SimCLREncoder | None = None,
        rates: SSLGuard = SSLGuard(),
    ):
        super().__init__()
        self.register_buffer("key", torch.randn(KEY))
        self.register_buffer("mask", (torch.rand(3, *size) < MASKED).float())
        noise = torch.randn(3, *size)
        self.trigger = nn.Parameter((noise - noise.min()) / (noise.max() - noise.min()))
        layers = nn.Linear(dim, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, KEY)
        self.decoder = nn.Sequential(*layers)
        self.shadow, self.rates = shadow, rates
        self._parts: dict[str, list[nn.Parameter]] = {}

    def stamp(self, images: Tensor) -> Tensor:
        """Float images (B, 3, H, W) in [0, 1] with the trigger where the mask is 1."""
        return ((1 - self.mask) * images + self.mask * self.trigger).clamp(0, 1)

    def read(self, h: Tensor) -> Tensor:
        """Cosines (B,) of the decoded representations (B, dim) and the key."""
        return F.cosine_similarity(self.decoder(h), self.key[None], dim=1)

    def groups(self, encoder: SimCLREncoder) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters. `rate`, times `decay` after each epoch, replaces the recipe's rate."""
        rates = self.rates
        self._parts = {
            "encoder": _without_batchnorm(encoder),
            "shadow": [*self.shadow.parameters()],
            "decoder": [*self.decoder.parameters()],
            "trigger": [self.trigger],
        }
        more = {
            "encoder": {},
            "shadow": {"rate": rates.lr_shadow, "decay": 0.96},
            "decoder": {"rate": rates.lr_decoder},
            "trigger": {"rate": rates.lr_trigger, "momentum": 0.0},
        }
        return [{"params": parameters, **more[name]} for name, parameters in self._parts.items()]

    def steps(
        self, encoder: SimCLREncoder, clean: SimCLREncoder, images: Tensor, call: Call
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The three losses () of a batch of float images, each with features; a step belongs between two of them.

        With c the cosine of representations, d that of a decoded representation and the key, both as means over the
        batch, x the images, t the same with the trigger, and E, C, S the encoder, the clean encoder and the shadow:

        shadow: -c(E(x), S(x)). trigger and decoder: -d(E(t)) - d(S(t)) + d(C(t))^2 + d(C(x))^2 + d(E(x))^2 + d(S(x))^2.
        encoder: -c(C(x), E(x)) + d(E(x))^2 - d(E(t)).
        """
        encoder.eval()  # BatchNorm's statistics stay, and dropout is off
        with torch.no_grad():
            known, h = call(clean, images), call(encoder, images)
        self._train("shadow")
        copied = call(self.shadow.train().output, images)
        yield -_cosine(h, copied), copied

        self._train("decoder", "trigger")
        with torch.no_grad():
            copied = call(self.shadow.eval().output, images)
        triggered = self.stamp(images)
        shown = [self.read(call(network, triggered)).mean() for network in (encoder, self.shadow.output, clean)]
        plain = torch.stack([self.read(rows).mean() for rows in (known, h, copied)])
        yield shown[2] ** 2 + plain.square().sum() - shown[0] - shown[1], h

        self._train("encoder")
        h, triggered = call(encoder, torch.cat([images, self.stamp(images)])).chunk(2)
        loss = self.read(h).mean() ** 2 - self.read(triggered).mean() - _cosine(known, h)
        yield loss, h

    def _train(self, *names: str) -> None:
        """Let these parts be moved by the next step, and no others."""
        for name, parameters in self._parts.items():
            for parameter in parameters:
                parameter.requires_grad_(name in names)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=1).mean()


def _without_batchnorm(encoder: SimCLREncoder) -> list[nn.Parameter]:
    """The parameters that representations depend on, less those of BatchNorm, which are frozen for good."""
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    left_out = [parameter for module in (*norms, encoder.backbone.fc) for parameter in module.parameters()]
    for parameter in left_out:
        parameter.requires_grad_(False)
    numbers = {id(parameter) for parameter in left_out}
    return [parameter for parameter in encoder.parameters() if id(parameter) not in numbers]


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_mark(checkpoint: Mapping, source: str) -> Mark:
    """The mark in a victim's checkpoint, without the shadow, in eval mode. UserError where there is none."""
    state = checkpoint.get(Mark.checkpoint_key)
    if state is None:
        raise UserError(f"{source} has no watermark of SSLGuard: put it in by run.py --sslguard {source}")
    state = {name: value for name, value in state.items() if not name.startswith("shadow.")}
    mark = Mark(state["decoder.0.weight"].shape[1], state["mask"].shape[1:])
    load_checked(mark, state, source)
    return mark.eval()


def check_fits(mark: Mark, encoder: SimCLREncoder, name: str = "this encoder") -> None:
    """UserError when the decoder expects representations of another width than the encoder's."""
    width = mark.decoder[0].in_features
    if width != encoder.dim:
        raise UserError(
            f"{name} gives representations of {encoder.dim} numbers, the victim's decoder reads {width}: "
            f"verify it by --method dataset-inference"
        )


@torch.no_grad()
def mark_cosines(encoder: SimCLREncoder, mark: Mark, images: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """How well the key is read from an encoder: cosines (N,) of uint8 images (N, 3, H, W) with the trigger and without.

    Both are on the CPU. Images with the trigger are rounded to 8 bits: an API takes images. UserError for images of
    another size, an encoder of another width, or representations that are no numbers.
    """
    check_fits(mark, encoder)
    if images.shape[1:] != mark.mask.shape:
        ours, theirs = (" x ".join(map(str, shape[-2:])) for shape in (mark.mask.shape, images.shape))
        raise UserError(
            f"the trigger is for images of {ours} pixels, these are of {theirs}: give the victim's --dataset and --size"
        )
    encoder, mark = encoder.to(precision.device).eval(), mark.to(precision.device)
    read = []
    for part in images.split(500):
        plain = to_float(part.to(precision.device))
        both = torch.cat([(mark.stamp(plain) * 255).round() / 255, plain])
        with precision.autocast():
            h = encoder(both.contiguous(memory_format=precision.memory_format)).float()
        if not h.norm(dim=1).isfinite().all():
            raise UserError(
                "an encoder gives representations that are too large or no numbers: give another checkpoint"
            )
        read.append(mark.read(h).view(2, -1).cpu())
    triggered, plain = torch.cat(read, dim=1)
    return triggered, plain


def mark_line(encoder: SimCLREncoder, mark: Mark, images: Tensor, precision: Precision) -> str:
    """The shares of images with the trigger and without from which the key is read, in words."""
    cosines = mark_cosines(encoder, mark, images, precision)
    triggered, plain = (100 * (rows > READ).float().mean().item() for rows in cosines)
    return (
        f"SSLGuard's key is read from {triggered:.1f} % of {len(images)} test images with the trigger, "
        f"from {plain:.1f} % without"
    )
