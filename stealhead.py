"""Steal an encoder by first re-creating its projection head from the representations it answers.

python stealhead.py -data ./datasets --dataset cifar10 --datasetsteal svhn --losstype infonce --num_queries 9000

Phase 1 trains a head on answers to views of some of the images. Phase 2 trains the copy and its head to match the
re-created head's outputs for the answers. Both phases share the budget; phase 2 re-uses the answers of phase 1.
"""

import dataclasses
from collections.abc import Sequence

import jobs.early  # noqa: F401

import torch
from torch import Tensor, nn

from attacks import ADAPTIVE, Attack, victims
from attacks.defended import black_box
from attacks.head import LOSSES, Head, build_head_copy, output_of
from attacks.queries import QueryChoice
from attacks.remote import Remote
from data_aug.sizes import Data
from defenses import DEFENCES, DefenceChoice, use_defences
from jobs.ending import script
from jobs.machine import Machine, Threads, set_up
from loss import HEAD_LOSSES
from models import projection_head
from settings import Command, Parser
from simclr import SimCLR
from training.objective import Loss, LossChoice
from training.recipe import Recipe
from training.run import Run, relative
from utils import seeded

OWNERS = (Data, victims.VictimChoice, Remote, Head, victims.CopyInput, QueryChoice, Attack, DefenceChoice)
OWNERS = (*OWNERS, *DEFENCES.values(), LossChoice, Recipe, *LOSSES.values(), *HEAD_LOSSES.values(), Machine, Threads)


def make_parser() -> Parser:
    return Parser(
        __doc__,
        OWNERS,
        kind="stolen",
        core=("attack", "datasetsteal", "archstolen", "losshead", "losstype", "num_queries", "epochs", "seed"),
        implied=victims.VICTIM_SETTINGS,
        choices={"losstype": LOSSES},
        flags={"arch": ("--arch-victim", "--archvic")},
        defaults={"n_views": 2},
        fixed={"attack": "stealhead"},
        without=(*(name for name in ADAPTIVE if name != "query_views"), "useaug", "copy_views", "views"),
    )


def parse(line: Sequence[str] | None = None) -> Command:
    command = make_parser().parse(line)
    command.use_all(Data, victims.VictimChoice, Remote, victims.CopyInput, Machine, Threads, QueryChoice, LossChoice)
    loss = command.use(LOSSES[command.losstype])
    recipe = command.use(Recipe, loss.presets, seed=command.seed)
    head = command.use(Head, {"head_queries": command.num_queries // 2, "epochshead": 2 * recipe.epochs})
    command.use(HEAD_LOSSES[head.losshead])
    use_defences(command, head.losshead, command.seed)
    attack = command.use(Attack)
    head.check(attack.n_views, command.num_queries)
    attack.check(loss)
    command.refuse_idle()
    return command


def recreate_head(command: Command, answers: Tensor, images: int, run: Run) -> nn.Module:
    """Phase 1: a head trained on the answers (V * N, D) to the first of N images; returned frozen."""
    head, loss = command[Head], HEAD_LOSSES[command.losshead]
    rows = answers.view(command.n_views, -1, answers.shape[1])[:, :images].flatten(0, 1)
    dim = answers.shape[1] - command.out_dim if head.victimhead else answers.shape[1]
    with seeded(command.seed, "head"):
        model = projection_head(dim, command.out_dim)
    values = {**loss.presets, "batch_size": min(loss.batch_size, images), "lr": head.lrhead}
    recipe = dataclasses.replace(command[Recipe], epochs=head.epochshead, **values)
    trainer = SimCLR(model, command.all(Loss)[1], recipe, run)
    trainer.train_head(rows[:, :dim], rows[:, dim:] if head.victimhead else None, command.n_views)
    return model.eval().requires_grad_(False)


@script
def main() -> None:
    command = parse()
    _, precision = set_up(command)
    head, (loss, _) = command[Head], command.all(Loss)
    opened = victims.open_victim(command)
    command.refuse_idle()  # again: the victim's file may have named its data set
    output = output_of(command, opened)
    count, images_of_head = command.num_queries // command.n_views, head.head_queries // command.n_views
    images, labels, record = victims.choose(command, count, lambda every: build_head_copy(command, every)[0], precision)
    victim = black_box(command, opened, precision, command.num_queries, output=output)
    model, heads = build_head_copy(command, images.tensor)
    run = victims.open_copy(command, opened, record, precision)

    def refine(answers: Tensor) -> Tensor:
        """The answers through the re-created head."""
        spent = images_of_head * command.n_views
        run.say(f"of these queries {spent} train the head, all {len(answers)} train the copy")
        part = run.below("head", "head")
        recreated = recreate_head(command, answers, images_of_head, part)
        run.say(f"head: {relative(part.checkpoint)}")
        h = answers[:, : answers.shape[1] - command.out_dim] if head.victimhead else answers
        return torch.cat([recreated(part) for part in h.split(4096)])

    trainer = SimCLR(model, loss, command[Recipe], run, heads)
    trainer.steal(images, victim, command[Attack], labels, refine)
    print(f"copy: {relative(run.checkpoint)}")
    victims.say_judge(command, run.folder)


if __name__ == "__main__":
    main()
