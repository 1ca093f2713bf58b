"""What stealsimsiam.py and linsimsiam.py share: flags, and the name of what one makes and the other judges."""

import argparse
import dataclasses
from pathlib import Path

import options
from data_aug.datasets import DATASETS, check_name
from models import ARCHITECTURES
from options import Parser, count, positive
from training import Training
from utils import UserError

KIND = "stolen-simsiam"  # of the runs of stealsimsiam.py
LARGE = [name.removesuffix("-imagenet") for name in ARCHITECTURES if name.endswith("-imagenet")]


def add_picture_options(parser: Parser, **flags: str) -> None:
    """--data, the size of views, and one data set flag for each keyword: images of any size, ImageNet too."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "-data",
        "--data",
        metavar="DIR",
        type=Path,
        default=Path("datasets"),
        help="data root; ImageNet is there or in its folder imagenet, with train/ and val/",
    )
    group.add_argument("--size", metavar="N", type=count, default=224, help="side of the views, in pixels")
    for name, text in flags.items():
        group.add_argument(
            f"--{name}",
            metavar="NAME",
            type=picture_name,
            default="cifar10",
            help=f"{text}: imagenet, {', '.join(DATASETS)}, folder:PATH or npz:PATH",
        )


def picture_name(text: str) -> str:
    try:
        return check_name({"fmnist": "fashionmnist"}.get(text, text), "imagenet")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_large_arch(parser: argparse._ActionsContainer, *flags: str, text: str, default: str | None) -> None:
    """An architecture with the stem of ImageNet, without that in its name."""
    parser.add_argument(*flags, choices=LARGE, default=default, help=text)


def large_arch(args: argparse.Namespace) -> str | None:
    """The architecture that the command line insists on, if it does."""
    return f"{args.arch}-imagenet" if "arch" in args.given else None


def add_sgd_options(parser: Parser, batch_size: int) -> argparse._ArgumentGroup:
    """SGD as ImageNet scale has it: a rate for 256 images, a cosine from the first epoch on, LARS."""
    group = parser.add_argument_group("training")
    group.add_argument("-b", "--batch-size", metavar="N", type=count, default=batch_size, help="images in a batch")
    group.add_argument(
        "--lr", "--learning-rate", metavar="LR", type=positive, default=0.1, help="learning rate for 256 images"
    )
    group.add_argument("--momentum", metavar="M", type=float, default=0.9, help="momentum")
    group.add_argument(
        "--wd", "--weight-decay", metavar="WD", type=float, dest="weight_decay", default=0.0, help="weight decay"
    )
    group.add_argument("--lars", action="store_true", help="scale each layer's step by its weights")
    group.add_argument("--start-epoch", metavar="N", type=int, default=0, help="epoch to begin with")
    group.add_argument("-p", "--print-freq", metavar="N", type=count, default=10, help="steps between lines")
    group.add_argument("-e", "--evaluate", action="store_true", help="judge only, by the layer that was trained")
    group.add_argument("--log-every-n-steps", metavar="N", type=count, default=200, help="steps between loss events")
    group.add_argument("--logdir", metavar="DIR", type=Path, help="folder for tensorboard events (default: the run's)")
    return group


def sgd_training(args: argparse.Namespace) -> Training:
    """What the trainer takes of `add_sgd_options`: the rate is `lr` * batch size / 256."""
    lr = args.lr * args.batch_size / 256
    return dataclasses.replace(options.training(args), lr=lr, optimizer="lars" if args.lars else "sgd", flat_epochs=0)
