"""LARS: SGD whose step in each layer is proportional to the norm of the layer's weights."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, equation 6, algorithm 1), over SGD with momentum.

    For a parameter w with gradient g, SGD with momentum gets (g + weight_decay w) * trust |w| / (|g| + weight_decay |w|
    + eps) as the gradient, or g + weight_decay w where w or g is 0. Norms are Euclidean. Biases and batch norms are
    included, as in the 2022 code. A group with `plain` is left to SGD with momentum, without weight decay.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        eps: float = 1e-8,
    ):
        super().__init__(parameters, lr=lr, momentum=momentum)
        self.decay, self.trust, self.eps = weight_decay, trust, eps

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take a step; this changes the gradients in place."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights or group.get("plain"):
                continue
            gradients = [weight.grad for weight in weights]
            # Norms stay on the device: nothing here waits for it.
            w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, gradients))
            ratio = self.trust * w / (g + self.decay * w + self.eps)
            ratio = torch.where((w > 0) & (g > 0), ratio, 1.0)
            if self.decay:
                torch._foreach_add_(gradients, weights, alpha=self.decay)
            torch._foreach_mul_(gradients, list(ratio.unbind()))
        return super().step(closure)
