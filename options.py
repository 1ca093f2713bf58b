"""Flags that scripts share, presets for those not given, and the names and places of runs."""

import argparse
import dataclasses
import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import yaml

from data_aug.datasets import DATASETS, check_name
from loss import Loss
from models import ARCHITECTURES
from simclr import Training
from utils import Precision, UserError, choose_device, provenance


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, whose errors are one line."""

    def __init__(self, description: str):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message: str) -> None:
        self.exit(2, f"error: {self.prog}: {message} (see {self.prog} --help)\n")


def switch(text: str) -> bool:
    """`True` or `False` as the 2022 command lines spell them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def dataset_name(text: str) -> str:
    try:
        return check_name(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_switch(parser: argparse._ActionsContainer, flag: str, default: bool, text: str) -> None:
    """A flag that takes True, False or nothing after it, which means True."""
    parser.add_argument(flag, type=switch, nargs="?", const=True, default=default, metavar="True|False", help=text)


def add_data_options(parser: Parser, **flags: str) -> None:
    """-data, and one data set flag for each keyword: its name and its help."""
    group = parser.add_argument_group("data")
    group.add_argument("-data", "--data", metavar="DIR", type=Path, default=Path("datasets"), help="data root")
    for flag, text in flags.items():
        group.add_argument(
            f"--{flag.replace('_', '-')}",
            metavar="NAME",
            type=dataset_name,
            default="cifar10",
            help=f"{text}: {', '.join(DATASETS)} or folder:PATH",
        )


def add_run_options(parser: Parser) -> None:
    """Where and how a script runs; none of these changes what is computed."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--checkpoint-dir", metavar="DIR", type=Path, default=Path("checkpoints"), help="root of all runs"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--gpu-index", metavar="N", type=int, default=0, help="which CUDA device --device auto takes")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto is bf16 where the hardware multiplies it, else fp32",
    )
    group.add_argument("--fp16-precision", action="store_true", help="the same as --precision fp16")
    group.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    group.add_argument(
        "-j", "--workers", metavar="N", type=count, default=None, help="CPU threads (default: all cores)"
    )
    add_switch(group, "--resume", False, "go on with the run of the same name, or do nothing if it is finished")
    add_switch(group, "--clear", True, "delete the log, metrics and events of an earlier run of the same name")
    group.add_argument(
        "--recipe",
        choices=["standard", "released"],
        default="standard",
        help="released: the schedule, re-asking and evaluation protocol of the 2022 code",
    )


def add_training_options(parser: Parser, losses: Mapping[str, Loss], epochs: int) -> argparse._ArgumentGroup:
    """Loss and optimisation. Values not given come from the loss's preset."""
    presets = "; ".join(f"{name} {loss.batch_size}, {loss.lr:g}" for name, loss in losses.items())
    group = parser.add_argument_group("training", f"presets of batch size and learning rate: {presets}")
    group.add_argument("--losstype", choices=list(losses), default="infonce", help="loss")
    group.add_argument("--epochs", metavar="N", type=count, default=epochs, help="epochs")
    group.add_argument("-b", "--batch-size", metavar="N", type=count, help="images in a batch")
    group.add_argument("--lr", "--learning-rate", metavar="LR", type=positive, help="Adam's learning rate")
    group.add_argument("--wd", "--weight-decay", metavar="WD", type=float, dest="weight_decay", help="weight decay")
    group.add_argument("--temperature", metavar="T", type=positive, default=0.07, help="temperature of infonce")
    group.add_argument("--temperaturesn", metavar="T", type=positive, default=100.0, help="temperature of softnn")
    group.add_argument("--flat-epochs", metavar="N", type=int, default=10, help="epochs before the cosine sets in")
    group.add_argument("--log-every-n-steps", metavar="N", type=count, default=200, help="steps between loss events")
    group.add_argument("--logdir", metavar="DIR", type=Path, help="folder for tensorboard events (default: the run's)")
    return group


def add_arch(parser: argparse._ActionsContainer, *flags: str, text: str, default: str | None = "resnet34") -> None:
    parser.add_argument(*flags, choices=list(ARCHITECTURES), default=default, help=text)


def apply_presets(args: argparse.Namespace, losses: Mapping[str, Loss]) -> None:
    """Give batch size, learning rate and weight decay the loss's values where the user gave none."""
    preset = losses[args.losstype]
    args.presets = {name: getattr(preset, name) for name in ("batch_size", "lr", "weight_decay")}
    for name, value in args.presets.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def in_force(args: argparse.Namespace) -> str:
    """One line with the values of the training flags that act, presets filled in."""
    names = ("losstype", "epochs", "batch_size", "lr", "weight_decay", "n_views", "recipe", "seed")
    return "in force: " + ", ".join(f"{name} {getattr(args, name)}" for name in names)


def training(args: argparse.Namespace) -> Training:
    """What the trainer takes of the flags: those of the same names."""
    names = [field.name for field in dataclasses.fields(Training)]
    return Training(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def set_up(args: argparse.Namespace) -> tuple[torch.device, Precision]:
    """Device, precision and threads as asked for. UserError when they can't be had."""
    if args.fp16_precision:
        if args.precision not in ("auto", "fp16"):
            raise UserError(f"--fp16-precision and --precision {args.precision} contradict each other: give one")
        args.precision = "fp16"
    if args.workers:
        torch.set_num_threads(args.workers)
    device = choose_device(args.device, args.gpu_index)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    return device, Precision.choose(args.precision, device)


# ---- names and places of runs ----------------------------------------------------------------------------------------

# Where a run happens, not what it computes: never part of its name.
_ELSEWHERE = {"data", "checkpoint_dir", "device", "gpu_index", "workers", "resume", "clear", "logdir", "presets"}
_ELSEWHERE |= {"fp16_precision", "log_every_n_steps", "victim", "stolen"}


def run_name(
    kind: str, parser: Parser, args: argparse.Namespace, core: Mapping[str, str], implied: Collection = ()
) -> str:
    """A folder name that no run with other settings has.

    `core` maps settings to how they are spelt in every name, `implied` are those that the folder above stands for; any
    other setting appears when it is not at its default or its loss's preset.
    """
    parts = [kind, *(str(text).format(value=getattr(args, name)) for name, text in core.items())]
    defaults = {action.dest: action.default for action in parser._actions} | getattr(args, "presets", {})
    for name, value in sorted(vars(args).items()):
        if name not in {*core, *implied, *_ELSEWHERE} and value != defaults[name]:
            parts.append(f"{name.replace('_', '')}={value}")
    return "-".join(re.sub(r"[^\w.=+]", "_", part) for part in parts)


def home_of(checkpoint: Path, root: Path) -> Path:
    """The folder below which runs about an encoder go: its own run's, or one under `root` for a file from elsewhere."""
    if (checkpoint.parent / "config.yml").exists():
        return checkpoint.parent
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:8]
    return root / f"{checkpoint.name.split('.')[0]}-{digest}"


def configuration(kind: str, args: argparse.Namespace, device: torch.device, precision: Precision) -> dict:
    """What config.yml says: every value in force, commit, versions and device."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name != "presets"
    }
    return {"kind": kind, "settings": settings, "provenance": provenance(device, precision)}


def find_run(root: Path, kind: str, wanted: Mapping[str, object], preferred: Mapping[str, object]) -> Path:
    """The checkpoint of the one run below `root` of that kind with the settings wanted.

    Where several match, those with the settings preferred are taken, one setting after the other. UserError when none
    matches, naming the runs that are there, or when several are left, naming these.
    """
    runs = {}
    for config in sorted(root.rglob("config.yml")):
        content = _read_config(config)
        if content.get("kind") == kind and (config.parent / "checkpoint.pth.tar").exists():
            runs[config.parent / "checkpoint.pth.tar"] = content["settings"]
    matching = {
        path: settings
        for path, settings in runs.items()
        if all(settings.get(name) == value for name, value in wanted.items())
    }
    for name, value in preferred.items():
        narrower = {path: settings for path, settings in matching.items() if settings.get(name) == value}
        matching = narrower or matching
    asked = ", ".join(f"{name} {value}" for name, value in wanted.items())
    if not matching:
        there = ", ".join(map(str, runs)) or "none"
        raise UserError(f"no {kind} encoder with {asked} in {root}; there: {there}; or give --{kind} PATH")
    if len(matching) > 1:
        raise UserError(f"several {kind} encoders with {asked}: {', '.join(map(str, matching))}; give --{kind} PATH")
    return next(iter(matching))


def _read_config(path: Path) -> dict:
    """A run's config.yml; empty for a file of that name that is something else."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    return content if isinstance(content, dict) else {}


def check_finished(checkpoint: Mapping, path: Path) -> None:
    """UserError when a run that was interrupted wrote the checkpoint; files of the 2022 code count as finished."""
    wanted = checkpoint.get("settings", {}).get("epochs", checkpoint.get("epoch"))
    if checkpoint.get("epoch") != wanted:
        raise UserError(
            f"{path} stopped after epoch {checkpoint['epoch']} of {wanted}: run the command that made it with --resume"
        )


def as_row(row: Mapping) -> str:
    """One readable line of an evaluation's row."""
    names = (
        "model",
        "arch",
        "losstype",
        "downstream",
        "top1",
        "top5",
        "top1_converged",
        "knn",
        "test_images",
        "queries",
    )
    return "  ".join(f"{name} {row[name]}" for name in names if row.get(name) is not None)
