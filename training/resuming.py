"""What a run goes on with: the entries of its checkpoint are checked before the optimizer takes them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from files.reading import dense
from training.lars import LARS
from utils import UserError

# What an optimizer keeps for a parameter: tensors of its shape, or a count of steps.
KEPT = {torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.SGD: {"momentum_buffer"}}
KEPT[LARS] = KEPT[torch.optim.SGD]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Any, source: str) -> None:
    """Take an optimizer's state, but not its settings: those in force hold.

    UserError unless the state has every parameter, or none, with all that this optimizer keeps, each of the parameter's
    shape and type, in finite numbers: other tensors would be read beyond their ends.
    """
    state = saved.get("state") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"{source} has no state of its optimizer: train again without --resume")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    momentum = [group.get("momentum", 1) for group in optimizer.param_groups for _ in group["params"]]
    kept = KEPT[type(optimizer)] if any(momentum) else set()
    keeping = {number for number, value in enumerate(momentum) if value}
    if state and kept and set(state) != keeping:
        raise UserError(
            f"{source} has the optimizer's state of {len(state)} parameters, not of {len(keeping)}: "
            "train again without --resume"
        )
    for number, entries in state.items():
        names = set(entries) if isinstance(entries, Mapping) else None
        wrong = (
            "its entries"
            if names != kept
            else next((name for name in sorted(kept) if not _fits(name, entries[name], parameters[number])), None)
        )
        if wrong:
            raise UserError(
                f"{source}: {wrong} in the optimizer's state of parameter {number} does not fit the parameter: "
                "train again without --resume"
            )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _fits(name: str, value: Any, parameter: Tensor) -> bool:
    if not dense(value) or not value.is_floating_point() or not value.isfinite().all():
        return False
    shape = torch.Size([]) if name == "step" else parameter.shape
    smallest = 0 if name in ("step", "exp_avg_sq") else -torch.inf
    return value.shape == shape and value.dtype == torch.float32 and bool((value >= smallest).all())
