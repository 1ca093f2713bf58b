"""Flags that scripts share, presets for those not given, and the refusal of those that cannot act."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

import distributed
from data_aug.datasets import DATASETS, check_name
from defenses import DEFENCES, Defence, build_defences, parse_defences, settings_of
from loss import DISTANCES, TRAIN_LOSSES, Loss
from models import ARCHITECTURES
from stopping import first_by_launcher
from training import Training
from utils import Precision, UserError, choose_device


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, whose errors are one line."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str) -> None:
        self.exit(2, f"error: {self.prog}: {message} (see {self.prog} --help)\n" if first_by_launcher() else None)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As always, and `given` is the set of settings that the command line has."""
        unset = object()
        defaults = {action.dest: action.default for action in self._actions if action.dest != "help"}
        parsed = super().parse_args(args, argparse.Namespace(**dict.fromkeys(defaults, unset)))
        parsed.given = {name for name in defaults if getattr(parsed, name) is not unset}
        for name in defaults.keys() - parsed.given:
            setattr(parsed, name, defaults[name])
        return parsed

    def flag(self, name: str) -> str:
        """How the command line spells a setting."""
        return next(action.option_strings[-1] for action in self._actions if action.dest == name)


def switch(text: str) -> bool:
    """`True` or `False` as the 2022 command lines spell them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def switch_or_path(text: str) -> bool | Path:
    """True, False or a path; nothing, as the 2022 command lines had it, is False."""
    return switch(text) if text.lower() in ("true", "false") else Path(text) if text else False


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
    """-data, and one data set flag for each keyword: its name and its help. Single dashes are a habit of 2022."""
    group = parser.add_argument_group("data")
    group.add_argument("-data", "--data", metavar="DIR", type=Path, default=Path("datasets"), help="data root")
    for name, text in flags.items():
        flag = name.replace("_", "-")
        group.add_argument(
            *(f"-{flag}", f"--{flag}"),
            metavar="NAME",
            type=dataset_name,
            default="cifar10",
            help=f"{text}: {', '.join(DATASETS)}, folder:PATH or npz:PATH",
        )


def add_run_options(parser: Parser, recipe: bool = True, job: bool = False, streamed: bool = False) -> None:
    """Where and how a script runs; none of these changes what is computed.

    Some scripts run as one `job` of many processes; those whose images are `streamed` have processes that read them,
    and take a file to resume from.
    """
    group = parser.add_argument_group("run")
    group.add_argument(
        "--checkpoint-dir", metavar="DIR", type=Path, default=Path("checkpoints"), help="root of all runs"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--gpu",
        "--gpu-index",
        dest="gpu_index",
        metavar="N",
        type=int,
        default=0,
        help="which CUDA device --device auto takes",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto is bf16 where the hardware multiplies it, else fp32",
    )
    group.add_argument("--fp16-precision", action="store_true", help="the same as --precision fp16")
    group.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    resumed = "go on with the run of the same name, or do nothing if it is finished"
    if streamed:
        group.add_argument(
            "-j", "--workers", metavar="N", type=int, default=8, help="that read images, for each process of a job"
        )
        group.add_argument(
            "--resume",
            metavar="True|False|PATH",
            type=switch_or_path,
            nargs="?",
            const=True,
            default=False,
            help=f"{resumed}; or go on from that file",
        )
    else:
        group.add_argument(
            "-j", "--workers", metavar="N", type=count, default=None, help="CPU threads (default: all cores)"
        )
        add_switch(group, "--resume", False, resumed)
    add_switch(group, "--clear", True, "delete the log, metrics and events of an earlier run of the same name")
    if job:
        add_job_options(parser)
    if recipe:
        group.add_argument(
            "--recipe",
            choices=["standard", "released"],
            default="standard",
            help="released: the schedule, re-asking and evaluation protocol of the 2022 code",
        )


def add_job_options(parser: Parser) -> None:
    """Several processes as one job, as the scripts of 2022 were told of them; torchrun and srun need none of these."""
    group = parser.add_argument_group("several processes", "not needed under torchrun or srun")
    group.add_argument(
        "--world-size",
        metavar="N",
        type=int,
        default=-1,
        help="processes of the job, or machines with --multiprocessing-distributed",
    )
    group.add_argument("--rank", metavar="N", type=int, default=-1, help="which of these this is, from 0")
    group.add_argument("--dist-url", metavar="URL", help="tcp://ADDRESS:PORT where the one of rank 0 listens")
    group.add_argument(
        "--dist-backend",
        choices=["nccl", "gloo"],
        help="what tensors go through (default: nccl between GPUs, gloo between CPUs)",
    )
    group.add_argument(
        "--multiprocessing-distributed", action="store_true", help="start a process for each GPU of this machine"
    )


def add_training_options(
    parser: Parser, losses: Mapping[str, Loss], epochs: int, losstype: str | None = "infonce"
) -> argparse._ArgumentGroup:
    """Loss and optimisation, with the settings that one of the losses takes. Values not given come from its preset."""
    presets = "; ".join(f"{name} {loss.batch_size}, {loss.lr:g}, {loss.optimizer}" for name, loss in losses.items())
    group = parser.add_argument_group("training", f"presets of batch size, learning rate and optimizer: {presets}")
    group.add_argument("--losstype", choices=list(losses), default=losstype, help="loss")
    group.add_argument("--epochs", metavar="N", type=count, default=epochs, help="epochs")
    group.add_argument("-b", "--batch-size", metavar="N", type=count, help="images in a batch")
    group.add_argument("--lr", "--learning-rate", metavar="LR", type=positive, help="learning rate")
    group.add_argument("--wd", "--weight-decay", metavar="WD", type=float, dest="weight_decay", help="weight decay")
    group.add_argument("--optimizer", choices=["adam", "sgd", "lars"], help="optimizer")
    group.add_argument("--momentum", metavar="M", type=float, help="momentum of sgd and lars (default: 0.9)")
    taken = {setting for loss in losses.values() for setting in loss.takes.values()}
    if "temperature" in taken:
        group.add_argument(
            "--temperature", metavar="T", type=positive, help="temperature of contrastive losses (default: 0.07)"
        )
    if "temperaturesn" in taken:
        group.add_argument(
            "--temperaturesn", "--tempsn", metavar="T", type=positive, default=100.0, help="temperature of softnn"
        )
    if "distance" in taken:
        group.add_argument(
            "--distance", choices=list(DISTANCES), default="l2", help="what stolenencoder measures answers by"
        )
        group.add_argument(
            "--lambda-aug", metavar="L", type=float, default=9.0, help="weight of stolenencoder's augmentations"
        )
    group.add_argument("--flat-epochs", metavar="N", type=int, default=10, help="epochs before the cosine sets in")
    group.add_argument("--log-every-n-steps", metavar="N", type=count, default=200, help="steps between loss events")
    group.add_argument("--logdir", metavar="DIR", type=Path, help="folder for tensorboard events (default: the run's)")
    return group


def add_victim_options(parser: Parser, *arch_flags: str, losses: bool = True) -> None:
    """Which victim: its file, or what it was trained with."""
    group = parser.add_argument_group("victim")
    group.add_argument("--victim", metavar="PATH", type=Path, help="its checkpoint, or run (default: by flags)")
    add_arch(group, *arch_flags, text="the victim's architecture")
    group.add_argument("--epochstrain", metavar="N", type=count, default=200, help="epochs it was trained for")
    if losses:
        group.add_argument("--lossvictim", choices=list(TRAIN_LOSSES), default="infonce", help="loss it was trained by")


def add_query_options(parser: Parser, num_queries: int | None = 9000) -> argparse._ArgumentGroup:
    """Which images are queried, and how many queries."""
    group = parser.add_argument_group("queries")
    group.add_argument("--num_queries", metavar="N", type=count, default=num_queries, help="budget of the whole attack")
    group.add_argument(
        "--query-order", choices=["first", "random"], default="first", help="the first images, or random ones by seed"
    )
    add_switch(group, "--force", False, "query the train split even if it is the victim's own data set")
    return group


def add_arch(
    parser: argparse._ActionsContainer, *flags: str, text: str, default: str | None = "resnet34", name: str = "arch"
) -> None:
    parser.add_argument(*flags, dest=name, choices=list(ARCHITECTURES), default=default, help=text)


def defence_list(text: str) -> str | bool | None:
    """True, None for False, or a list of defences such as `noise,rounding`, brought into one spelling."""
    if text.lower() in ("true", "false"):
        return switch(text) or None
    try:
        return ",".join(parse_defences(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_defence_flag(group: argparse._ActionsContainer, text: str) -> None:
    group.add_argument(
        "--defence",
        metavar="True|False|LIST",
        type=defence_list,
        nargs="?",
        const=True,
        default=None,
        help=f"{text}: {', '.join(DEFENCES)}. True: poisoning of attacks by {', '.join(sorted(POISONED))}, noise for "
        f"others, as in the 2022 code",
    )
    add_switch(group, "--entropy", False, "the same as entropy at the end of --defence")


def add_defence_options(parser: Parser) -> None:
    """Which defences act on the victim's answers, and the settings of each."""
    group = parser.add_argument_group("defence")
    add_defence_flag(group, "what the owner does to answers, in this order, such as noise,rounding")
    for name, one in defence_settings().items():
        flag, text = f"--{name.replace('_', '-')}", one.metadata["help"]
        if isinstance(one.default, bool):
            add_switch(group, flag, one.default, text)
        else:
            choices = one.metadata["choices"]
            group.add_argument(
                flag,
                **{"choices": choices} if choices else {"metavar": "N", "type": type(one.default)},
                default=one.default,
                help=text,
            )
    group.add_argument("--secret", metavar="N", type=int, help="seed of the owner's draws (default: --seed)")


def defence_settings() -> dict[str, dataclasses.Field]:
    """The settings of all defences; one that several have is one flag."""
    return {name: one for defence in DEFENCES.values() for name, one in settings_of(defence).items()}


# Attacks that compare views of an image are poisoned by --defence True; in 2022 these were infonce and softnn.
POISONED = {"infonce", "softnn", "contsteal", "rda"}


def resolve_defence(args: argparse.Namespace, losstype: str) -> None:
    """Bring --defence and --entropy to a list of names in one string, or None for no defence."""
    names = ("poisoning" if losstype in POISONED else "noise") if args.defence is True else args.defence
    listed = names.split(",") if names else []
    if args.entropy and "entropy" not in listed:
        listed.append("entropy")
    args.defence = ",".join(listed) or None


def idle_without_defence(args: argparse.Namespace) -> dict[str, str]:
    """Settings of defences that are not in force, for `refuse_idle`."""
    names = args.defence.split(",") if args.defence else []
    used = {setting for name in names for setting in settings_of(DEFENCES[name])}
    reason = f"with --defence {args.defence}" if args.defence else "without --defence"
    return dict.fromkeys(defence_settings().keys() - used | (set() if names else {"secret"}), reason)


def defences(args: argparse.Namespace) -> list[Defence]:
    """The defences that the flags name, new ones that have seen nothing."""
    if not args.defence:
        return []
    secret = args.seed if args.secret is None else args.secret
    return build_defences(args.defence.split(","), vars(args), secret)


def fill(args: argparse.Namespace, *layers: Mapping[str, object]) -> None:
    """Give settings that the command line left open the value of the first layer that has one."""
    for layer in layers:
        for name, value in layer.items():
            if getattr(args, name, value) is None:
                setattr(args, name, value)
            args.presets = {name: value, **getattr(args, "presets", {})}


def of_loss(loss: Loss) -> dict[str, object]:
    """The layer of a loss's presets."""
    return {name: getattr(loss, name) for name in ("batch_size", "lr", "weight_decay", "optimizer", "momentum")}


def refuse_idle(parser: Parser, args: argparse.Namespace, idle: Mapping[str, str | None]) -> None:
    """UserError for a flag that the command line has and that cannot act; `idle` says for which settings and why."""
    for name, reason in idle.items():
        if reason and name in args.given:
            raise UserError(f"{parser.flag(name)} has no effect {reason}: leave it out")


def idle_with(loss: Loss, args: argparse.Namespace) -> dict[str, str]:
    """Settings that only other losses or another optimizer than those chosen take, for `refuse_idle`."""
    optional = ("temperature", "temperaturesn", "lambda_aug", "distance")
    idle = {name: f"with the loss {args.losstype}" for name in optional if name not in loss.takes.values()}
    return idle if args.optimizer != "adam" else {**idle, "momentum": f"with --optimizer {args.optimizer}"}


def in_force(args: argparse.Namespace) -> str:
    """One line with the values of the training flags that act, presets filled in."""
    names = (
        *("attack", "losstype", "epochs", "batch_size", "optimizer", "lr", "weight_decay", "temperature"),
        *("n_views", "queryaug", "prototype", "useaug", "copy_views", "defence", "recipe", "seed"),
    )
    return "in force: " + ", ".join(f"{name} {getattr(args, name)}" for name in names if hasattr(args, name))


def training(args: argparse.Namespace) -> Training:
    """What the trainer takes of the flags: those of the same names."""
    names = [field.name for field in dataclasses.fields(Training)]
    values = {name: getattr(args, name, None) for name in names}
    return Training(**{name: value for name, value in values.items() if value is not None})


def set_up(args: argparse.Namespace) -> Precision:
    """Device and precision as asked for; joins the other processes of a job; sets the threads.

    UserError when they can't be had, or when a script that is one process was started as several.
    """
    place = distributed.set_up(args) if hasattr(args, "world_size") else distributed.refuse()
    if args.fp16_precision:
        if args.precision not in ("auto", "fp16"):
            raise UserError(f"--fp16-precision and --precision {args.precision} contradict each other: give one")
        args.precision = "fp16"
    if "gpu_index" in args.given and args.device != "auto":
        raise UserError(f"--gpu-index has no effect with --device {args.device}: leave it out")
    if args.workers and not hasattr(args, "print_freq"):  # where images are streamed these are processes
        torch.set_num_threads(args.workers)
    if place and "gpu_index" in args.given:
        raise UserError(f"--gpu-index has no effect with {place.processes} processes, each takes its own: leave it out")
    if place and args.device == "auto" and torch.cuda.is_available():
        # One GPU for each process of this machine; a scheduler may show each process its own only.
        args.gpu_index = place.local_rank % torch.cuda.device_count()
    device = choose_device(args.device, args.gpu_index)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        if device.index is not None:
            torch.cuda.set_device(device)
    return Precision.choose(args.precision, device)
