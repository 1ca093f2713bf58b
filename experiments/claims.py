"""Claims of papers, checked against an experiment's results.

    claims:
      - claim: Contrastive losses steal best
        of: judged.top1_converged        # the figure
        more: {loss: infonce}            # is greater here ...
        less: {loss: mse}                # ... than here
        than: owner.top1_converged       # the figure there, if it is another one
        by: 0                            # by more than this; may be left out
        at: {budget: "{budget}"}         # further axes; those that are left out take their first value

A claim holds where the 95 % interval of the difference lies above `by`, does not where it lies below, and is undecided
otherwise. A single run decides nothing: its interval is over the test images, not over seeds. Without `less` the figure
itself is compared with `by`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.grid import Grid
from experiments.parts import part_of
from experiments.results import Estimate, Results
from files.reading import Check, list_of, number, table, text

_CLAIM: dict[str, Check] = {"claim": text(), "of": text(), "than": text(), "by": number()}
_CLAIM |= {"more": table(), "less": table(), "at": table()}
PARTS: dict[str, Check] = {"claims": list_of(table())}


@dataclass(frozen=True)
class Verdict:
    """What an experiment says of a claim: holds, does not, undecided or not measured; and the evidence in words."""

    claim: str
    verdict: str
    evidence: str
    n: str


def check_claims(grid: Grid) -> None:
    """UserError for claims that the file does not say rightly."""
    for position, claim in enumerate(grid.content.get("claims", []), 1):
        where = f"{grid.path}: claim {position}"
        part_of(claim, _CLAIM, where, needed=("claim", "of", "more"))
        for figure in ("of", "than"):
            grid.check_figure(claim.get(figure, claim["of"]), where)
        for part in ("more", "less", "at"):
            grid.check_values(_point(claim, part, grid), f"{where}, {part}")


def _point(claim: Mapping, part: str, grid: Grid) -> dict[str, str]:
    """A claim's values of axes; one may be an entry of the scale."""
    where = f"{grid.path}: {claim['claim']}"
    return {axis: grid.with_entries(str(name), where, whole=True) for axis, name in claim.get(part, {}).items()}


def verdicts(grid: Grid, results: Results) -> list[Verdict]:
    """The verdict on each claim."""
    return [_verdict(claim, grid, results) for claim in grid.content.get("claims", [])]


def _verdict(claim: Mapping, grid: Grid, results: Results) -> Verdict:
    by = claim.get("by", 0)
    first = {axis: values[0].name for axis, values in grid.axes.items()}
    at, *ends = (_point(claim, part, grid) for part in ("at", "more", "less"))
    more, less = ({**first, **at, **end} for end in ends)
    here = results.estimate(claim["of"], more)
    than = claim.get("than", claim["of"])
    there = results.estimate(than, less) if "less" in claim else None
    found = results.difference(claim["of"], more, less, than) if "less" in claim else here
    if found is None:
        return Verdict(claim["claim"], "not measured", "", "0")
    shown, other = (", ".join(f"{axis} {name}" for axis, name in end.items()) for end in ends)
    if than != claim["of"]:
        shown, other = f"{claim['of']} at {shown}", f"{than} at {other}"
    words = f"{shown}: {_words(here)}"
    if there:
        words += f"; {other}: {_words(there)}; difference {_words(found, '+')}"
    return Verdict(claim["claim"], _decision(found, by), words + (f", to be above {by:g}" if by else ""), found.n)


def _decision(found: Estimate, by: float) -> str:
    if found.low is None or found.runs < 2:
        return "undecided"
    return "holds" if found.low > by else "does not" if found.high < by else "undecided"


def _words(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return "not measured"
    ends = "" if estimate.low is None else f" [{estimate.low:{sign}.1f}, {estimate.high:{sign}.1f}]"
    return f"{estimate.mean:{sign}.1f}{ends}"
