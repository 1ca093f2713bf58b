"""Linear evaluation at ImageNet scale: which encoder, which images, and the linear layer that is trained on them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data_aug.datasets import DATASET_NAMES, check_labelled
from data_aug.images import Pictures, Streamed, Views, open_pictures, picture_name
from evaluation.encoders import Opened, open_found
from evaluation.probes import top1_top5
from evaluation.test_images import unqueried_positions
from loss import TRAIN_LOSSES
from models import LARGE, SimCLREncoder, large_arch_name
from settings import Command, Settings, setting
from simclr import SimCLR
from training import finding
from training.recipe import Recipe
from training.record import Record
from training.represent import represent
from training.run import Run
from utils import Precision, UserError, seeded

# Flags that select a copy, with the setting of its run that each refers to.
OF_COPY = {
    **{"datasetsteal": "datasetsteal", "losstype": "losstype", "num_queries": "num_queries"},
    **{"epochssteal": "epochs", "arch": "archstolen"},
}


@dataclass(frozen=True)
class LargeChoice(Settings):
    """The encoder that is judged, and the images."""

    dataset: str = setting(
        "cifar10",
        f"downstream data set: imagenet, {DATASET_NAMES}",
        read=picture_name,
        flags=("-dataset", "--dataset"),
        title="data",
    )
    augment: bool = setting(
        False, "train on new random crops in every epoch, instead of centre crops represented once", title="data"
    )
    modeltype: str = setting("victim", "kind of encoder to judge", choices=("victim", "stolen"))
    victim: Path | None = setting(
        None,
        "the victim's checkpoint, run folder or run name, in any layout of docs/checkpoints.md",
        flags=("--victim", "--pretrained"),
        named=False,
    )
    arch: str = setting(
        "resnet50",
        f"the judged encoder's architecture: {', '.join(LARGE)}",
        read=large_arch_name,
        flags=("-a", "--arch"),
        otherwise="its file's, else resnet50",
    )
    epochstrain: int | None = setting(
        None,
        "refuse a victim that was trained for another number of epochs",
        at_least=1,
        acts=lambda command: None if command.victim else "without --pretrained",
    )
    epochssteal: int = setting(
        100,
        "epochs that the copy was trained for",
        at_least=1,
        otherwise="any",
        acts=lambda command: None if command.modeltype == "stolen" else "with --modeltype victim",
    )
    title = "encoder"


def open_large(command: Command) -> Opened:
    """The encoder to judge, with its file and checkpoint. UserError when none is named, or none fits the flags."""
    root, stolen = command.checkpoint_dir, command.modeltype == "stolen"
    if not stolen and command.victim is None:
        raise UserError("no victim: give --pretrained PATH of its checkpoint (or --modeltype stolen)")
    if stolen and command.victim and not command.stolen:
        root = finding.home_of(finding.locate(command.victim, root), root)
    flag, kind = ("stolen", "stolen-simsiam") if stolen else ("victim", "victim")
    named = {name: of_run for name, of_run in OF_COPY.items() if stolen and name in command.given}
    arch = f"{command.arch}-imagenet" if "arch" in command.given else None
    path, checkpoint, encoder = open_found(command, flag, kind, named, root, arch)
    if not stolen and command.epochstrain not in (None, checkpoint.get("epoch")):
        epochs = checkpoint.get("epoch", "an unknown number of")
        raise UserError(f"{path} was trained for {epochs} epochs, not {command.epochstrain}: leave out --epochstrain")
    return path, checkpoint, encoder


def open_labelled(name: str, root: Path, split: str) -> Pictures:
    """The pictures of a split. UserError where any has no label."""
    pictures = open_pictures(name, root, split)
    check_labelled(pictures.labels, name, split)
    return pictures


def train_layer(
    command: Command, encoder: SimCLREncoder, pictures: Pictures, classes: int, recipe: Recipe, run: Run
) -> nn.Linear:
    """The linear layer, trained on centre crops represented once, or on new random crops in every epoch.

    With --evaluate, the layer of the run's checkpoint. UserError where there is none.
    """
    if command.evaluate and not isinstance(run.resume, Path):
        run.resume = run.checkpoint
        if not run.checkpoint.exists():
            raise UserError(f"no linear layer at {run.checkpoint} to --evaluate: train it first, without that flag")
    with seeded(command.seed, "probe"):
        layer = nn.Linear(encoder.dim, classes)
        nn.init.normal_(layer.weight, std=0.01)  # as in the 2022 code, and in MoCo's before it
        nn.init.zeros_(layer.bias)
    trainer = SimCLR(layer, TRAIN_LOSSES["supervised"], recipe, run)
    trainer.first_epoch = max(trainer.first_epoch, recipe.epochs if command.evaluate else command.start_epoch)
    view = "crop" if command.augment else "center"
    views = Views(pictures, view, command.size, command.seed, "probe view")
    images = Streamed(views, torch.arange(len(pictures)), command.workers)
    if command.augment:
        trainer.train_probe(images, pictures.labels, encoder)
    elif trainer.first_epoch < recipe.epochs:
        trainer.train_probe(represent_centres(encoder, images, run.precision), pictures.labels)
    return layer.eval()


def represent_centres(encoder: SimCLREncoder, images: Streamed, precision: Precision) -> torch.Tensor:
    """Representations (N, D) in float16, because the images are many."""
    return represent(encoder, images, precision, batch_size=256, dtype=torch.float16)


@torch.no_grad()
def layer_scores(
    command: Command, encoder: SimCLREncoder, layer: nn.Linear, pictures: Pictures, record: Record, precision: Precision
) -> tuple[dict[str, float], dict[str, int]]:
    """Scores in percent on centre crops of the images that the copy did not query, and the numbers of images."""
    positions = unqueried_positions(pictures, record, command.data)
    images = Streamed(Views(pictures, "center", command.size), positions, command.workers)
    logits = layer(represent_centres(encoder, images, precision).float())
    counts = {"test_images": len(positions), "test_images_queried": len(pictures) - len(positions)}
    return top1_top5(logits, pictures.labels[positions].to(precision.device)), counts
