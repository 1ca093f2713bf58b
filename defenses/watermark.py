"""The rotation watermark: an encoder trained so that the owner's MLP can read from it how far an image was turned.

The 2022 paper's proof of ownership: the owner trains the encoder together with an MLP that tells images rotated by
0-180 degrees from images rotated by 180-360 degrees. A copy answers like the encoder, so the MLP works on it too; on an
independently trained encoder it guesses.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_aug.augment import rotate
from models import SimCLREncoder
from models.checkpoint import load_checked
from utils import Precision, UserError, generator

EARLIER_KEY = "mlp_state_dict"  # of the MLP in checkpoints of the 2022 code


class WatermarkMLP(nn.Module):
    """Representations (B, dim) -> logits (B, 2) for the two half turns, by Linear 256, ReLU, Linear 128, ReLU, Linear.

    The parameters' names are those of the 2022 code.
    """

    checkpoint_key = "watermark_state_dict"

    def __init__(self, dim: int):
        super().__init__()
        self.input, self.hidden, self.output = nn.Linear(dim, 256), nn.Linear(256, 128), nn.Linear(128, 2)

    def forward(self, h: Tensor) -> Tensor:
        return self.output(F.relu(self.hidden(F.relu(self.input(h)))))

    def loss(self, encoder: SimCLREncoder, images: Tensor, degrees: Tensor, call: Callable[..., Tensor]) -> Tensor:
        """The cross-entropy () of the half turns of uint8 images (b, 3, H, W), turned by these angles (2 * b,).

        `call` computes features of the whole batch, as `training.loop.Loop.features`.
        """
        turned, _ = half_turns(images, degrees)
        logits = call(lambda x: self(encoder(x)), turned, 2)
        half = torch.arange(2, device=logits.device).repeat_interleave(len(logits) // 2)
        return F.cross_entropy(logits, half)


def draw_turns(count: int, draws: torch.Generator) -> Tensor:
    """Random angles in degrees (2 * count,) on the CPU: `count` from 0 to 180, then `count` from 180 to 360."""
    half = torch.arange(2).repeat_interleave(count)
    return 180 * (half + torch.rand(len(half), generator=draws))


def half_turns(images: Tensor, degrees: Tensor) -> tuple[Tensor, Tensor]:
    """Turns each uint8 image (B, 3, H, W) by both of its angles in `degrees` (2 * B,), which `draw_turns` drew.

    Returns float (2 * B, 3, H, W) in [0, 1], those turned by 0-180 degrees first, and labels (2 * B,) of 0 and 1.
    """
    half = torch.arange(2, device=images.device).repeat_interleave(len(images))
    return rotate(images.repeat(2, 1, 1, 1), degrees), half


def read_watermark(checkpoint: Mapping, source: str) -> WatermarkMLP:
    """The MLP in a victim's checkpoint, in eval mode; UserError where there is none.

    Older files of the 2022 code call it `mlp_state_dict`.
    """
    state = checkpoint.get(WatermarkMLP.checkpoint_key, checkpoint.get(EARLIER_KEY))
    if state is None:
        raise UserError(f"{source} holds no watermark MLP: train a victim with run.py --watermark True")
    if "input.weight" not in state:
        raise UserError(f"{source} holds something other than a watermark MLP: {', '.join(list(state)[:4])}")
    mlp = WatermarkMLP(state["input.weight"].shape[1])
    load_checked(mlp, state, source)
    return mlp.eval()


def check_width(mlp: WatermarkMLP, encoder: SimCLREncoder, name: str = "this encoder") -> None:
    """UserError when the MLP expects representations of another width than the encoder's."""
    if mlp.input.in_features != encoder.dim:
        raise UserError(
            f"{name} gives representations of {encoder.dim} numbers, the victim's watermark reads "
            f"{mlp.input.in_features}: verify it with --align, or by --method dataset-inference"
        )


@torch.no_grad()
def watermark_scores(
    encoder: SimCLREncoder, mlp: WatermarkMLP, images: Tensor, precision: Precision, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """How well the MLP reads an encoder in eval mode on uint8 images (N, 3, H, W), each turned twice.

    Returns whether each of its answers was right, bool (2 * N,), and the probability it gave to the right label
    (2 * N,), on the CPU, in the order of `half_turns`. Angles depend on the seed only, not on the encoder. UserError
    when the MLP expects representations of another width, or these are no numbers.
    """
    check_width(mlp, encoder)
    encoder, mlp = encoder.to(precision.device).eval(), mlp.to(precision.device)
    draws = generator(seed, "watermark test")
    given = []
    for part in images.split(500):
        turned, half = half_turns(part.to(precision.device), draw_turns(len(part), draws).to(precision.device))
        with precision.autocast():
            h = encoder(turned.contiguous(memory_format=precision.memory_format)).float()
        if not h.norm(dim=1).isfinite().all():
            raise UserError(
                "an encoder gives representations that are too large or no numbers: give another checkpoint"
            )
        given.append(mlp(h).softmax(dim=1).gather(1, half[:, None]).view(2, -1).cpu())
    probability = torch.cat(given, dim=1).flatten()
    return probability > 0.5, probability


def watermark_line(
    encoder: SimCLREncoder, mlp: WatermarkMLP, images: Tensor, precision: Precision, seed: int = 0
) -> str:
    """The accuracy in percent by `watermark_scores`, in the words of the 2022 code."""
    right, _ = watermark_scores(encoder, mlp, images, precision, seed)
    return f"Watermark accuracy is {100 * right.float().mean():.2f}. ({len(images)} test images, each turned twice)"
