"""Which encoder linear_eval.py judges, and compares with which others: found by the settings of their runs."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks import ATTACKS, Attack, victims
from attacks.queries import QueryChoice
from defenses import DEFENCES, DefenceChoice, resolve_defences
from loss import LABEL_LOSSES, STEAL_LOSSES, TRAIN_LOSSES
from models import ARCHITECTURES, USUAL, SimCLREncoder, arch_name, build_encoder, read_checkpoint
from settings import Command, Setting, Settings, setting, settings_of
from training import finding
from training.objective import LossChoice
from training.run import CHECKPOINT
from utils import UserError, seeded
from victim import version_of

LOSSES = {**STEAL_LOSSES, **TRAIN_LOSSES, **LABEL_LOSSES}
COPIES = (*ATTACKS, "stealhead", "steallabels")  # values of `attack` in the runs of copies


# ---- flags -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderChoice(Settings):
    """The kind of encoder that is judged."""

    modeltype: str = setting("stolen", "kind of encoder to judge", choices=("victim", "stolen", "random"))
    arch: str = setting(
        "resnet34",
        f"the judged encoder's architecture: {USUAL}",
        read=arch_name,
        flags=("-a", "--arch"),
        otherwise="any; resnet34 for a random encoder",
    )
    title = "encoder"


@dataclass(frozen=True)
class Watermarked(Settings):
    watermark: bool = setting(False, "the watermarked victim, or a copy of it")
    title = "encoder"


@dataclass(frozen=True)
class Trained(Settings):
    epochs: int = setting(100, "epochs that the copy was trained for", at_least=1)
    head: bool = setting(False, "the copy was made by stealhead.py: the same as --attack stealhead")
    title = "encoder"


class Sought:
    """The settings of another owner as flags by which an encoder is found: only flags that are given count.

    They are never in force, so config.yml leaves them out. `kinds` are the values of --modeltype with which they have
    an effect.
    """

    def __init__(self, owner: Any, *kinds: str):
        self.kinds, self.title = kinds, owner.title
        self.settings = {name: _as_flag(declared) for name, declared in settings_of(owner).items()}

    def absent(self, command: Command) -> str | None:
        """Why the flags have no effect; None where they select an encoder."""
        return None if command.modeltype in self.kinds else f"with --modeltype {command.modeltype}"


def _as_flag(declared: Setting) -> dataclasses.Field:
    """A field for the setting, parsed as its owner parses it."""
    switch = declared.optional_value or declared.kind is bool
    again = dataclasses.replace(declared, read=declared.parse, optional_value=switch, otherwise="any")
    return dataclasses.field(default=declared.default, metadata={"setting": again})


def _sought() -> list[Sought]:
    both, copy = ("victim", "stolen"), ("stolen",)
    of_copies = (victims.CopyChoice, Trained, victims.Copy, QueryChoice, Attack, DefenceChoice, *DEFENCES.values())
    return [
        *(Sought(owner, *both) for owner in (victims.VictimChoice, LossChoice, Watermarked)),
        *(Sought(owner, *copy) for owner in of_copies),
        *(Sought(loss, *(both if name in TRAIN_LOSSES else copy)) for name, loss in LOSSES.items()),
    ]


SOUGHT = _sought()  # every owner of settings that distinguish victims or copies
SOUGHT_NAMES = {name for owner in SOUGHT for name in owner.settings}
# Flags that a victim's run, or a copy's, has under another name.
_OF_VICTIM = {"epochstrain": "epochs", "lossvictim": "losstype"}
_OF_COPY = {"arch": "archstolen"}


def settle_search(command: Command) -> None:
    """Translate --head, --defence True and --entropy into the settings that runs have."""
    if command.head:
        if command.given.get("attack", "stealhead") != "stealhead":
            raise UserError(f"--head and --attack {command.attack} contradict each other: give one")
        command.given["attack"] = "stealhead"
    if {"defence", "entropy"} & command.given.keys():
        resolve_defences(command, command.losstype)
        command.given["defence"] = command.defence


# ---- the encoder -----------------------------------------------------------------------------------------------------


def open_judged(command: Command) -> tuple[Path | None, dict, SimCLREncoder]:
    """The encoder to judge, with its file and checkpoint; no file for a random encoder.

    UserError when no encoder or several encoders fit the flags given, or the file contradicts them.
    """
    kind = command.modeltype
    if kind == "random":
        with seeded(command.seed):
            return None, {}, build_encoder(command.arch)
    renamed = _OF_VICTIM if kind == "victim" else _OF_COPY
    decide = (SOUGHT_NAMES | {"arch"}) - {"victim", "stolen", "head", "entropy"}
    named = {name: renamed.get(name, name) for name in command.given if name in decide}
    wanted = {setting: command.given[name] for name, setting in named.items()}
    preferred = {name: command.given[name] for name in ("seed", "recipe") if name in command.given}
    root = None
    if kind == "stolen" and command.victim and not command.stolen:
        root = finding.home_of(finding.find(command, "victim", "victim", {}), command.checkpoint_dir)
    path = finding.find(command, kind, kind, wanted, root, preferred=preferred)
    checkpoint = read_checkpoint(path)
    finding.check_finished(checkpoint, path)
    finding.check_named(checkpoint, path, command, named)
    return path, checkpoint, victims.encoder_of(checkpoint, path, command.given.get("arch"))


def open_owner(path: Path) -> tuple[SimCLREncoder, dict]:
    """A victim's encoder and its training settings. UserError for a copy or an unfinished victim."""
    checkpoint = read_checkpoint(path)
    finding.check_finished(checkpoint, path)
    if "query_digests" in checkpoint:
        raise UserError(f"{path} is a copy and may have been trained on these test images: give its victim")
    return victims.encoder_of(checkpoint, path), checkpoint.get("settings", {})


# ---- the encoders that a copy is compared with -----------------------------------------------------------------------


def victim_of(command: Command, copy: Path, checkpoint: dict) -> tuple[Path, SimCLREncoder]:
    """The victim that a copy was stolen from. UserError when the file holds other weights, or none is known."""
    above = copy.parent.parent / CHECKPOINT  # true also after the folder of all runs was moved
    version = checkpoint.get("stolen_from")
    if version is None and not command.victim:  # a copy of the 2022 code
        raise UserError(f"{copy} does not say which victim it was stolen from: give --victim PATH")
    if command.victim:
        path = finding.find(command, "victim", "victim", {})
    else:
        path = above if above.exists() else Path(checkpoint["settings"]["victim"])
    encoder = victims.encoder_of(read_checkpoint(path), path)
    if version not in (None, version_of(encoder)):
        raise UserError(
            f"{path} is not the victim that this copy was stolen from, or was trained again: give --victim PATH"
        )
    return path, encoder


def independent_of(command: Command, victim: Path, encoder: SimCLREncoder) -> tuple[str, SimCLREncoder]:
    """The name of an encoder that is independent of the victim, and the encoder."""
    if command.independent == "random":
        if encoder.arch not in ARCHITECTURES:
            raise UserError(f"{victim} is a {encoder.arch}, which cannot be built here: give --independent PATH")
        with seeded(command.seed, "independent"):
            return "random", build_encoder(encoder.arch)
    settings = read_checkpoint(victim).get("settings", {})
    there = finding.runs_below(command.checkpoint_dir, "victim")
    path = finding.find(
        command,
        "independent",
        "victim",
        {name: settings.get(name) for name in ("dataset", "arch")},
        besides=next((path for path in there if path.samefile(victim)), None),
        preferred={name: settings.get(name) for name in ("losstype", "epochs")},
    )
    checkpoint = read_checkpoint(path)
    finding.check_finished(checkpoint, path)
    return str(path), victims.encoder_of(checkpoint, path)
