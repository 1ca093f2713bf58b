"""Steal a downstream classifier through its labels or probabilities: the baseline for stealing encoders.

python steallabels.py -data ./datasets --dataset cifar10 --dataset-test cifar10 --num_queries 9000

The victim is a linear layer on a frozen encoder, trained by linear_eval.py, or a supervised network trained by run.py.
"""

import functools
import time
from collections.abc import Sequence

import jobs.early  # noqa: F401

import torch

from attacks import victims
from attacks.labels import MODES, Labels, build_classifier_copy, open_classifier
from attacks.queries import QueryChoice
from data_aug.sizes import Data
from evaluation.fidelity import classifier_figures
from evaluation.rows import attack_figures
from evaluation.test_images import load_test
from jobs.ending import script
from jobs.machine import Machine, Threads, set_up
from loss import LABEL_LOSSES
from settings import Command, Parser
from simclr import SimCLR
from training import finding
from training.objective import Loss, LossChoice
from training.recipe import Recipe
from training.represent import represent
from training.run import relative
from utils import UserError
from victim import Api, Victim, digest_tensor

OWNERS = (Data, victims.VictimChoice, Labels, victims.CopyInput, QueryChoice, LossChoice, Recipe)
OWNERS = (*OWNERS, *LABEL_LOSSES.values(), Machine, Threads)


def make_parser() -> Parser:
    return Parser(
        __doc__,
        OWNERS,
        kind="stolen",
        core=("attack", "dataset_test", "datasetsteal", "archstolen", "losstype", "num_queries", "epochs", "seed"),
        implied=victims.VICTIM_SETTINGS,
        choices={"losstype": LABEL_LOSSES},
        defaults={"losstype": "direct"},
        flags={"arch": ("--arch-victim", "--archvic")},
        fixed={"attack": "steallabels"},
    )


def parse(line: Sequence[str] | None = None) -> Command:
    command = make_parser().parse(line)
    if {"losstype", "mode"} <= command.given.keys() and MODES[command.mode] != command.losstype:
        raise UserError(f"--mode {command.mode} and --losstype {command.losstype} contradict each other: give one")
    command.use_all(Data, victims.VictimChoice, victims.CopyInput, Machine, Threads, QueryChoice)
    losstype = command.use(LossChoice, {"losstype": MODES[command.mode]}).losstype
    command.use(Labels, {"modeloutput": "logits" if losstype == "knockoff" else "labels"})
    command.set(mode=losstype)
    loss = command.use(LABEL_LOSSES[losstype])
    command.use(Recipe, loss.presets, seed=command.seed)
    supervised = command.victimtype == "supervised"
    command.refuse_idle(lossvictim="with --victimtype supervised" if supervised else None)
    if supervised:
        if command.given.get("dataset_test", command.dataset) != command.dataset:
            raise UserError(f"a supervised victim classifies its own data set: give --dataset-test {command.dataset}")
        command.set(dataset_test=command.dataset, lossvictim="supervised")
    return command


@script
def main() -> None:
    started = time.perf_counter()
    command = parse()
    machine, precision = set_up(command)
    supervised = command.victimtype == "supervised"
    opened = victims.open_victim(command, **({"losstype": "supervised"} if supervised else {}))
    command.refuse_idle()  # again: the victim's file may have named its data set
    if supervised:
        command.set(dataset_test=command.dataset)
    classifier = open_classifier(command, opened.source, opened.encoder)
    output = "labels" if command.modeloutput == "labels" else "probabilities"
    api = Api(opened.encoder, output, classifier).to(precision.device)
    victim = Victim(api, command.num_queries, precision=precision)
    untrained = functools.partial(build_classifier_copy, command, victim.dim)
    images, _, record = victims.choose(command, command.num_queries, untrained, precision)
    model = untrained(images.tensor)
    run = victims.open_copy(command, opened, record, precision)
    if run.done():
        return
    # Before anything is paid for: are there test images that were not queried?
    chosen = {"number": command.num_test, "size": command.size}
    record.query_digests = digest_tensor(images.tensor)
    test, labels, queried = load_test(command.dataset_test, command.data, record, **chosen)
    if len(labels) and int(labels.max()) >= victim.dim:
        raise UserError(
            f"{command.dataset_test} has more classes than the victim's {victim.dim}: give its --dataset-test"
        )
    SimCLR(model, command[Loss], command[Recipe], run).steal(images, victim)
    labels = labels.to(precision.device)
    original = torch.cat([classifier(h) for h in represent(opened.encoder, test, precision).split(4096)])
    figures = classifier_figures(represent(model, test, precision, output=model.project), original, labels)
    row = {
        **{"model": "stolen", "attack": "steallabels", "arch": command.archstolen, "losstype": command.losstype},
        **{"modeloutput": command.modeloutput, "downstream": command.dataset_test},
        **{name: round(value, 6) for name, value in figures.items()},
        **{"test_images": len(labels), "test_images_queried": queried, **attack_figures(run.record)},
        **{"seed": machine.seed, "seconds": round(time.perf_counter() - started, 1)},
        **{"checkpoint": str(run.checkpoint), **run.config["provenance"]},
    }
    run.add_row(row, step=command.epochs)
    run.finish()
    print(f"copy: {relative(run.checkpoint)}")
    finding.say_next(command, "linear_eval.py", "--stolen", run.folder, "--dataset-test", command.dataset_test)


if __name__ == "__main__":
    main()
