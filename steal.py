"""Steal an encoder through its representations.

python steal.py -data ./datasets --dataset cifar10 --datasetsteal svhn --arch resnet34 --losstype mse --num_queries 9000
torchrun --nproc-per-node 4 steal.py --datasetsteal svhn --losstype mse --num_queries 9000
"""

from collections.abc import Sequence

import jobs.early  # noqa: F401

from attacks import ATTACKS, Attack, Heads, use_attack, victims
from attacks.queries import QueryChoice, choose_queries
from data_aug.datasets import Data
from defenses import DEFENCES, Defence, DefenceChoice, use_defences
from defenses.watermark import check_width, read_watermark, watermark_line
from evaluation.test_images import load_test
from jobs.ending import script
from jobs.machine import Machine, Threads, set_up
from jobs.place import Processes
from loss import STEAL_LOSSES
from models import SimSiamHeads, build_copy
from settings import Command, Parser
from simclr import SimCLR
from training.objective import Loss, LossChoice
from training.recipe import Protocol, Recipe
from training.run import relative
from utils import UserError, seeded
from victim import Api, Victim

OWNERS = (Data, victims.VictimChoice, victims.Copy, QueryChoice, Attack, DefenceChoice, *DEFENCES.values(), LossChoice)
OWNERS = (*OWNERS, Recipe, *STEAL_LOSSES.values(), Heads, Machine, Threads, Protocol, Processes)


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
    command.use_all(Data, victims.VictimChoice, Machine, Threads, Protocol, Processes)
    preset = ATTACKS[command.attack]
    command.use(victims.Copy, preset)
    command.use(LossChoice, preset)
    loss = command.use(STEAL_LOSSES[command.losstype], preset)
    command.use(Recipe, preset, loss.presets, seed=command.seed, recipe=command.recipe)
    command.use(Heads)
    command.use(QueryChoice, preset)
    use_attack(command, loss, preset, command.num_queries)
    use_defences(command, command.losstype, command.seed)
    command.refuse_idle()
    return command


@script
def main() -> None:
    command = parse()
    machine, precision = set_up(command)
    loss, attack, copy, recipe = command[Loss], command[Attack], command[victims.Copy], command[Recipe]
    path, checkpoint, encoder = victims.open_victim(command)
    command.refuse_idle()  # again: the victim's file may have named its data set
    mlp = read_watermark(checkpoint, str(path)) if copy.watermark else None
    if mlp is not None and command.dataset == victims.OTHER:
        raise UserError("a watermark is read on the victim's test images: give their --dataset, such as folder:PATH")
    if copy.victimhead and not encoder.has_head:
        raise UserError(f"{path} has no projection head: leave out --victimhead")
    # The released recipe repeats all queries in every epoch, so the budget has to cover them.
    rounds = recipe.epochs if recipe.recipe == "released" else 1
    api = Api(encoder.to(precision.device), "projections" if copy.victimhead else "representations")
    victim = Victim(api, command.num_queries * rounds, command.all(Defence), precision)
    choice, count = command[QueryChoice], attack.images(command.num_queries)
    choosy = attack.max_coverage is not None
    images, labels, record = choose_queries(choice, command.dataset, command.data, count, machine.seed, choosy)
    with seeded(machine.seed):
        model = build_copy(copy.archstolen, victim.dim, encoder.normalize, copy.stolenhead)
        heads = SimSiamHeads(victim.dim, command.out_dim) if loss.predictor else None
    if mlp is not None:
        check_width(mlp, model)

    run = victims.open_copy(command, path, encoder, record, precision)
    if loss.needs_labels:
        print(f"{command.losstype}: this attacker has the true labels of the images queried")
    SimCLR(model, loss, recipe, run, heads).steal(images, victim, attack, labels)
    if mlp is not None:
        test, _, _ = load_test(command.dataset, command.data, run.record)
        print(watermark_line(model, mlp, test, precision, machine.seed))
    print(f"copy: {relative(run.checkpoint)}")
    victims.say_judge(command, run.folder)


if __name__ == "__main__":
    main()
