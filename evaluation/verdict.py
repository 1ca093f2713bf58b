"""Verdicts on encoders by the figures of ownership.py, a table of them, and the ROC over all encoders."""

from collections.abc import Sequence
from pathlib import Path

from evaluation.ownership import METHODS, Candidate, Figures, OwnershipTest
from evaluation.rows import encoder_row
from evaluation.statistics import roc
from training.run import CHECKPOINT, Run


def judge_all(test: OwnershipTest, candidates: Sequence[Candidate]) -> None:
    """Fill in figures and verdicts; an independent encoder is compared with the other independent encoders."""
    method = METHODS[test.method]
    for candidate in candidates:
        others = [other.measured for other in candidates if other.kind == "independent" and other is not candidate]
        candidate.figures = method.judge(candidate.measured, others)
    decides = passes(candidates[0].figures, test.level)
    for candidate in candidates:
        figures, is_victim = candidate.figures, candidate.kind == "victim"
        candidate.found = passes(figures, test.level) if decides or is_victim else None
        if is_victim:
            finding = "found, so the method works" if decides else "not found, so the method cannot decide here"
        else:
            finding = ("stolen" if candidate.found else "no proof of theft") if decides else "undecided"
        tests = ", ".join(f"{name[2:]} p = {value:.3g}" for name, value in p_values(figures).items())
        facts = f"{method.claim.format(**figures)}; effect size {figures['effect']:.2f}; {tests}"
        facts += caveat(figures) if decides and not is_victim else ""
        candidate.verdict = f"{finding} at level {test.level:g} ({facts})"


def p_values(figures: Figures) -> Figures:
    return {name: value for name, value in figures.items() if name.startswith("p_")}


def passes(figures: Figures, level: float) -> bool:
    """Whether every p-value is below the level."""
    return all(value < level for value in p_values(figures).values())


def caveat(figures: Figures) -> str:
    """The end of a verdict, which says what it lacks without independent encoders."""
    if "p_encoders" in figures:
        return ""
    alone = "" if "p_t" in figures else "by the binomial test against 50 % alone, "
    return f"; {alone}not compared with the spread of independent encoders: an innocent encoder may pass"


# ---- showing ---------------------------------------------------------------------------------------------------------


def verdict_table(candidates: Sequence[Candidate]) -> str:
    """A Markdown row for each encoder."""
    found = {True: "yes", False: "no", None: "undecided"}
    names = list(dict.fromkeys(name for candidate in candidates for name in candidate.figures))
    lines = [f"| kind | {' | '.join(names)} | found | encoder |", "|---" * (len(names) + 3) + "|"]
    for candidate in candidates:
        figures = candidate.figures
        cells = " | ".join(f"{figures[name]:.3g}" if name in figures else "" for name in names)
        lines.append(f"| {candidate.kind} | {cells} | {found[candidate.found]} | {short_name(candidate.path)} |")
    return "\n".join(lines)


def verdict_lines(candidates: Sequence[Candidate]) -> list[str]:
    """The verdicts on the victim and the suspects, in words."""
    return [f"{case.kind} {short_name(case.path)}: {case.verdict}" for case in candidates if case.kind != "independent"]


def short_name(path: Path) -> str:
    return path.parent.name if path.name == CHECKPOINT else path.name


def detection_rates(test: OwnershipTest, candidates: Sequence[Candidate]) -> tuple[list[str], Figures]:
    """How well the rule and the method's score tell suspects from independent encoders, in words and as figures."""
    groups = {kind: [case for case in candidates if case.kind == kind] for kind in ("suspect", "independent")}
    hits = {kind: [bool(case.found) for case in group] for kind, group in groups.items()}
    lines = [
        f"{kind} encoders found at level {test.level:g}: {sum(hits[kind])} of {len(group)}; "
        f"{_each_test(group, test.level)}"
        for kind, group in groups.items()
        if group
    ]
    if min(map(len, groups.values())) < 2:
        return [*lines, "no ROC is drawn: it needs at least two suspects and two independent encoders"], {}
    name = METHODS[test.method].score
    points, area = roc(*([case.figures[name] for case in group] for group in groups.values()))
    steps = ", ".join(f"{100 * false:.0f}/{100 * hit:.0f}" for false, hit in points)
    lines.append(f"ROC by {name}: AUC {area:.3f}; false accusations/detections in %: {steps}")
    return lines, {"auc": area, "false_accusations": sum(hits["independent"]) / len(hits["independent"])}


def _each_test(group: Sequence[Candidate], level: float) -> str:
    """How many of the encoders each test would find alone, in words."""
    tests = list(dict.fromkeys(name for case in group for name in p_values(case.figures)))
    counts = {name: sum(case.figures.get(name, 1) < level for case in group) for name in tests}
    return "each test alone: " + ", ".join(f"{name[2:]} {count}" for name, count in counts.items())


def add_verdict_rows(run: Run, test: OwnershipTest, candidates: Sequence[Candidate], more: dict) -> None:
    """Add a row for each suspect to the run's results; `more` is the same in all rows."""
    independents = sum(case.kind == "independent" for case in candidates)
    suspects = [case for case in candidates if case.kind == "suspect"]
    for step, case in enumerate(suspects):
        about = {"method": test.method, "level": test.level, **case.figures, "found": case.found}
        about |= {"verdict": case.verdict, "independents": independents}
        more = {"victim": str(candidates[0].path), **more}
        run.add_row(encoder_row(case.kind, case.encoder, case.path, case.checkpoint, {}, about, more), step)
