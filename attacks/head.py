"""The attack that re-creates the victim's projection head first: its settings, its victim's API, and its copy."""

from dataclasses import dataclass

from torch import Tensor

from attacks.victims import CopyInput, Opened, behind_api
from loss import HEAD_LOSSES, STEAL_LOSSES
from models import USUAL, SimCLREncoder, SimSiamHeads, arch_name, build_copy
from settings import Command, Settings, setting
from training.objective import Loss
from utils import UserError, seeded

# The copy sees what was sent, so losses about fresh augmentations are left out; so are losses of histograms, because
# projections may be negative.
LOSSES = {name: loss for name, loss in STEAL_LOSSES.items() if not (loss.plain_first or loss.nonnegative)}


@dataclass(frozen=True)
class Head(Settings):
    """The head to re-create, its training, and the copy's architecture."""

    archstolen: str = setting(
        "resnet34", f"the copy's architecture: {USUAL}", read=arch_name, flags=("-a", "--arch", "--archstolen")
    )
    victimhead: bool = setting(False, "the API also returns projections, for --losshead msewithhead", acts=behind_api)
    head_queries: int = setting(0, "queries for the head, part of the budget", at_least=1, otherwise="half")
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


def output_of(command: Command, opened: Opened) -> str:
    """What the victim's API returns: representations, or projections beside them. UserError where it has no such."""
    if not command.victimhead:
        return "representations"
    if not opened.encoder.has_head:
        raise UserError(f"{opened.source} has no projection head: leave out --victimhead")
    if not {"truncate", "transform"}.isdisjoint((command.defence or "").split(",")):
        raise UserError(f"under --defence {command.defence} nobody can tell projections apart: leave out --victimhead")
    command.set(out_dim=opened.encoder.out_dim)
    return "both"


def build_head_copy(command: Command, queried: Tensor) -> tuple[SimCLREncoder, SimSiamHeads | None]:
    """The untrained copy, and heads for a loss that compares their outputs."""
    normalize = command[CopyInput].normalisation(queried)
    with seeded(command.seed, "copy"):
        model = build_copy(command.archstolen, command.out_dim, normalize, head=True, input_size=command.size)
        return model, SimSiamHeads(command.out_dim, command.out_dim) if command.all(Loss)[0].predictor else None
