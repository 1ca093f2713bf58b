"""How a thief hides a copy: versions of an encoder that serve its users as well, or nearly, and look otherwise.

python -m ranking.disguises --copy COPY... --out FOLDER -data ./datasets --dataset textures

writes each of DISGUISES for each copy, for verify.py --suspects FOLDER --heads: the turned and padded ones hold a
linear map in their head. Each follows from the seed alone.
"""

import copy as copying
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks import victims
from data_aug.datasets import DATASET_NAMES, check_name, load_dataset
from data_aug.images import Stored
from data_aug.sizes import SIZE, Data
from files.reading import checked
from files.writing import save_checkpoint
from loss import STEAL_LOSSES, TRAIN_LOSSES
from models import SimCLREncoder, build_copy, projection_head, read_checkpoint
from models.files import FIELDS
from settings import Parser, Settings, setting
from simclr import SimCLR
from training import finding
from training.recipe import Recipe
from training.record import Record
from training.run import Run
from utils import Precision, UserError, choose_device, generator, seeded
from victim import Victim

PRUNED = 0.5  # share of the weights of each layer that are set to 0
TUNING = Recipe(epochs=2, batch_size=64, lr=1e-4, flat_epochs=0)
DISTILLING = Recipe(epochs=10, batch_size=64, lr=1e-3, flat_epochs=0)


@dataclass(frozen=True)
class Thief:
    """What a thief has: images uint8 (N, 3, H, W) of its own, a machine and a seed."""

    images: Tensor
    precision: Precision
    seed: int = 0

    def draws(self, purpose: str) -> torch.Generator:
        return generator(self.seed, f"disguise {purpose}")


# ---- by a linear map of the representation: what the head gives ------------------------------------------------------


def _mapped(copy: SimCLREncoder, weight: Tensor, bias: Tensor | None = None) -> SimCLREncoder:
    """The copy with the head h -> weight h + bias; weight (E, D), bias (E,)."""
    hidden = copying.deepcopy(copy)
    with seeded(0):
        hidden.backbone.fc = nn.Linear(weight.shape[1], len(weight))
    hidden.backbone.fc.weight.data.copy_(weight)
    hidden.backbone.fc.bias.data.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return hidden


def shuffled(copy: SimCLREncoder, thief: Thief) -> SimCLREncoder:
    """The dimensions of the representation in another order."""
    return _mapped(copy, torch.eye(copy.dim)[torch.randperm(copy.dim, generator=thief.draws("shuffled"))])


def padded(copy: SimCLREncoder, thief: Thief) -> SimCLREncoder:
    """As many dimensions again, each constant, drawn from N(0, 1), and all of them shuffled."""
    draws, width = thief.draws("padded"), 2 * copy.dim
    order = torch.randperm(width, generator=draws)
    bias = torch.cat([torch.zeros(copy.dim), torch.randn(copy.dim, generator=draws)])
    return _mapped(copy, torch.eye(width, copy.dim)[order], bias[order])


def rotated(copy: SimCLREncoder, thief: Thief) -> SimCLREncoder:
    """The representation turned by a random orthogonal matrix."""
    return _mapped(copy, nn.init.orthogonal_(torch.empty(copy.dim, copy.dim), generator=thief.draws("rotated")))


def rescaled(copy: SimCLREncoder, thief: Thief) -> SimCLREncoder:
    """Each dimension multiplied by a factor of its own, from 0.1 to 10, uniform in its logarithm."""
    exponents = 2 * torch.rand(copy.dim, generator=thief.draws("rescaled")) - 1
    return _mapped(copy, torch.diag(10**exponents))


# ---- by other weights ------------------------------------------------------------------------------------------------


def pruned(copy: SimCLREncoder, thief: Thief) -> SimCLREncoder:
    """Half of each layer's weights, those of the smallest magnitude, set to 0."""
    hidden = copying.deepcopy(copy)
    for weight in hidden.backbone.parameters():
        if weight.ndim > 1:
            threshold = weight.data.abs().flatten().kthvalue(max(1, int(PRUNED * weight.numel()))).values
            weight.data[weight.data.abs() <= threshold] = 0
    return hidden


def fine_tuned(copy: SimCLREncoder, thief: Thief) -> SimCLREncoder:
    """Trained on by SimCLR, with a new head, on the thief's images: TUNING."""
    hidden = copying.deepcopy(copy)
    with seeded(thief.seed, "disguise fine-tuned"):
        hidden.backbone.fc = projection_head(copy.dim, 128)
    loss = TRAIN_LOSSES["infonce"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SimCLR(hidden.train(), loss.bind({}), TUNING, Run(Path(folder), thief.precision))
        trainer.train(Stored(thief.images))
    hidden.backbone.fc = nn.Identity()
    return hidden


def distilled(copy: SimCLREncoder, thief: Thief) -> SimCLREncoder:
    """A copy of the copy, of the same architecture, by the squared error on the thief's images: DISTILLING."""
    with seeded(thief.seed, "disguise distilled"):
        student = build_copy(copy.arch, copy.dim, copy.normalize, input_size=copy.input_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SimCLR(student, STEAL_LOSSES["mse"], DISTILLING, Run(Path(folder), thief.precision))
        trainer.steal(Stored(thief.images), Victim(copy, precision=thief.precision))
    return student


DISGUISES: dict[str, Callable[[SimCLREncoder, Thief], SimCLREncoder]] = {
    "shuffled": shuffled,
    "padded": padded,
    "rotated": rotated,
    "rescaled": rescaled,
    "pruned": pruned,
    "fine-tuned": fine_tuned,
    "distilled": distilled,
}


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disguising(Settings):
    """Which copies are hidden, and the thief's images."""

    copy: Sequence[Path] | None = setting(None, "copies to hide", read=Path, several=True)
    out: Path = setting(Path("suspects"), "folder that gets the hidden versions")
    dataset: str = setting("textures", f"data set of the thief's images: {DATASET_NAMES}", read=check_name)
    number: int = setting(2000, "how many of its training images the thief has", at_least=64)
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    seed: int = setting(0, "seed of every random draw")
    title = "disguises"


def hide(path: Path, folder: Path, thief: Thief, name: str) -> list[Path]:
    """Write the copy of a checkpoint, and each disguise of it, as `<name>-<disguise>.pth.tar`; returns their paths.

    What the copy's attacker queried is kept in the files, so that no suspect is tested on it.
    """
    checkpoint = read_checkpoint(path)
    encoder, paths = victims.encoder_of(checkpoint, path), []
    encoder.backbone.fc = nn.Identity()
    for disguise, make in {"copy": lambda copy, _: copy, **DISGUISES}.items():
        hidden = make(encoder.cpu(), thief).cpu()
        paths.append(folder / f"{name}-{disguise}.pth.tar")
        save_checkpoint(_content(hidden, Record.of(checkpoint)), paths[-1])
    return paths


def _content(encoder: SimCLREncoder, record: Record) -> Mapping:
    queried = {"query_set": record.query_set, "query_indices": record.query_indices}
    queried |= {"query_digests": record.query_digests}
    content = {"arch": encoder.arch, "state_dict": encoder.state_dict(), "normalize": encoder.normalize}
    return {**content, "input_size": encoder.input_size, **{k: v for k, v in queried.items() if v is not None}}


def main() -> None:
    command = Parser(__doc__, [Data, Disguising]).parse()
    data, disguising = command.use(Data), command.use(Disguising)
    if not disguising.copy:
        raise UserError("no copy to hide: give --copy PATH, one or several")
    precision = Precision.choose("auto", choose_device(disguising.device))
    disguising.out.mkdir(parents=True, exist_ok=True)
    for path in disguising.copy:
        found = finding.locate(path, Path("checkpoints"))
        said = checked(read_checkpoint(found), {"input_size": FIELDS["input_size"]}, str(found)).get("input_size")
        images, _ = load_dataset(disguising.dataset, data.data, "train", data.size or said or SIZE)
        thief = Thief(images[: disguising.number], precision, disguising.seed)
        for written in hide(found, disguising.out, thief, finding.named(found).name.removesuffix(".pth.tar")):
            print(written)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
