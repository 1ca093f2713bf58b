"""Which victim and which copy: their flags, the encoders that these name, and the runs below an encoder."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from attacks import OWN, Attack
from attacks.elsewhere import Elsewhere, FunctionVictim
from attacks.queries import QueryChoice, choose_queries
from attacks.remote import Remote, RemoteVictim, read_keys
from data_aug.datasets import DATASET_NAMES, channel_statistics, check_name, same_source
from data_aug.images import Stored
from data_aug.sizes import settle_size
from files.address import Address, asked_elsewhere, read_place
from loss import TRAIN_LOSSES
from models import ARCHITECTURES, LARGE, USUAL, SimCLREncoder, arch_name, read_checkpoint
from models.checkpoint import encoder_from_checkpoint
from models.simclr import Normalize
from settings import Command, Settings, setting
from training.finding import check_finished, check_named, find, home_of, locate, say_next
from training.recipe import Recipe
from training.record import Record
from training.released import released_settings
from training.represent import represent
from training.run import NAME_BYTES, Run, open_run
from utils import Precision, UserError
from victim import version_of

# Flags that name a copy's victim, and the settings of the victim's run that they stand for.
VICTIM_SETTINGS = {"dataset": "dataset", "arch": "arch", "epochstrain": "epochs", "lossvictim": "losstype"}
PROJECTION = 128  # width of the projections of an attacker's own SimCLR
OTHER = "other"  # the data set of a victim from elsewhere, where it is none that an attacker has


def behind_api(command: Command) -> str | None:
    """Why a setting of the victim has no effect, where it is only asked; None where its file is here."""
    return f"with --victim {command.victim}, which gives answers alone" if asked_elsewhere(command) else None


@dataclass(frozen=True)
class VictimChoice(Settings):
    """Which victim: its checkpoint, its run, its training settings, or the address where it answers."""

    dataset: str = setting(
        "cifar10",
        f"data set that the victim was trained on: {DATASET_NAMES}, or {OTHER} for one that is not here",
        read=lambda text: check_name(text, OTHER),
        flags=("-dataset", "--dataset"),
        otherwise="the victim's, else cifar10",
        title="data",
    )
    victim: Path | Address | None = setting(
        None,
        "the victim's checkpoint, run folder, run name, or number in the list of victims that fit the flags "
        "(default: found by the flags); where only answers are needed also http://HOST:PORT or python:FILE.py:FUNCTION",
        read=read_place,
        named=False,
    )
    arch: str = setting(
        "resnet34",
        f"the victim's architecture: {USUAL}",
        read=arch_name,
        flags=("-a", "--arch"),
        otherwise="the victim's",
        acts=behind_api,
    )
    epochstrain: int = setting(
        200, "epochs the victim was trained for", at_least=0, otherwise="the victim's", acts=behind_api
    )
    lossvictim: str = setting(
        "infonce",
        "loss the victim was trained with",
        choices=TRAIN_LOSSES,
        otherwise="the victim's",
        acts=behind_api,
    )
    title = "victim"


@dataclass(frozen=True)
class CopyChoice(Settings):
    """Which copy. linear_eval.py also finds it by settings of the attack, the loss, the defence and `Copy`."""

    stolen: Path | None = setting(
        None,
        "the copy's checkpoint, run folder, run name, or number in the list of copies that fit the flags "
        "(default: found by the flags)",
        named=False,
    )
    title = "encoder"


@dataclass(frozen=True)
class Copy(Settings):
    """The copy's architecture and head, and what the victim's API returns."""

    archstolen: str = setting(
        "resnet34", f"the copy's architecture: {USUAL}", read=arch_name, otherwise="the attack's, else resnet34"
    )
    victimhead: bool = setting(
        False, "the victim's API returns projections instead of representations", acts=behind_api
    )
    stolenhead: bool = setting(False, "give the copy a head, whose outputs match the answers")
    watermark: bool = setting(False, "steal a watermarked victim, and test the copy for the watermark", acts=behind_api)
    title = "copy"


@dataclass(frozen=True)
class CopyInput(Settings):
    """How the copy sees images. The victim's own normalisation is not the attacker's to know."""

    copy_normalize: str = setting(
        "queries",
        "by what the copy normalises images: the channel statistics of the images queried, or nothing",
        choices=("queries", "none"),
        otherwise="the attack's, else queries; with --recipe released none",
        earlier="as the victim",
    )
    title = "copy"

    def normalisation(self, queried: Tensor) -> Normalize | None:
        """Mean and deviation of each channel, for the copy; queried: uint8 images (N, 3, H, W)."""
        return channel_statistics(queried) if self.copy_normalize == "queries" else None


def encoder_of(checkpoint: Mapping, path: Path, arch: str | None = None) -> SimCLREncoder:
    """The encoder of a checkpoint. For a file from elsewhere, prints which layout was recognised."""
    if arch in LARGE and released_settings(path, "stolen").get("losstype") == "symmetrized":
        arch = f"{arch}-imagenet"  # the name has no stem
    encoder = encoder_from_checkpoint(checkpoint, str(path), arch)
    if "settings" not in checkpoint:
        print(f"{path}: {encoder.report}")
    return encoder


@dataclass(frozen=True)
class Opened:
    """The victim that a command line names: a file with its encoder, or what is asked elsewhere.

    home: parent folder of the runs about it. source: its path or address. checkpoint and encoder: the file's; of a
    victim elsewhere empty and None, and that victim is `asked`.
    """

    home: Path
    source: Path | Address
    checkpoint: Mapping = field(default_factory=dict)
    encoder: SimCLREncoder | None = None
    asked: Elsewhere | None = None

    @property
    def version(self) -> str:
        """A name for the weights, or for what the API says that answers."""
        return version_of(self.encoder) if self.encoder else self.asked.version


def reach(command: Command) -> Opened:
    """The victim at an address. Its images have the size that it wants, where the command line has no --size."""
    address = command.victim
    if address.startswith("http"):
        attacks = command.checkpoint_dir if command.resume else None
        keys = read_keys(command.api_key_file, address)
        asked = RemoteVictim(address, keys, max_wait=command.max_wait, attacks=attacks)
    else:
        asked = FunctionVictim(address)
    accounts = max((attack.sybils for attack in command.all(Attack)), default=1)
    if asked.accounts is not None and asked.accounts < accounts:
        raise UserError(f"--sybils {accounts} need a key each, {command.api_key_file} has {asked.accounts}: add lines")
    print(f"victim: {address}, {asked.words()}")
    settle_size(command, asked.input_size and asked.input_size[1])
    name = re.sub(r"[^\w.=+-]", "_", asked.label)[: NAME_BYTES // 2]
    return Opened(command.checkpoint_dir / f"{name}-{asked.version[:8]}", address, asked=asked)


def open_elsewhere(command: Command) -> Opened:
    """As `reach`. Settles that the victim's data set is another than the attacker's, unless --dataset is given."""
    opened = reach(command)
    command.suffix = command.given.get("dataset", "")  # of a victim whose file is here the folder above says that
    command.set(dataset=command.suffix or OTHER)
    return opened


def open_victim(command: Command, **wanted: Any) -> Opened:
    """The victim that the flags given name.

    Settles the data set, architecture, epochs, loss and size by the file. `wanted` are further settings of its run.
    UserError when flags and file differ.
    """
    if asked_elsewhere(command) and command.all(Remote):
        return open_elsewhere(command)
    flags = {name: setting for name, setting in VICTIM_SETTINGS.items() if name in command.given}
    flags |= {"watermark": "watermark"} if "watermark" in command.given else {}
    wanted = {**{setting: command.given[name] for name, setting in flags.items()}, **wanted}
    preferred = {name: command.given[name] for name in ("seed", "size") if name in command.given}
    path = find(command, "victim", "victim", wanted, preferred=preferred)
    checkpoint = read_checkpoint(path)
    check_finished(checkpoint, path)
    check_named(
        checkpoint, path, command, {name: setting for name, setting in VICTIM_SETTINGS.items() if name != "arch"}
    )
    encoder = encoder_of(checkpoint, path, command.given.get("arch"))
    known = checkpoint.get("settings") or released_settings(path, "victim")
    settled = {name: known[setting] for name, setting in VICTIM_SETTINGS.items() if setting in known}
    unknown = {name: command.given.get(name) for name in ("epochstrain", "lossvictim")}
    command.set(**{**unknown, **settled, "arch": encoder.arch})
    settle_size(command, checkpoint.get("input_size"))
    return Opened(home_of(path, command.checkpoint_dir), path, checkpoint, encoder)


def open_copy(command: Command, opened: Opened, record: Record, precision: Precision) -> Run:
    """The run of an attack, below its victim's run; prints what is stolen and how."""
    run = open_run(command, opened.home, precision, victim=str(opened.source))
    record.stolen_from = opened.version if command.attack != OWN else None
    record.drawn_for = "copy"
    run.record = record
    queried, split = record.query_set, record.query_set["split"]
    print(f"copy: {command.archstolen}, {queried['images']} images of {queried['dataset']} ({split}), {precision}")
    print(command.line())
    return run


def own_encoder(command: Command) -> SimCLREncoder | None:
    """The attacker's own encoder, of --query-space; None without it."""
    if command.query_space is None:
        return None
    path = locate(command.query_space, command.checkpoint_dir)
    return encoder_of(read_checkpoint(path), path)


def choose(
    command: Command,
    count: int,
    untrained: Callable[[Tensor], SimCLREncoder],
    precision: Precision,
    everything: bool = False,
) -> tuple[Stored, Tensor, Record]:
    """`choose_queries` by the flags. The space of k-centre is --query-space or the copy `untrained(images)`."""

    def features(images: Tensor) -> Tensor:
        encoder = own_encoder(command) or untrained(images)
        return represent(encoder.to(precision.device), images, precision)

    choice, attacks = command[QueryChoice], command.all(Attack)
    only_views = any(attack.sends_views and not attack.useaug for attack in attacks)
    how = {"size": command.size, "wide": only_views and command[Recipe].recipe == "released"}
    return choose_queries(choice, command.dataset, command.data, count, command.seed, everything, features, **how)


def open_evaluation(command: Command, path: Path, encoder: SimCLREncoder, precision: Precision, **more: Any) -> Run:
    """The run of a script that judges an encoder, below the encoder's run; `more` are further settings of it."""
    home = home_of(path, command.checkpoint_dir)
    return open_run(command, home, precision, weights=version_of(encoder), **more)


def say_judge(command: Command, copy: Path) -> None:
    """As `say_next`: judge this copy on its victim's data set, or where that is not here, on the data set queried."""
    dataset = command.datasetsteal if command.dataset == OTHER else command.dataset
    say_next(command, "linear_eval.py", "--stolen", copy, "--dataset-test", dataset)


def say_steal(
    command: Command, victim: Path | Address, encoder: SimCLREncoder | None, dataset: str, *words: str
) -> None:
    """As `say_next`: steal this victim with queries from another data set than its training data."""
    another = "textures" if dataset == "shapes" else "cifar10" if same_source(dataset, "svhn") else "svhn"
    queries = ("--datasetsteal", another)
    copy = ("--archstolen", encoder.arch) if encoder and encoder.arch in ARCHITECTURES else ()
    key = ("--api-key-file", command.api_key_file) if "api_key_file" in command.given else ()
    say_next(command, "steal.py", "--victim", victim, *key, *copy, *queries, "--losstype", "mse", *words)
