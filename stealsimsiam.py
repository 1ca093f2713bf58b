"""Steal an ImageNet-scale encoder, such as the public SimSiam ResNet-50, through its representations.

python stealsimsiam.py --pretrained models/checkpoint_0099-batch256.pth.tar --datasetsteal imagenet --losstype infonce
torchrun --nproc-per-node 4 stealsimsiam.py --pretrained models/checkpoint_0099-batch256.pth.tar --lars
"""

from collections.abc import Sequence

import jobs.early  # noqa: F401

from attacks import ADAPTIVE, Attack, Heads, victims
from attacks.defended import black_box
from attacks.queries import PictureChoice, QueryChoice, choose_pictures
from attacks.remote import Remote
from data_aug.images import Loading, picture_name
from data_aug.sizes import Data
from defenses import DEFENCES, DefenceChoice, use_defences
from files.address import asked_elsewhere
from jobs.ending import script
from jobs.machine import Machine, set_up
from jobs.place import Processes
from loss import STEAL_LOSSES
from models import SimSiamHeads, build_copy, large_arch_name, read_checkpoint
from models.layouts import IMAGENET
from settings import Command, Parser
from simclr import SimCLR
from training import finding
from training.objective import Loss, LossChoice
from training.recipe import LargeScale, Recipe, use_large_recipe
from training.run import relative
from utils import UserError, seeded

OWNERS = (Data, LargeScale, victims.VictimChoice, Remote, victims.Copy, PictureChoice, QueryChoice, Attack)
OWNERS = (*OWNERS, DefenceChoice, *DEFENCES.values(), LossChoice, Recipe, *STEAL_LOSSES.values(), Heads, Machine)
OWNERS = (*OWNERS, Loading, Processes)


def make_parser() -> Parser:
    return Parser(
        __doc__,
        OWNERS,
        kind="stolen-simsiam",
        core=("datasetsteal", "archstolen", "losstype", "num_queries", "epochs", "seed"),
        implied=victims.VICTIM_SETTINGS,
        choices={"losstype": STEAL_LOSSES, "query_order": ("first", "random")},
        defaults={"dataset": "imagenet", "arch": "resnet50", "losstype": "mse", "num_queries": 50000, "size": 224}
        | {"query_order": "random", "temperaturesn": 1000.0, "useaug": True},
        flags={"victim": ("--victim", "--pretrained"), "epochs": ("--epochssteal", "--epochs")},
        reads={"dataset": str, "datasetsteal": picture_name} | dict.fromkeys(("arch", "archstolen"), large_arch_name),
        without=(*ADAPTIVE, "n_views", "force", "lossvictim", "victimhead", "stolenhead", "query_space", "watermark"),
    )


def parse(line: Sequence[str] | None = None) -> Command:
    command = make_parser().parse(line)
    command.use_all(Data, victims.VictimChoice, Remote, QueryChoice, PictureChoice, Machine, Loading, Processes)
    command.use(LossChoice)
    command.use(victims.Copy, {"archstolen": command.arch})
    loss = command.use(STEAL_LOSSES[command.losstype])
    command.use(Heads)
    use_large_recipe(command, batch_size=128)
    attack = command.use(Attack, {"copy_views": loss.min_views}, plain_first=loss.plain_first)
    if not attack.useaug and loss.min_views > 1:
        raise UserError(
            f"{command.losstype} compares views of an image, and a query has a single view: leave out --useaug False"
        )
    attack.check(loss)
    use_defences(command, command.losstype, command.seed)
    command.refuse_idle(evaluate="here: python linsimsiam.py judges the copy")
    return command


def open_public(command: Command) -> victims.Opened:
    """The victim. UserError if its file differs from the flags."""
    if command.victim is None:
        raise UserError("no victim: give --pretrained PATH of its checkpoint, in any layout of docs/checkpoints.md")
    if asked_elsewhere(command):
        return victims.open_elsewhere(command)
    path = finding.find(command, "victim", "victim", {})
    checkpoint = read_checkpoint(path)
    finding.check_named(checkpoint, path, command, {"dataset": "dataset"})
    arch = f"{command.arch}-imagenet" if "arch" in command.given else None
    if command.given.get("epochstrain") not in (None, checkpoint.get("epoch")):
        raise UserError(
            f"{path} was trained for {checkpoint.get('epoch', 'unknown')} epochs, not {command.epochstrain}: "
            f"leave out --epochstrain, or give another victim"
        )
    encoder = victims.encoder_of(checkpoint, path, arch)
    return victims.Opened(finding.home_of(path, command.checkpoint_dir), path, checkpoint, encoder)


@script
def main() -> None:
    command = parse()
    machine, precision = set_up(command)
    loss, recipe = command[Loss], use_large_recipe(command, batch_size=128)
    opened = open_public(command)
    victim = black_box(command, opened, precision, command.num_queries)
    choices = command[QueryChoice], command[PictureChoice]
    images, labels, record = choose_pictures(*choices, command.data, command.size, command.workers, machine.seed)
    with seeded(machine.seed, "copy"):
        model = build_copy(f"{command.archstolen}-imagenet", victim.dim, IMAGENET, input_size=command.size)
        heads = SimSiamHeads(victim.dim, command.out_dim) if loss.predictor else None
    run = victims.open_copy(command, opened, record, precision)
    print(f"lr {recipe.lr:g}: --lr {command.lr:g} times --batch-size / 256; {recipe.optimizer}")
    trainer = SimCLR(model, loss, recipe, run, heads)
    trainer.first_epoch = max(trainer.first_epoch, command.start_epoch)
    trainer.steal(images, victim, command[Attack], labels)
    print(f"copy: {relative(run.checkpoint)}")
    shown = ("--modeltype", "stolen", "--stolen", run.folder, "--dataset", "cifar10", "--lars", "--lr", "1.0")
    finding.say_next(command, "linsimsiam.py", *shown)


if __name__ == "__main__":
    main()
