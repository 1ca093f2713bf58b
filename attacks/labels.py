"""Stealing a classifier through its answers: settings, and the victim's linear layer."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from attacks.victims import CopyInput
from data_aug.datasets import DATASET_NAMES, check_name
from models import USUAL, SimCLREncoder, arch_name, build_encoder, read_checkpoint
from settings import Command, Settings, setting
from training import finding
from utils import UserError, seeded

MODES = {"direct": "direct", "standard": "direct", "knockoff": "knockoff"}  # standard is the 2022 name of direct


def _of_an_encoder(command: Command) -> str | None:
    return "with --victimtype supervised" if command.victimtype == "supervised" else None


@dataclass(frozen=True)
class Labels(Settings):
    """Which classifier is stolen, what its API returns, and the recipe."""

    victimtype: str = setting("simclr", "kind of victim", choices=("simclr", "supervised"), title="victim")
    classifier: Path | None = setting(
        None,
        "run or checkpoint of linear_eval.py with the victim's linear layer (default: found by the flags)",
        named=False,
        acts=_of_an_encoder,
        title="victim",
    )
    dataset_test: str = setting(
        "cifar10",
        f"downstream data set, which the classifier is for (with --victimtype supervised: --dataset): {DATASET_NAMES}",
        read=check_name,
        flags=("-dataset-test", "--dataset-test"),
        title="data",
    )
    archstolen: str = setting(
        "resnet18", f"the copy's architecture: {USUAL}", read=arch_name, flags=("-a", "--arch", "--archstolen")
    )
    mode: str = setting("direct", "recipe; another spelling of --losstype", choices=MODES)
    modeloutput: str = setting(
        "labels", "what the API returns", choices=("labels", "logits"), otherwise="labels; knockoff: logits"
    )
    num_test: int | None = setting(None, "test on the last N images only", at_least=1, title="data")
    title = "labels"


def open_classifier(command: Command, victim: Path, encoder: SimCLREncoder) -> nn.Linear:
    """The victim's linear layer: the last layer of a supervised network, else the layer that linear_eval.py trained."""
    if command.victimtype == "supervised":
        return encoder.backbone.fc
    wanted = {"modeltype": "victim", "dataset_test": command.dataset_test, "probe": "linear", "finetune": False}
    home = finding.home_of(victim, command.checkpoint_dir)
    preferred = {"recipe": "standard", "seed": command.seed, "size": command.size}
    try:
        path = finding.find(command, "classifier", "linear", wanted, home, preferred=preferred)
    except UserError as error:
        judge = f"python linear_eval.py --modeltype victim --victim {victim} --dataset-test {command.dataset_test}"
        raise UserError(f"{error} (`{judge}` trains one)") from None
    state = read_checkpoint(path).get("state_dict", {})
    weight = state.get("fc.weight")
    if weight is None or weight.shape[1] != encoder.dim or "fc.bias" not in state:
        raise UserError(f"{path} has no linear layer for representations of {encoder.dim} numbers")
    layer = nn.Linear(*reversed(weight.shape))
    layer.load_state_dict({"weight": weight, "bias": state["fc.bias"]})
    return layer


def build_classifier_copy(command: Command, classes: int, queried: Tensor) -> SimCLREncoder:
    """The untrained copy, with a linear layer on top."""
    with seeded(command.seed, "copy"):
        normalize = command[CopyInput].normalisation(queried)
        return build_encoder(command.archstolen, classes, normalize, "linear", command.size)
