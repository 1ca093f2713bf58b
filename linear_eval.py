"""Evaluate a victim, a copy or a random encoder on a downstream data set; compare a copy with its victim.

python linear_eval.py --dataset cifar10 --datasetsteal svhn --dataset-test stl10 --losstype mse --num_queries 9000
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jobs.early  # noqa: F401

from attacks import victims
from data_aug.sizes import Data
from evaluation.downstream import Downstream, Others, instead_of_probe, judge_encoder, load_images, open_others
from evaluation.encoders import COPIES, LOSSES, SOUGHT, SOUGHT_NAMES, EncoderChoice, open_judged, settle_search
from evaluation.probes import Probe
from evaluation.rows import encoder_row
from evaluation.test_images import set_digest
from files.address import is_address
from files.writing import save_checkpoint
from jobs.ending import script
from jobs.machine import Machine, Threads, set_up
from models import SimCLREncoder
from settings import Command, Parser
from training import finding
from training.recipe import Protocol
from training.represent import represent
from training.run import open_run
from victim import version_of

OWNERS = (Data, Downstream, EncoderChoice, Probe, *SOUGHT, Machine, Threads, Protocol)


def make_parser() -> Parser:
    return Parser(
        __doc__,
        OWNERS,
        kind="linear",
        core=("dataset_test", "seed"),
        implied=(*SOUGHT_NAMES, "arch", "modeltype", "save"),
        choices={"attack": COPIES, "losstype": LOSSES},
    )


def parse(line: Sequence[str] | None = None) -> Command:
    command = make_parser().parse(line)
    command.use_all(Data, Machine, Threads, Protocol, EncoderChoice, Downstream)
    released = {"lr": 1e-4 if command.modeltype == "stolen" else 3e-4} if command.recipe == "released" else {}
    command.use(Probe, released, {"lr": 3e-4} if command.finetune else {})
    settle_search(command)
    command.refuse_idle(probe=instead_of_probe(command))
    return command


@script
def main() -> None:
    started = time.perf_counter()
    command = parse()
    machine, precision = set_up(command)
    path, checkpoint, encoder = open_judged(command)
    command.set(arch=encoder.arch)
    root = machine.checkpoint_dir
    home = finding.home_of(path, root) if path else root / f"random-{encoder.arch}"
    run = open_run(command, home, precision, weights=version_of(encoder))
    if run.done():
        return
    encoder = encoder.to(precision.device, memory_format=precision.memory_format)
    train, test, queried = load_images(command, command.data, checkpoint)
    others = open_others(command, path, checkpoint, precision)
    represent(encoder, test[0][:8], precision)  # before anything is written: are these numbers?

    run.start()
    run.say(f"{encoder.arch}, {len(train[1])} labelled images of {command.dataset_test}, {precision}")
    scores, state = judge_encoder(command, encoder, train, test, others, run)
    losstype = checkpoint.get("settings", {}).get("losstype")
    about = {
        **{"downstream": command.dataset_test, "probe": "finetune" if command.finetune else command.probe},
        **{"attacker_labels": losstype == "supcon" and command.modeltype == "stolen", "recipe": command.recipe},
        "size": command.size,
    }
    more = {
        **{"train_images": len(train[1]), "test_images": len(test[1]), "test_images_queried": queried},
        **{"test_digest": set_digest(test[0]), "seed": machine.seed},
        **{"seconds": round(time.perf_counter() - started, 1), **run.config["provenance"]},
    }
    row = encoder_row(command.modeltype, encoder, path, checkpoint, scores, about, more)
    # The checkpoint first: with its row there, the run counts as done.
    save_checkpoint({"kind": "linear", "arch": encoder.arch, "state_dict": state, "row": row}, run.checkpoint)
    run.add_row(row, step=command.probe_epochs)
    run.finish()
    suggest_next(command, path, checkpoint, encoder, others)


def suggest_next(
    command: Command, path: Path | None, checkpoint: Mapping, encoder: SimCLREncoder, others: Others
) -> None:
    """The next command: steal a victim, compare a copy with its victim, then ask whether it is stolen."""
    if path is None:
        finding.say_next(command, "run.py", "--arch", command.arch)
    elif command.modeltype == "victim":
        victims.say_steal(command, path, encoder, checkpoint.get("settings", {}).get("dataset", ""))
    elif others:
        pair = ("--victim", Path(others["victim"][0]), "--suspect", path)
        finding.say_next(command, "verify.py", "--method", "dataset-inference", *pair)
    elif "stolen_from" in checkpoint and not is_address(checkpoint.get("settings", {}).get("victim")):
        on = ("--dataset-test", command.dataset_test)
        finding.say_next(command, "linear_eval.py", "--stolen", path, *on, "--fidelity")


if __name__ == "__main__":
    main()
