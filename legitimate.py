"""What a defence costs a paying user: a downstream head is trained and used on answers with and without the defence.

python legitimate.py -data ./datasets --dataset cifar10 --arch resnet34 --defence noise --sigma 0.5

The user buys the representations of labelled images, trains a head on them, and buys the representations of test
images: training and use happen in the same account, under the same defence. A user who asks as much as an attacker has
--num_queries and --num-test that add up to the attacker's budget; --user-classes makes the task narrow.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jobs.early  # noqa: F401

from attacks import victims
from attacks.defended import black_box
from attacks.remote import Remote
from data_aug.datasets import DATASET_NAMES, Data, check_name
from defenses import DEFENCES, Defence, DefenceChoice, use_defences
from evaluation.rows import rounded
from evaluation.user import UserHead, keep_answers, load_user, lost_words, user_scores
from jobs.ending import script
from jobs.machine import Machine, Threads, set_up
from loss import STEAL_LOSSES
from settings import Command, Parser, Settings, setting
from training.objective import LossChoice
from training.run import open_run
from victim import Victim


@dataclass(frozen=True)
class User(Settings):
    """The user's images."""

    dataset_test: str = setting(
        "cifar10",
        f"the user's data set (the victim's: its test images without the last 1,000 are the user's): {DATASET_NAMES}",
        read=check_name,
        flags=("-dataset-test", "--dataset-test"),
        title="data",
    )
    num_queries: int = setting(
        9000, "labelled images that the user trains on", at_least=1, flags=("--num_queries",), title="data"
    )
    num_test: int | None = setting(None, "use the last N test images only", at_least=1, otherwise="all", title="data")
    user_classes: int | None = setting(
        None, "the user's task has N of the data set's classes, drawn by the seed", at_least=2, title="data"
    )


OWNERS = (Data, User, victims.VictimChoice, Remote, DefenceChoice, *DEFENCES.values(), LossChoice, UserHead, Machine)
OWNERS = (*OWNERS, Threads)


def make_parser() -> Parser:
    return Parser(
        __doc__,
        OWNERS,
        kind="legitimate",
        core=("dataset_test", "num_queries", "seed"),
        implied=("dataset", "arch", "epochstrain", "lossvictim", "losstype"),
        choices={"losstype": STEAL_LOSSES},
    )


def parse(line: Sequence[str] | None = None) -> Command:
    command = make_parser().parse(line)
    by_loss = command.defence is True  # --defence True means what it does against an attack by a loss
    command.use_all(Data, User, victims.VictimChoice, Remote, UserHead, Machine, Threads, LossChoice)
    use_defences(command, command.losstype, command.seed)
    command.refuse_idle(losstype=None if by_loss else "without --defence True")
    return command


@script
def main() -> None:
    started = time.perf_counter()
    command = parse()
    machine, precision = set_up(command)
    opened = victims.open_victim(command)
    run = open_run(command, opened.home, precision, weights=opened.version)
    if run.done():
        return
    name, defences = command.dataset_test, command.all(Defence)
    task = {"number": command.num_test, "classes": command.user_classes, "seed": machine.seed, "size": command.size}
    train, test, common = load_user(name, command.dataset, command.data, command.num_queries, **task)

    # The defended answers first: what cannot work is refused before anything is written.
    victim = black_box(command, opened, precision, None, len(train[1]) + len(test[1]))
    bought = (train, test, command[UserHead], precision, machine.seed)
    keep = keep_answers(run, opened.asked)
    scores, report = user_scores(victim, *bought, keep)
    clean = user_scores(Victim(opened.encoder, precision=precision), *bought)[0] if defences else scores
    if keep is None:
        run.start()
    row = {
        **{"model": "user", "arch": opened.encoder and opened.encoder.arch, "downstream": name},
        **{"defence": command.defence, **rounded(scores), **({} if opened.asked else rounded(clean, "clean_"))},
        **{**report, "train_images": len(train[1]), "test_images": len(test[1]), "test_images_queried": common},
        **victim.ledger.summary(),
        **{"user_classes": command.user_classes, "seed": machine.seed},
        **{"seconds": round(time.perf_counter() - started, 1), "checkpoint": str(opened.source)},
        **run.config["provenance"],
    }
    said = f"on what {opened.source} answers" if opened.asked else "without a defence"
    run.say(f"{said}: top1 {clean['top1']:.2f}, top1_converged {clean['top1_converged']:.2f}")
    if defences:
        run.say(f"with {command.defence}: top1 {scores['top1']:.2f}, top1_converged {scores['top1_converged']:.2f}")
        run.say(lost_words(scores, clean, len(test[1])))
    run.add_row(row, step=command.epochs)
    run.finish()
    if keep:
        keep.unlink()
    defended = ("--defence", command.defence) if defences else ()
    victims.say_steal(command, opened.source, opened.encoder, command.dataset, *defended)


if __name__ == "__main__":
    main()
