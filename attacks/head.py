"""The attack that re-creates the victim's projection head first: its settings, and what its victim sells."""

from dataclasses import dataclass
from pathlib import Path

from loss import HEAD_LOSSES, STEAL_LOSSES
from models import USUAL, SimCLREncoder, arch_name
from settings import Command, Settings, setting
from utils import UserError
from victim import Api

# The copy sees what was sent, so there is nothing here for a loss about augmentations of its own.
LOSSES = {name: loss for name, loss in STEAL_LOSSES.items() if not loss.plain_first}


@dataclass(frozen=True)
class Head(Settings):
    """The head that is re-created, how it is trained, and the copy behind it."""

    archstolen: str = setting(
        "resnet34", f"the copy's architecture: {USUAL}", read=arch_name, flags=("-a", "--arch", "--archstolen")
    )
    victimhead: bool = setting(False, "the victim sells its projections too; --losshead msewithhead needs them")
    head_queries: int = setting(0, "share of the budget for the head", at_least=1, otherwise="half")
    losshead: str = setting("infonce", "loss the head is trained with", choices=HEAD_LOSSES)
    lrhead: float = setting(1e-3, "Adam's learning rate for the head", above=0)
    epochshead: int = setting(200, "epochs of the head's training", at_least=1, otherwise="twice --epochs")
    out_dim: int = setting(
        128,
        "width of the head's outputs",
        at_least=1,
        flags=("--out_dim",),
        acts=lambda command: (
            "with --losshead msewithhead: the true projections have their width"
            if command.losshead == "msewithhead"
            else None
        ),
    )
    title = "head"

    def check(self, n_views: int, num_queries: int) -> None:
        """UserError for combinations that cannot work."""
        if n_views < HEAD_LOSSES[self.losshead].min_views:
            raise UserError(
                f"--losshead {self.losshead} compares views: --n-views {n_views} is too few, give 2 or more"
            )
        if self.victimhead != (self.losshead == "msewithhead"):
            raise UserError("--victimhead True and --losshead msewithhead go together: give both or neither")
        if not n_views <= self.head_queries <= num_queries:
            raise UserError(f"--head-queries {self.head_queries} must be from --n-views {n_views} to {num_queries}")


def open_api(command: Command, encoder: SimCLREncoder, path: Path) -> Api:
    """What the victim sells: representations, or projections beside them. UserError where it cannot."""
    if not command.victimhead:
        return Api(encoder)
    if not encoder.has_head:
        raise UserError(f"{path} has no projection head: leave out --victimhead")
    if not {"truncate", "transform"}.isdisjoint((command.defence or "").split(",")):
        raise UserError(f"under --defence {command.defence} nobody can tell projections apart: leave out --victimhead")
    command.set(out_dim=encoder.out_dim)
    return Api(encoder, "both")
