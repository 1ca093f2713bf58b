"""Steal an encoder through its representations.

python steal.py -data ./datasets --dataset cifar10 --datasetsteal svhn --arch resnet34 --losstype mse --num_queries 9000
torchrun --nproc-per-node 4 steal.py --datasetsteal svhn --losstype mse --num_queries 9000
"""

import functools
from collections.abc import Sequence

import jobs.early  # noqa: F401

from torch import Tensor

from attacks import ATTACKS, Attack, Heads, loss_of, use_attack, victims
from attacks.defended import black_box
from attacks.queries import QueryChoice
from attacks.remote import Remote
from data_aug.sizes import Data
from defenses import DEFENCES, DefenceChoice, use_defences
from defenses.watermark import check_width, read_watermark, watermark_line
from evaluation.test_images import load_test
from jobs.ending import script
from jobs.machine import Machine, Threads, set_up
from jobs.place import Processes
from loss import STEAL_LOSSES
from models import SimCLREncoder, SimSiamHeads, build_copy
from settings import Command, Parser
from simclr import SimCLR
from training.objective import Loss, LossChoice
from training.recipe import Protocol, Recipe
from training.run import relative
from utils import UserError, seeded

OWNERS = (Data, victims.VictimChoice, Remote, victims.Copy, victims.CopyInput, QueryChoice, Attack, DefenceChoice)
OWNERS = (*OWNERS, *DEFENCES.values(), LossChoice, Recipe, *STEAL_LOSSES.values(), Heads, Machine, Threads)
OWNERS = (*OWNERS, Protocol, Processes)


def make_parser() -> Parser:
    return Parser(
        __doc__,
        OWNERS,
        kind="stolen",
        core=("datasetsteal", "archstolen", "losstype", "num_queries", "epochs", "seed"),
        implied=victims.VICTIM_SETTINGS,
        choices={"losstype": STEAL_LOSSES},
    )


def parse(line: Sequence[str] | None = None) -> Command:
    command = make_parser().parse(line)
    command.use_all(Data, victims.VictimChoice, Remote, Machine, Threads, Protocol, Processes)
    preset = ATTACKS[command.attack]
    command.use(victims.Copy, preset)
    command.use(victims.CopyInput, preset, {"copy_normalize": "none"} if command.recipe == "released" else {})
    loss = command.use(loss_of(command.attack, command.use(LossChoice, preset).losstype), preset)
    command.use(Recipe, preset, loss.presets, seed=command.seed, recipe=command.recipe)
    command.use(Heads)
    command.use(QueryChoice, preset)
    attack = use_attack(command, loss, preset, command.num_queries)
    if attack.asks:
        use_defences(command, command.losstype, command.seed)
    command.refuse_idle(**attack.idle)
    return command


def build(command: Command, width: int, queried: Tensor) -> tuple[SimCLREncoder, SimSiamHeads | None]:
    """The untrained copy for answers of this width, and heads for a loss that compares their outputs."""
    copy, normalize = command[victims.Copy], command[victims.CopyInput].normalisation(queried)
    with seeded(command.seed, "copy"):
        if not command[Attack].asks:
            return build_copy(copy.archstolen, victims.PROJECTION, normalize, True, command.size), None
        model = build_copy(copy.archstolen, width, normalize, copy.stolenhead, command.size)
        return model, SimSiamHeads(width, command.out_dim) if command[Loss].predictor else None


@script
def main() -> None:
    command = parse()
    machine, precision = set_up(command)
    loss, attack, copy, recipe = command[Loss], command[Attack], command[victims.Copy], command[Recipe]
    opened = victims.open_victim(command)
    command.refuse_idle(**attack.idle)  # again: the victim's file may have named its data set
    mlp = read_watermark(opened.checkpoint, str(opened.source)) if copy.watermark else None
    if mlp is not None and command.dataset == victims.OTHER:
        raise UserError("a watermark is read on the victim's test images: give their --dataset, such as folder:PATH")
    if copy.victimhead and not opened.encoder.has_head:
        raise UserError(f"{opened.source} has no projection head: leave out --victimhead")
    # The released recipe repeats all queries in every epoch, so the budget has to cover them.
    rounds = recipe.epochs if recipe.recipe == "released" else 1
    output = "projections" if copy.victimhead else "representations"
    victim = black_box(command, opened, precision, command.num_queries * rounds, output=output)
    count, choosy = attack.images(command.num_queries), attack.max_coverage is not None
    untrained = functools.partial(build, command, victim.dim)
    images, labels, record = victims.choose(command, count, lambda every: untrained(every)[0], precision, choosy)
    model, heads = untrained(images.tensor)
    if mlp is not None:
        check_width(mlp, model)

    run = victims.open_copy(command, opened, record, precision)
    if loss.needs_labels:
        print(f"{command.losstype}: this attacker has the true labels of the images queried")
    trainer = SimCLR(model, loss, recipe, run, heads)
    if attack.asks:
        trainer.steal(images, victim, attack, labels, own=victims.own_encoder(command))
    else:
        print(f"queries: 0, the copy is trained on {len(images)} images without the victim")
        trainer.train(images, labels)
    if mlp is not None:
        test, _, _ = load_test(command.dataset, command.data, run.record, size=command.size)
        print(watermark_line(model, mlp, test, precision, machine.seed))
    print(f"copy: {relative(run.checkpoint)}")
    victims.say_judge(command, run.folder)


if __name__ == "__main__":
    main()
