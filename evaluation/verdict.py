"""Verdicts on encoders by the figures of ownership.py, a table of them, and the ROC over all encoders."""

import math
from collections.abc import Sequence
from pathlib import Path

from evaluation.candidates import Candidate, Figures, OwnershipTest
from evaluation.ownership import METHODS, Counts
from evaluation.rows import encoder_row
from evaluation.statistics import auc_interval, holm, rate_interval, roc
from training.run import CHECKPOINT, Run

AMONG_SECRETS = ("p_keys", "p_maps")  # tests that compare the owner's secret with others
CONTROLS = ("victim", "untrained")  # kinds of encoders of which is known what a method has to say


def judge_all(test: OwnershipTest, candidates: Sequence[Candidate]) -> None:
    """Fill in figures and verdicts; an independent encoder is compared with the other independent encoders.

    A suspect's p_holm is the largest of its p-values, since it has to pass all tests, adjusted for the number of
    suspects. All other encoders are judged as if each was the only suspect. Nothing is decided where the victim is not
    found, or an untrained encoder is: beside all independent encoders, or for one of them beside the others.
    """
    for candidate in candidates:
        candidate.figures = _figures(test, candidate, _independents(candidates, without=candidate))
    suspects = [candidate for candidate in candidates if candidate.kind == "suspect"]
    for suspect, p in zip(suspects, holm([_largest_p(suspect.figures) for suspect in suspects]), strict=True):
        suspect.figures["p_holm"] = p
    decides = _decides(test, candidates)
    for candidate in candidates:
        figures, is_control = candidate.figures, candidate.kind in CONTROLS
        here = _decides(test, candidates, without=candidate) if candidate.kind == "independent" else decides
        decided = is_control or (here and not candidate.doubt)
        candidate.found = passes(figures, test.level) if decided else None
        facts = f"{METHODS[test.method].claim.format(**figures)}; effect size {figures['effect']:.2f}; "
        facts += _in_words(figures)
        facts += f"; {candidate.doubt}" if candidate.doubt else caveat(figures) if decides and not is_control else ""
        candidate.verdict = f"{_finding(candidate, decides)} at level {test.level:g} ({facts})"


def _independents(candidates: Sequence[Candidate], without: Candidate | None = None) -> list[Candidate]:
    return [other for other in candidates if other.kind == "independent" and other is not without]


def _figures(test: OwnershipTest, candidate: Candidate, independents: Sequence[Candidate]) -> Figures:
    return METHODS[test.method].judge(candidate.measured, [other.measured for other in independents])


def _decides(test: OwnershipTest, candidates: Sequence[Candidate], without: Candidate | None = None) -> bool:
    """Whether the method finds the victim and no untrained encoder, beside the independent encoders but `without`."""
    others = _independents(candidates, without)
    return all(
        passes(_figures(test, control, others), test.level) == (control.kind == "victim")
        for control in candidates
        if control.kind in CONTROLS
    )


def _finding(candidate: Candidate, decides: bool) -> str:
    if candidate.kind == "victim":
        works = "found, so the method works" if decides else "found"
        return works if candidate.found else "not found, so the method cannot decide here"
    if candidate.kind == "untrained":
        return "found, so the method cannot decide here" if candidate.found else "not found, as it should be"
    return "undecided" if candidate.found is None else "stolen" if candidate.found else "no proof of theft"


def _in_words(figures: Figures) -> str:
    words = [f"{name[2:]} p = {value:.3g}" for name, value in p_values(figures).items()]
    return ", ".join([*words, *([f"p by Holm {figures['p_holm']:.3g}"] if "p_holm" in figures else [])])


def p_values(figures: Figures) -> Figures:
    """The p-values of the single tests."""
    return {name: value for name, value in figures.items() if name.startswith("p_") and name != "p_holm"}


def _largest_p(figures: Figures) -> float:
    # A p-value that is no number proves nothing, and max() may pass over it.
    return max((1.0 if math.isnan(p) else p for p in p_values(figures).values()), default=1.0)


def passes(figures: Figures, level: float) -> bool:
    """Whether every p-value is below the level, a suspect's after Holm's correction; not without any."""
    return figures.get("p_holm", _largest_p(figures)) < level


def caveat(figures: Figures) -> str:
    """The end of a verdict, which says what it lacks without independent encoders or other secrets."""
    if {"p_encoders", *AMONG_SECRETS} & figures.keys():
        return ""
    alone = "" if "p_t" in figures else "by the binomial test against 50 % alone, "
    return f"; {alone}not compared with the spread of independent encoders: an innocent encoder may pass"


# ---- showing ---------------------------------------------------------------------------------------------------------


def count_words(counts: Counts) -> str:
    """What was measured by, in words: `50 fitted images, full covariance`; switches that are off are left out."""
    shown = {name.replace("_", " "): value for name, value in counts.items() if value is not False}
    return ", ".join(name if value is True else f"{value} {name}" for name, value in shown.items())


def verdict_table(candidates: Sequence[Candidate]) -> str:
    """A Markdown row for each encoder: without p-values over images, which find any difference however small.

    Those over encoders and over secrets are shown.
    """
    found = {True: "yes", False: "no", None: "undecided"}
    names = dict.fromkeys(name for candidate in candidates for name in candidate.figures)
    shown = [name for name in ("p_encoders", *AMONG_SECRETS) if name in names]
    shown += ["p_holm"] if shown else []
    names = [name for name in names if name[:2] != "p_" or name in shown]
    lines = [f"| kind | {' | '.join(names)} | found | encoder |", "|---" * (len(names) + 3) + "|"]
    for candidate in candidates:
        figures = candidate.figures
        cells = " | ".join(f"{figures[name]:.3g}" if name in figures else "" for name in names)
        lines.append(f"| {candidate.kind} | {cells} | {found[candidate.found]} | {short_name(candidate.path)} |")
    return "\n".join(lines)


def verdict_lines(candidates: Sequence[Candidate]) -> list[str]:
    """The verdicts on all encoders but the independent ones, in words."""
    return [f"{case.kind} {short_name(case.path)}: {case.verdict}" for case in candidates if case.kind != "independent"]


def short_name(path: Path) -> str:
    return path.parent.name if path.name == CHECKPOINT else path.name


def detection_rates(test: OwnershipTest, candidates: Sequence[Candidate]) -> tuple[list[str], Figures]:
    """How well the rule and the method's score tell suspects from independent encoders, in words and as figures.

    With 95 % intervals. Where nothing is decided there is no rate.
    """
    groups = {kind: [case for case in candidates if case.kind == kind] for kind in ("suspect", "independent")}
    lines, figures = [], {}
    for kind, group in groups.items():
        if not group:
            continue
        rate, decided = "undecided", [case.found for case in group if case.found is not None]
        if decided:
            hits, number = sum(decided), len(decided)
            low, high = rate_interval(hits, number)
            rate = f"{hits} of {number} ({100 * low:.0f} to {100 * high:.0f} %)"
            rate += f", {len(group) - number} undecided" if number < len(group) else ""
            if kind == "independent":
                shares = {"": hits / number, "_low": low, "_high": high}
                figures = {f"false_accusations{end}": share for end, share in shares.items()}
        lines.append(f"{kind} encoders found at level {test.level:g}: {rate}; {_each_test(group, test.level)}")
    if min(map(len, groups.values())) < 2:
        return [*lines, "no ROC is drawn: it needs at least two suspects and two independent encoders"], figures
    name = METHODS[test.method].score
    scores = [[case.figures[name] for case in group] for group in groups.values()]
    points, area = roc(*scores)
    low, high = auc_interval(*scores)
    steps = ", ".join(f"{100 * false:.0f}/{100 * hit:.0f}" for false, hit in points)
    lines.append(f"ROC by {name}: AUC {area:.3f} ({low:.3f} to {high:.3f}); false accusations/detections in %: {steps}")
    return lines, {"auc": area, "auc_low": low, "auc_high": high, **figures}


def _each_test(group: Sequence[Candidate], level: float) -> str:
    """How many of the encoders each test would find alone, in words."""
    tests = list(dict.fromkeys(name for case in group for name in p_values(case.figures)))
    counts = {name: sum(case.figures.get(name, 1) < level for case in group) for name in tests}
    return "each test alone: " + ", ".join(f"{name[2:]} {count}" for name, count in counts.items())


def add_verdict_rows(run: Run, test: OwnershipTest, candidates: Sequence[Candidate], more: dict) -> None:
    """Add a row for each suspect to the run's results; `more` is the same in all rows."""
    independents = sum(case.kind == "independent" for case in candidates)
    suspects = [case for case in candidates if case.kind == "suspect"]
    for control in (case for case in candidates if case.kind == "untrained"):
        more = {**{f"untrained_{name}": value for name, value in control.figures.items()}, **more}
        more = {"untrained_found": control.found, **more}
    for step, case in enumerate(suspects):
        about = {"method": test.method, "level": test.level, **case.figures, "found": case.found}
        about |= {"verdict": case.verdict, "independents": independents}
        more = {"victim": str(candidates[0].path), **more}
        run.add_row(encoder_row(case.kind, case.encoder, case.path, case.checkpoint, {}, about, more), step)
