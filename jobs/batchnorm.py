"""Batch norm over the images of all processes, on CPUs: torch's nn.SyncBatchNorm works on GPUs only."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Normalise(torch.autograd.Function):
    """Batch norm of x (B, C, ...) by the statistics of all processes' rows; each process has equally many.

    Let n be the number of all rows, x^ the normalised x, dy the gradient of the output, S1 and S2 the sums over all
    rows of dy and of dy x^. The gradient of x is weight / deviation * (dy - S1 / n - x^ S2 / n). Those of weight
    and bias are this process's sums, which are added up with the other parameters' gradients. torch's kernels compute
    the sums, which is by far the fastest way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        _, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        local = torch.stack([mean, inverse.pow(-2) - eps])
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local)
        means, variances = torch.stack(parts).unbind(1)
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        given = (dy, x, weight, mean, inverse.pow(-2) - ctx.eps, mean, inverse, False, ctx.eps)
        _, local_scaled, local_sum = torch.ops.aten.native_batch_norm_backward(*given, [False, True, True])
        sums = torch.stack([local_sum, local_scaled])
        dist.all_reduce(sums)
        first, second = sums / (dist.get_world_size() * (x.numel() // x.shape[1]))
        # dx = slope dy + tilt x + shift
        slope = weight * inverse
        tilt = -slope * inverse * second
        shift = -slope * first - tilt * mean
        shape = [1, -1] + [1] * (x.ndim - 2)
        slope, tilt, shift = (factor.to(x.dtype).view(shape) for factor in (slope, tilt, shift))
        return torch.addcmul(torch.addcmul(shift, dy, slope), x, tilt), local_scaled, local_sum, None


class SyncBatchNorm(_BatchNorm):
    """Batch norm by the statistics of all processes' images, for CPUs.

    As torch's: (x - mean) / sqrt(variance + eps), variance with divisor n; the running variance has divisor n - 1. Each
    process needs as many rows as the others.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # (B, C) and (B, C, H, W) alike

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        ones = torch.ones_like(self.running_mean)
        weight, bias = (self.weight, self.bias) if self.affine else (ones, torch.zeros_like(ones))
        out, mean, variance = _Normalise.apply(x, weight, bias, self.eps)
        count = dist.get_world_size() * (x.numel() // x.shape[1])
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(1, count - 1), self.momentum)
        return out


def synchronised(model: nn.Module) -> nn.Module:
    """The model, on a CPU, with its batch norms replaced by `SyncBatchNorm`; parameters, buffers and names stay."""
    if isinstance(model, _BatchNorm):
        replacement = SyncBatchNorm(model.num_features, model.eps, model.momentum, model.affine)
        replacement.__dict__.update(model.__dict__)
        return replacement
    for name, child in model.named_children():
        setattr(model, name, synchronised(child))
    return model
