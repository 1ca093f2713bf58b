"""Is this encoder stolen? Tests for the victim's watermark, marks in answers, training images, similarity.

python verify.py --method watermark --victim VICTIM.pth.tar --suspect SUSPECT.pth.tar --independent A.pth.tar B.pth.tar
python verify.py --suspects FOLDER --victim VICTIM.pth.tar --shadows 20      # many suspects, ranked by all methods

A suspect is called stolen if every test that the given encoders allow has a p-value below --level, after Holm's
correction for the number of suspects. Tests over images detect any difference, however small. The test over encoders
compares a suspect with two or more encoders that are independent of the victim. A method that does not find the victim
itself, or finds an untrained encoder, decides nothing.
"""

import hashlib
import time
from collections.abc import Sequence

import jobs.early  # noqa: F401

from data_aug.sizes import Data, settle_size
from defenses import DEFENCES
from evaluation.candidates import (
    IN_ANSWERS,
    RANKING,
    Encoders,
    OwnershipTest,
    add_control,
    dataset_of,
    open_candidates,
    use_test,
)
from evaluation.ownership import METHODS, measure_all
from evaluation.verdict import (
    add_verdict_rows,
    count_words,
    detection_rates,
    judge_all,
    verdict_lines,
    verdict_table,
)
from jobs.ending import script
from jobs.machine import Machine, Threads, set_up
from ranking.rank import Ranking, rank_suspects, use_ranking
from settings import Command, Parser
from training import finding
from training.run import open_run
from utils import UserError
from victim import version_of


def make_parser() -> Parser:
    return Parser(
        __doc__,
        (Data, Encoders, OwnershipTest, *(DEFENCES[name] for name in IN_ANSWERS), Ranking, Machine, Threads),
        kind="verify",
        core=("method", "seed"),
        implied=("suspect", "dataset"),
    )


def parse(line: Sequence[str] | None = None) -> Command:
    command = make_parser().parse(line)
    command.use_all(Data, Encoders, Machine, Threads)
    use_test(command)
    if command.suspects or command.method == RANKING:
        use_ranking(command)
    elif command.method is None:
        raise UserError(f"no method: give --method {' or --method '.join(METHODS)}")
    elif not command.suspect:
        raise UserError("no encoder in question: give --suspect PATH, one or several, or --suspects FOLDER")
    questioned = [command.suspects] if command.suspects else command.suspect
    paths = [*questioned, "and", *(command.independent or ())]
    command.suffix = hashlib.sha256("\n".join(map(str, paths)).encode()).hexdigest()[:8]
    command.refuse_idle()
    return command


@script
def main() -> None:
    started = time.perf_counter()
    command = parse()
    machine, precision = set_up(command)
    test, root = command[OwnershipTest], machine.checkpoint_dir
    victim = finding.find(command, "victim", "victim", {})
    if command.suspects:
        rank_suspects(command, victim, precision, root)
        return
    suspects, independents = (
        [finding.locate(path, root) for path in paths or ()] for paths in (command.suspect, command.independent)
    )
    named = {"suspect": list(map(str, suspects)), "independent": list(map(str, independents))}
    candidates = open_candidates(victim, suspects, independents)
    candidates[0].size = settle_size(command, candidates[0].checkpoint.get("input_size"))
    weights = [version_of(candidate.encoder) for candidate in candidates]
    run = open_run(command, finding.home_of(victim, root), precision, victim=str(victim), weights=weights, **named)
    if run.done(rows=len(suspects)):
        print(*(f"{row['checkpoint']}: {row['verdict']}" for row in run.rows()), sep="\n")
        return
    add_control(candidates, machine.seed)
    counts = measure_all(test, command.data, candidates, precision, machine.seed)
    judge_all(test, candidates)
    words, overall = detection_rates(test, candidates)

    run.start()
    dataset = dataset_of(test, candidates[0])
    lines = [f"{test.method} on {dataset}: {count_words(counts)}, {precision}", verdict_table(candidates), *words]
    run.say("\n".join([*lines, *verdict_lines(candidates)]))
    more = {
        **{"dataset": dataset, **counts, **overall, "seed": machine.seed},
        **{"seconds": round(time.perf_counter() - started, 1), **run.config["provenance"]},
    }
    add_verdict_rows(run, test, candidates, more)
    run.finish()
    finding.say_next(command, "detect.py", "--victim", victim, "--dataset", dataset)


if __name__ == "__main__":
    main()
