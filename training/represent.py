"""Representations of images by a frozen encoder, as every evaluation uses them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_aug.datasets import to_float
from data_aug.images import Images, Stored, as_images
from jobs.exchange import gather, share
from utils import Precision, UserError, quiet


@contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Within it the encoder is in eval mode; afterwards RuntimeError if any parameter or buffer has changed."""
    before = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    training = encoder.training
    encoder.eval()
    yield
    encoder.train(training)
    for key, value in encoder.state_dict().items():
        if not torch.equal(value, before[key]):
            raise RuntimeError(f"evaluation changed the encoder: {key}")


def represent(
    encoder: nn.Module,
    images: Tensor | Images,
    precision: Precision | None = None,
    batch_size: int = 1000,
    output: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Representations (N, D) of N images by the frozen encoder, on the encoder's device.

    images: uint8 or float (N, 3, H, W), or any `Images`. output: a method of the encoder to call instead, such as
    `encoder.project`. dtype: float16 halves the memory for many images. Each process of a job computes its share of
    every batch; all of them get all rows. UserError where a representation is not finite.
    """
    precision = precision or Precision("fp32", next(encoder.parameters()).device)
    hidden = True if isinstance(images, Tensor | Stored) else quiet()
    bar = tqdm(total=len(images), desc="representations", unit="img", disable=hidden, leave=False)
    parts = []
    with bar, frozen(encoder):
        for total, local in _batches(images, batch_size, precision.device):
            rows = represent_batch(output or encoder, local, precision).to(dtype)
            parts.append(gather(rows, total))
            bar.update(total)
        check_finite(torch.cat([rows.float().norm(dim=1) for rows in parts]), precision)
    return torch.cat(parts)


def check_finite(lengths: Tensor, precision: Precision) -> None:
    """UserError where the length of a representation, or another number computed from it, is not finite."""
    if not lengths.isfinite().all():
        remedy = "give another checkpoint" + ("" if precision.name == "fp32" else ", or --precision fp32")
        raise UserError(f"an encoder gives representations that are too large or no numbers: {remedy}")


def _batches(images: Tensor | Images, batch_size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """The size of each batch of the job, and this process's images of it."""
    if isinstance(images, Tensor) and images.is_floating_point():
        yield from ((len(part), part[share(len(part))]) for part in images.split(batch_size))
        return
    images = as_images(images)
    for batch in images.batches(torch.arange(len(images)).split(batch_size), device, share=share):
        yield len(batch.index), batch.images


@torch.no_grad()
def represent_batch(encoder: Callable[[Tensor], Tensor], images: Tensor, precision: Precision) -> Tensor:
    """Representations (B, D), float32, of uint8 or float images (B, 3, H, W), by an encoder in eval mode."""
    images = to_float(images.to(precision.device)).contiguous(memory_format=precision.memory_format)
    with precision.autocast():
        return encoder(images).float()
