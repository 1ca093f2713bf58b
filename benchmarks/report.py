"""The file of results, a row at a time, and the table in Markdown that is made from it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from files.reading import read_json
from files.writing import atomic_path
from utils import Precision

GIGA, MEGA = 1e9, 1e6


class Results:
    """The results of a device in a folder: `<device>.json`, and `<device>.md` made from it.

    A row that is put replaces its earlier entry only. A quick run has files of its own, `<device>-quick`.
    """

    def __init__(self, folder: Path, precision: Precision, quick: bool, order: Sequence[str]):
        folder.mkdir(parents=True, exist_ok=True)
        self.precision, self.order = precision, order
        self.device = machine.slug(precision) + "-quick" * quick
        self.json, self.markdown = (folder / f"{self.device}.{kind}" for kind in ("json", "md"))
        self.head = {
            "device": self.device,
            "machine": machine.describe(precision),
            "versions": machine.versions(precision),
        }

    def put(self, name: str, row: Mapping[str, Any]) -> None:
        """Write a row. One that was left out doesn't replace the figures of an earlier run."""
        content = read_json(self.json, "benchmark results") if self.json.exists() else {"rows": {}}
        rows = content.get("rows", {})
        if "missing" not in row or name not in rows:
            rows[name] = dict(row)
        peak = row.get("share_of_peak", {}).get("peak") or content.get("peak")
        known = [name for name in self.order if name in rows]
        kept = {name: rows[name] for name in [*known, *(rows.keys() - set(known))]}
        # A package that is not here now is that of earlier rows.
        versions = {name: now or content.get("versions", {}).get(name) for name, now in self.head["versions"].items()}
        content = {**self.head, "versions": versions, "peak": peak, "rows": kept}
        _write(self.json, json.dumps(content, indent=1) + "\n")
        _write(self.markdown, as_markdown(content))


def headline(row: Mapping[str, Any]) -> str:
    """A row in a few words, for the terminal."""
    if "missing" in row or "failed" in row:
        return row.get("missing") or row["failed"]
    absent = [f"{name}: {way['missing']}" for name, way in row["ways"].items() if "missing" in way]
    ratios = [f"{x['of']} / {x['over']} {_number(x['median'])}" for x in row.get("ratios", []) if "median" in x]
    ways = [f"{name} {_number(way['median'])} {row['unit']}" for name, way in row["ways"].items() if "median" in way]
    return "; ".join([*(ratios or ways), *absent])


def as_markdown(content: Mapping[str, Any]) -> str:
    """The page of a device's results."""
    rows = content["rows"]
    lines = [f"# Speed: {content['device']}", "", "Made by `python -m benchmarks` from the JSON file beside it.", ""]
    lines += [*_head(content), "", "## Claims", "", *_claims(rows), ""]
    for name, row in rows.items():
        lines += [f"## {row['title']}", "", *_row(name, row), ""]
    return "\n".join(lines)


def _head(content: Mapping[str, Any]) -> list[str]:
    box, versions, peak = content["machine"], content["versions"], content.get("peak")
    there = [f"{name} {version}" for name, version in versions.items() if version and name != "commit"]  # rows have one
    lines = [
        f"- {box['gpu'] or box['cpu']}" + (f", {box['cpu']}" if box["gpu"] else f" ({box['cpu_units']})"),
        f"- {box['threads']} threads, networks in {box['precision']} where `--precision auto` decides",
        f"- {', '.join(there)}",
    ]
    if peak:
        words = f"{_number(peak['flop_per_second'] / GIGA)} GFLOP/s, a {peak['numbers']} product of {peak['side']} rows"
        lines.append(f"- measured peak: {words}")
    return lines


def _claims(rows: Mapping[str, Mapping]) -> list[str]:
    """What the project claims, and whether it was reached."""
    table = []
    for name, row in rows.items():
        for ratio in row.get("ratios", []):
            if "at_least" in ratio:
                table.append([name, f"{ratio['of']} / {ratio['over']}", _measured(ratio), *_verdict(ratio)])
        for claim in row.get("claims", []):
            table.append([name, claim["what"], _number(claim.get("value")), *_verdict(claim)])
    return (
        _table(["row", "what", "measured", "claimed", "reached"], table) if table else ["None of these rows has any."]
    )


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    absent = row.get("missing") or row.get("failed")
    if absent:
        return [f"`{name}`: {absent}"]
    unit, run = row["unit"], row["run"]
    ways = [[way, *_figures(found), found.get("missing", "")] for way, found in row["ways"].items()]
    lines = _table(["", f"median, {unit}", "min", "max", "first call, s", "memory, MB", "missing"], ways)
    if row.get("ratios"):
        ratios = [[f"{x['of']} / {x['over']}", _measured(x), *_verdict(x)] for x in row["ratios"]]
        lines += ["", *_table(["ratio", "median [min, max]", "claimed", "reached"], ratios)]
    lines += _extras(row)
    lines += ["", *(f"- {note}" for note in row.get("notes", []))]
    size = max(run["peak_memory_bytes"].values()) / MEGA
    clock = f", {run['clock_mhz']:.0f} MHz" if run["clock_mhz"] else ""
    rounds = max((len(way.get("rounds", [])) for way in row["ways"].values()), default=0)
    quick = ", quick: says nothing about speed" if run["quick"] else ""
    lines.append(
        f"- `{name}`, {run['date']}, commit {run['commit']}, {rounds} rounds, {run['seconds']:.0f} s in all, "
        f"{run['threads']} threads{clock}, peak memory {size:.0f} MB{quick}"
    )
    return lines


def _extras(row: Mapping[str, Any]) -> list[str]:
    """What only some rows have."""
    lines: list[str] = []
    if "timed" in row:
        lines += ["", f"Timed: {row['timed']}. Scaled to {row['scaled_to']}."]
    if "split" in row:
        parts = ("step", "views", "forward", "backward", "optimizer", "idle")
        table = [[name, *(_number(found[part]) for part in parts)] for name, found in row["split"].items()]
        lines += ["", *_table(["seconds of a step", *parts], table)]
    if "share_of_peak" in row:
        shares = [[name, f"{100 * share:.1f} %"] for name, share in row["share_of_peak"]["ways"].items()]
        lines += ["", *_table(["", "share of the measured peak"], shares)]
    if "share_of_step" in row:
        sizes = row.get("loss_memory_bytes", {})
        table = [
            [name, f"{100 * share:.2f} %", _number(sizes[name] / MEGA) if sizes.get(name) else ""]
            for name, share in row["share_of_step"].items()
        ]
        lines += ["", *_table(["", "share of a step", "memory of the loss, MB"], table)]
    if "scores" in row:
        names = ("top1", "objective", "iterations")
        table = [[name, *(str(found.get(key, "")) for key in names)] for name, found in row["scores"].items()]
        lines += ["", *_table(["", *names], table)]
    return lines


def _figures(way: Mapping[str, Any]) -> list[str]:
    memory = way.get("memory_bytes")
    plain = [_number(way.get(name)) for name in ("median", "min", "max", "first_call_s")]
    return [*plain, f"{memory / MEGA:.0f}" if memory is not None else ""]


def _measured(ratio: Mapping[str, Any]) -> str:
    if "median" not in ratio:
        return "missing"
    return f"{_number(ratio['median'])} [{_number(ratio['min'])}, {_number(ratio['max'])}]"


def _verdict(found: Mapping[str, Any]) -> list[str]:
    """What was claimed, and whether it was reached."""
    claimed = [f"at least {found['at_least']:g}"] if "at_least" in found else []
    claimed += [f"at most {found['at_most']:g}"] if "at_most" in found else []
    reached = {True: "yes", False: "no"}.get(found.get("reached"), "not measured" if claimed else "")
    return [" ".join(claimed), reached]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [list(head), *(list(row) for row in rows)]
    used = [i for i in range(len(lines[0])) if any(row[i] for row in lines[1:])]  # without columns that are empty
    cells = [" | ".join(row[i] for i in used) for row in lines]
    return [f"| {cells[0]} |", "|---" * len(used) + "|", *(f"| {line} |" for line in cells[1:])]


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)
