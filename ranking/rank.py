"""Many suspects ranked: each is scored by every method and compared with encoders that are independent of the victim.

These references are given, or trained here as shadows. Suspects are opened one at a time, and represent each set of
probe images once. `scores.py` scores an encoder, `standing.py` compares it with the references.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from attacks import victims
from data_aug.datasets import same_source
from data_aug.sizes import settle_size
from defenses.dataset_inference import under_determined
from evaluation.candidates import (
    RANKING,
    UNSEEN,
    Candidate,
    OwnershipTest,
    add_control,
    check_independent,
    dataset_of,
    training_data,
    unseen_images,
)
from evaluation.ownership import begin_alike
from models import read_checkpoint
from ranking.probe_images import ProbeImages, choose_trained, make_probes
from ranking.report import TABLE, Ranked, Result, ranking_lines, ranking_row, write_ranking
from ranking.scores import SCORES, Options, Reading, Scorer, available_scores
from ranking.shadows import train_shadows
from ranking.standing import COMBINED, common_scores, give_verdicts, stand
from ranking.suspects import Suspect, find_suspects, look_at, read_truth, readable
from settings import Command, Settings, setting
from training import finding
from training.run import open_run, relative
from utils import Precision, UserError, quiet
from victim import version_of


def _score_name(name: str) -> str:
    if name not in SCORES:
        raise UserError(f"unknown score {name!r}: choose from {', '.join(SCORES)}")
    return name


@dataclass(frozen=True)
class Ranking(Settings):
    """Many suspects: where they are, what they are compared with, and by which scores."""

    suspects: Path | None = setting(
        None,
        "many encoders to rank: a folder with a file or folder for each, or a text file with a path on each line",
        named=False,
    )
    shadows: int = setting(
        0, "train N encoders as the victim was, by other seeds, and compare with these too", at_least=0
    )
    scores: Sequence[str] | None = setting(
        None, f"scores to rank by: {', '.join(SCORES)}", read=_score_name, several=True, otherwise="all that can be had"
    )
    combine: str = setting("maximum", "which combination of a suspect's z-scores decides", choices=COMBINED)
    probe_images: int = setting(200, "images of noise to score by, and as many textures", at_least=20)
    heads: bool = setting(False, "score what a suspect's head gives, where that is a linear map")
    truth: Path | None = setting(
        None, "CSV file, columns suspect and stolen (1 or 0): adds how many stolen suspects are found"
    )
    title = "many suspects"

    @classmethod
    def absent(cls, command: Command) -> str:
        return "without --suspects"


def use_ranking(command: Command) -> None:
    """Put the ranking into force. UserError where another method is asked for, or nothing to rank is given."""
    if command.suspects is None:
        raise UserError(f"--method {RANKING} compares many suspects: give --suspects FOLDER, or a LIST of paths")
    if command.method not in (None, RANKING):
        raise UserError(f"--suspects is by all methods: leave out --method {command.method}, or give --suspect")
    ranking = command.use(Ranking)
    command.set(method=RANKING)
    references = ranking.shadows + len(command.independent or ())
    if references < 2:
        raise UserError(
            f"suspects are compared with two or more encoders that are independent of the victim, and {references} "
            f"given: give --independent PATH..., or --shadows N to train them"
        )


def rank_suspects(command: Command, victim_path: Path, precision: Precision, root: Path) -> None:
    """Rank the suspects: prints the ranking, and writes it to a CSV file in the run's folder and as a row of results.

    A suspect that cannot be read stands in the file with the reason.
    """
    started = time.perf_counter()
    ranking = command[Ranking]
    suspects = find_suspects(ranking.suspects, root)
    truth = read_truth(ranking.truth, suspects) if ranking.truth else {}
    victim = _open("victim", victim_path)
    victim.size = settle_size(command, victim.checkpoint.get("input_size"))
    names = available_scores(victim, ranking.scores)
    independents = [Suspect(str(path), finding.locate(path, root)) for path in command.independent or ()]
    look_at(suspects)
    look_at(independents)
    _check_apart(victim, suspects, independents)
    everyone = [*suspects, *independents]
    more = {"suspect": [str(one.path) for one in suspects], "independent": [str(one.path) for one in independents]}
    more["weights"] = [version_of(victim.encoder), *(one.version for one in everyone)]
    home = finding.home_of(victim_path, root)
    run = open_run(command, home, precision, victim=str(victim_path), **more)
    if not run.done():
        images, rest = _probes(command, victim, everyone)
        shadows = train_shadows(victim, *rest, ranking.shadows, precision, home) if ranking.shadows else []
        run.start()
        paths = [*(one.path for one in independents), *shadows]
        result = _compare(command, victim, suspects, paths, images, names, precision)
        result.counts |= {"independents": len(independents), "shadows": len(shadows)}
        write_ranking(run.folder / TABLE, result, truth)
        run.say("\n".join(ranking_lines(result, truth)))
        about = {"model": "suspects", "method": RANKING, "victim": str(victim_path), **ranking_row(result, truth)}
        about |= {"seed": command.seed, "seconds": round(time.perf_counter() - started, 1)}
        run.add_row({**about, **run.config["provenance"]})
        run.finish()
    print(f"ranking: {relative(run.folder / TABLE)}")


def _open(kind: str, path: Path) -> Candidate:
    """A finished encoder, to compare with."""
    checkpoint = read_checkpoint(path)
    finding.check_finished(checkpoint, path)
    return Candidate(kind, path, checkpoint, victims.encoder_of(checkpoint, path))


def _check_apart(victim: Candidate, suspects: Sequence[Suspect], independents: Sequence[Suspect]) -> None:
    """UserError for an independent encoder that cannot be read, that is the victim's, or that is a suspect too."""
    versions = {one.version: one.name for one in suspects if one.version}
    for one in independents:
        if one.reason:
            raise UserError(one.reason)
        check_independent(_open("independent", one.path), victim)
        if one.version in versions:
            raise UserError(
                f"{one.path} has the weights of the suspect {versions[one.version]}: leave it out of --independent"
            )
    if not readable(suspects):
        raise UserError(f"none of the {len(suspects)} suspects can be read: {suspects[0].reason}")


def _probes(
    command: Command, victim: Candidate, everyone: Sequence[Suspect]
) -> tuple[ProbeImages, tuple[Tensor, Tensor]]:
    """The images that all encoders represent, and the victim's other training images with labels, for shadows."""
    test, ranking, seed = command[OwnershipTest], command[Ranking], command.seed
    dataset = dataset_of(test, victim)
    records = [Candidate("suspect", one.path, one.record, victim.encoder) for one in readable(everyone)]
    unseen = unseen_images(test, dataset, command.data, [victim, *records])
    unseen = unseen if test.num_test else unseen[-UNSEEN:]
    images, labels = training_data(dataset, command.data, victim)
    chosen, rest = choose_trained(len(images), test.num_train, ranking.shadows > 0, seed)
    probes = make_probes(images[chosen], unseen, ranking.probe_images, seed)
    return probes, (images[rest], labels[rest])


def _compare(
    command: Command,
    victim: Candidate,
    suspects: Sequence[Suspect],
    references: Sequence[Path],
    images: ProbeImages,
    names: Sequence[str],
    precision: Precision,
) -> Result:
    """Score all encoders, one in memory at a time, and compare each suspect with the references."""
    test, ranking, seed = command[OwnershipTest], command[Ranking], command.seed
    dataset = dataset_of(test, victim)
    mixture = test.mixture(str(victim.settings.get("dataset", dataset)))
    scorer = Scorer(victim, images, names, Options(mixture, test.align), precision, seed)
    weak = under_determined(mixture, len(images.trained) // 2, victim.encoder.dim)
    if weak and "dataset-inference" in names:
        print(f"note: {weak}")
    readings = {}
    for path in references:
        reference = _open("independent", path)
        if "dataset-inference" in names and same_source(str(reference.settings.get("dataset")), dataset):
            print(
                f"note: {path} was trained on images of {dataset} too: dataset inference finds fewer copies beside it"
            )
        readings[str(path)] = scorer(reference.encoder)
    names, others = _usable(names, readings), list(readings.values())
    controls = [victim]
    add_control(controls, seed)
    own = {control.kind: stand(scorer(control.encoder), others, names) for control in controls}
    ranked = []
    for suspect in tqdm(suspects, desc="suspects", disable=quiet(), leave=False):
        ranked.append(_ranked(suspect, scorer, victim, others, names, ranking.heads))
    give_verdicts([one.standing for one in ranked if one.standing], len(others), ranking.combine, test.level)
    by = ranking.combine
    ranked.sort(key=lambda one: -one.standing.combined[by] if one.standing else math.inf)
    return Result(ranked, own, others, names, by, test.level, {"dataset": dataset, **images.counts()})


def _ranked(
    suspect: Suspect,
    scorer: Scorer,
    victim: Candidate,
    references: Sequence[Reading],
    names: Sequence[str],
    heads: bool,
) -> Ranked:
    """A suspect's standing, or the reason why it has none."""
    if suspect.reason:
        return Ranked(suspect.name, suspect.reason)
    try:
        candidate = suspect.open()
        reading = scorer(candidate.encoder, heads)
    except (UserError, OSError) as error:
        return Ranked(suspect.name, str(UserError(error)))
    reasons = [f"no {name}: {reading.lacking[name]}" for name in names if name in reading.lacking]
    if not common_scores([reading], names):
        return Ranked(suspect.name, "; ".join(reasons))
    standing = stand(reading, references, names)
    standing.doubted = begin_alike(candidate, victim)
    if standing.doubted:
        reasons.append("it began with the victim's initial weights, which alone make encoders similar")
    return Ranked(suspect.name, "; ".join(reasons), standing)


def _usable(names: Sequence[str], readings: Mapping[str, Reading]) -> list[str]:
    """The scores that all references have; a line for each of the others. UserError where none is left."""
    usable = common_scores(list(readings.values()), names)
    for name in (name for name in names if name not in usable):
        path, reading = next((path, reading) for path, reading in readings.items() if name in reading.lacking)
        print(f"note: not ranked by {name}, which {path} cannot have: {reading.lacking[name]}")
    if not usable:
        raise UserError("no score is left that all references have: give references of the victim's width")
    return usable
