"""Which encoder is judged, and with which others it is compared: found by the settings of their runs."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks import ATTACKS, Attack, victims
from attacks.queries import QueryChoice
from data_aug.sizes import settle_size
from defenses import DEFENCES, DefenceChoice, resolve_defences
from files.address import is_address
from loss import LABEL_LOSSES, STEAL_LOSSES, TRAIN_LOSSES
from models import ARCHITECTURES, USUAL, SimCLREncoder, arch_name, build_encoder, read_checkpoint
from settings import Command, Settings, setting, settings_of
from training import finding
from training.objective import LossChoice
from training.run import CHECKPOINT, plain
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
    """The settings of another owner as flags by which an encoder is found, with these values of --modeltype.

    Only flags that are given count. They are never in force, so config.yml leaves them out.
    """

    def __init__(self, owner: Any, *kinds: str):
        self.kinds, self.title = kinds, owner.title
        self.settings = {}
        for name, declared in settings_of(owner).items():
            switch = declared.optional_value or declared.kind is bool
            flag = dataclasses.replace(declared, read=declared.parse, optional_value=switch, otherwise="any")
            self.settings[name] = dataclasses.field(default=declared.default, metadata={"setting": flag})

    def absent(self, command: Command) -> str | None:
        """Why the flags have no effect; None where they select an encoder."""
        return None if command.modeltype in self.kinds else f"with --modeltype {command.modeltype}"


def _sought() -> list[Sought]:
    both, copy = ("victim", "stolen"), ("stolen",)
    of_copies = (victims.CopyChoice, Trained, victims.Copy, victims.CopyInput, QueryChoice, Attack)
    of_copies = (*of_copies, DefenceChoice, *DEFENCES.values())
    return [
        *(Sought(owner, *both) for owner in (victims.VictimChoice, LossChoice, Watermarked)),
        *(Sought(owner, *copy) for owner in of_copies),
        *(Sought(loss, *(both if name in TRAIN_LOSSES else copy)) for name, loss in LOSSES.items()),
    ]


SOUGHT = _sought()  # every owner of settings that distinguish victims or copies
SOUGHT_NAMES = {name for owner in SOUGHT for name in owner.settings}
# Flags that runs of this kind have under another name.
_RENAMED = {"victim": {"epochstrain": "epochs", "lossvictim": "losstype"}, "stolen": {"arch": "archstolen"}}


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

Opened = tuple[Path, dict, SimCLREncoder]  # an encoder's file, its content, and the encoder


def open_judged(command: Command) -> Opened | tuple[None, dict, SimCLREncoder]:
    """The encoder to judge; no file for a random encoder. Settles the size of images by it.

    UserError when no encoder or several encoders fit the flags given, or the file contradicts them.
    """
    kind = command.modeltype
    if kind == "random":
        with seeded(command.seed):
            return None, {}, build_encoder(command.arch, input_size=settle_size(command))
    decide = (SOUGHT_NAMES | {"arch"}) - {"victim", "stolen", "head", "entropy"}
    named = {name: _RENAMED[kind].get(name, name) for name in command.given if name in decide}
    root = None
    if kind == "stolen" and command.victim and not command.stolen:
        root = finding.home_of(finding.find(command, "victim", "victim", {}), command.checkpoint_dir)
    path, checkpoint, encoder = open_found(command, kind, kind, named, root, command.given.get("arch"))
    settle_size(command, checkpoint.get("input_size"))
    if kind == "stolen" and command.victim and command.stolen and not command.fidelity:
        victim_of(command, path, checkpoint)  # is it this copy's?
    return path, checkpoint, encoder


def open_found(
    command: Command, flag: str, kind: str, named: Mapping[str, str], root: Path | None = None, arch: str | None = None
) -> Opened:
    """The encoder that --`flag` names, or that of a run of this kind below `root`, with the settings of given flags.

    named: those flags, with the setting of the run that each refers to. UserError where the file contradicts them.
    """
    wanted = {of_run: command.given[name] for name, of_run in named.items()}
    preferred = {name: command.given[name] for name in ("seed", "recipe", "size") if name in command.given}
    path = finding.find(command, flag, kind, wanted, root, preferred=preferred)
    checkpoint = _read_finished(path)
    if flag == "victim":
        _refuse_copy(checkpoint, path)
    elif checkpoint.get("kind") == "victim":
        raise UserError(f"{path} is a victim, not a copy: give --modeltype victim --victim {path}")
    finding.check_named(checkpoint, path, command, named)
    known = checkpoint.get("settings", {})
    for name, of_run in named.items():
        # A file from elsewhere says nothing; where a run of this project has no such setting, it was not in force.
        if "losstype" in known and known.get(of_run) is None and command.given[name]:
            spelled = command.parser.settings[name].flag
            raise UserError(f"{path} was made without {of_run} {plain(command.given[name])}: leave out {spelled}")
    return path, checkpoint, victims.encoder_of(checkpoint, path, arch)


def open_owner(command: Command, path: Path) -> tuple[SimCLREncoder, dict]:
    """A victim's encoder and its training settings. UserError for a copy or an unfinished victim.

    Settles the size of images by its file.
    """
    checkpoint = _read_finished(path)
    _refuse_copy(checkpoint, path)
    settle_size(command, checkpoint.get("input_size"))
    return victims.encoder_of(checkpoint, path), checkpoint.get("settings", {})


def _read_finished(path: Path) -> dict:
    checkpoint = read_checkpoint(path)
    finding.check_finished(checkpoint, path)
    return checkpoint


def _refuse_copy(checkpoint: Mapping, path: Path) -> None:
    if {"query_set", "query_digests", "stolen_from"} & checkpoint.keys():
        raise UserError(f"{path} is a copy, which may have been trained on the test images: give its victim")


# ---- the encoders that a copy is compared with -----------------------------------------------------------------------


def victim_of(command: Command, copy: Path, checkpoint: Mapping) -> tuple[Path, SimCLREncoder]:
    """The victim that a copy was stolen from, or a control is compared with. UserError where that is not known."""
    above = copy.parent.parent / CHECKPOINT  # true also after the folder of all runs was moved
    version, known = checkpoint.get("stolen_from"), checkpoint.get("settings", {}).get("victim")
    if is_address(known):  # its version is the API's: only who has the encoder can say that it was behind the API
        if not (command.fidelity and command.victim):
            raise UserError(f"{copy} was stolen from {known}: its owner gives --fidelity --victim PATH, others neither")
        version = None
    if command.victim:
        path = finding.find(command, "victim", "victim", {})
    elif (version or known) and (above.exists() or isinstance(known, str)):
        path = above if above.exists() else Path(known)
    else:  # a copy of the 2022 code
        raise UserError(f"{copy} does not say which victim it was stolen from: give --victim PATH")
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
            return "random", build_encoder(encoder.arch, input_size=encoder.input_size)
    settings = {"arch": encoder.arch, **read_checkpoint(victim).get("settings", {})}
    there = finding.runs_below(command.checkpoint_dir, "victim")
    path = finding.find(
        command,
        "independent",
        "victim",
        {name: settings[name] for name in ("dataset", "arch") if name in settings},
        besides=next((path for path in there if path.samefile(victim)), None),
        preferred={name: settings.get(name) for name in ("losstype", "epochs")},
    )
    return str(path), victims.encoder_of(_read_finished(path), path)
