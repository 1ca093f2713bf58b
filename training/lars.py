"""LARS: SGD whose step is, in each layer, in proportion to the layer's weights."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, equation 6, algorithm 1), over SGD with momentum.

    For each parameter w with gradient g, both of which have to be other than 0, the gradient that SGD's momentum takes
    is (g + weight_decay w) * trust |w| / (|g| + weight_decay |w| + eps); for others it is g + weight_decay w. Norms are
    Euclidean. Biases and batch norms are no exceptions, as in the 2022 work.
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
        """One step; the gradients are changed in place."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            # Norms stay on the device: nothing here waits for it.
            w, g = (torch.stack(torch._foreach_norm(one)) for one in (weights, gradients))
            ratio = self.trust * w / (g + self.decay * w + self.eps)
            ratio = torch.where((w > 0) & (g > 0), ratio, 1.0)
            if self.decay:
                torch._foreach_add_(gradients, weights, alpha=self.decay)
            torch._foreach_mul_(gradients, list(ratio.unbind()))
        return super().step(closure)
