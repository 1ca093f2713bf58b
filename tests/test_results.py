"""The statistics of an experiment's table, against scipy and statsmodels; its files, pictures, claims and page."""

import base64
import csv
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from evaluation.rows import packed
from experiments import pictures
from experiments.claims import verdicts
from experiments.grid import Grid
from experiments.report import PARTS, write_report
from experiments.results import Prices, Results
from experiments.table import Layout, frames

IMAGES = 200
EXPERIMENT = {
    "about": "Losses & <defences>.",
    "axes": {
        "loss": ["mse", "infonce"],
        "defence": {"none": "", "noise": {"text": "--defence noise --sigma", "values": [0.5, 1]}},
        "queries": [100, 1000],
        "victim_seed": [0, 1, 2],
        "seed": [0, 1],
    },
    "scales": {"demo": {"most": 1000}},
    "steps": {
        "victim": "run.py --seed {victim_seed}",
        "copy": "steal.py --victim {victim} --losstype {loss} {defence} --num_queries {queries} --seed {seed}",
        "judged": "linear_eval.py --stolen {copy}",
        "user": "legitimate.py --victim {victim} {defence}",
        "proof": "verify.py --victim {victim} --suspect {copy*}",
    },
    "table": {
        "of": "judged",
        "lines": ["defence", "loss"],
        "across": "queries",
        "columns": {
            "copy": {"of": "judged.top1_converged", "best": "max"},
            "to none": {"of": "judged.top1_converged", "to": {"defence": "none"}},
            "user": "user.top1_converged",
            "mark": "proof.accuracy",
            "queries": "judged.queries",
            "dollars": "copy.dollars",
            "to user": {"of": "judged.top1_converged", "than": "user.top1_converged"},
            "cost": {"of": "copy.run_seconds", "per": "victim.run_seconds"},
            "stolen": "proof.found",
        },
    },
    "pictures": {
        "curve": {"kind": "curve", "x": "queries", "y": "judged.top1_converged", "lines": "loss"},
        "heat": {"kind": "heat", "x": "loss", "y": "defence", "of": "judged.top1_converged"},
        "sides": {"kind": "sides", "copy": "judged.top1_converged", "user": "user.top1_converged", "lines": "defence"},
        "roc": {"kind": "roc", "of": "user.roc", "curves": {"plain": "task_plain", "unknown": "task_none"}},
        "map": {"kind": "map", "of": "judged.map", "lines": "loss"},
    },
    "published": [{"source": "a paper", "accuracy": 61.5}],
    "claims": [
        {
            "claim": "infonce is better",
            "of": "judged.top1_converged",
            "more": {"loss": "infonce"},
            "less": {"loss": "mse"},
        },
        {
            "claim": "infonce is better by 50",
            "of": "judged.top1_converged",
            "more": {"loss": "infonce"},
            "less": {"loss": "mse"},
            "by": 50,
        },
        {
            "claim": "a copy is better than a user",
            "of": "judged.top1_converged",
            "than": "user.top1_converged",
            "more": {"queries": "{most}"},
            "less": {"loss": "mse"},
        },
    ],
}


def accuracy_of(at) -> float:
    """A made-up accuracy: infonce is some ten points better, the rest moves it a little."""
    noise = 3 * int(at["victim_seed"]) + int(at["seed"]) * (1 + int(at["victim_seed"]))
    return 50 + 10 * (at["loss"] == "infonce") + noise - {"none": 0, "noise 0.5": 4, "noise 1": 8}[at["defence"]]


def answers(accuracy: float, seed: int) -> torch.Tensor:
    right = torch.arange(IMAGES) < round(accuracy / 100 * IMAGES)
    return right[torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))]


@pytest.fixture
def grid(tmp_path):
    return grid_with(tmp_path)


def grid_with(folder: Path, **changes) -> Grid:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**EXPERIMENT, **changes}, sort_keys=False))
    return Grid(path, "demo", folder / "runs", PARTS)


def lines_of(grid: Grid) -> list[dict]:
    """A line for each cell, as the runner writes it."""
    lines = []
    for cell in grid.unique():
        at = dict(cell.at)
        line = {
            "command": cell.command,
            "commit": "0123456789abcdef",
            "queries": None,
            "run_seconds": 3600.0 if cell.step == "victim" else 900.0 * (1 + int(at.get("victim_seed", 0))),
            "rows": [],
        }
        if cell.step == "copy":
            line["queries"] = int(at["queries"])
        if cell.step == "judged":
            value = accuracy_of(at)
            right = {"right": packed(answers(value, len(lines))), "test_images": IMAGES, "test_digest": "d"}
            plane = {"encoder": [[0.0, 1.0], [0.5, -1.0]], "victim": [[1.0, 1.0], [0.0, 0.0]], "labels": [0, 1]}
            line["rows"] = [{"top1_converged": value, "queries": int(at["queries"]), "map": plane, **right}]
        if cell.step == "user":
            curves = {"task_plain": [[0.0, 0.0], [0.0, 0.5], [0.5, 1.0], [1.0, 1.0]]}
            line["rows"] = [{"top1_converged": 70.0 + int(at["victim_seed"]) - len(at["defence"]), "roc": curves}]
        if cell.step == "proof":
            copies = [need for need in cell.needs if need.step == "copy"]
            place = [(str(copy.folder / "checkpoint.pth.tar"), float(i)) for i, copy in enumerate(copies)]
            found = (True, None, False)[int(at["victim_seed"])]
            line["rows"] = [{"checkpoint": path, "accuracy": value, "found": found} for path, value in place]
        lines.append(line)
    return lines


@pytest.fixture
def results(grid):
    return Results(grid, lines_of(grid), ["victim_seed", "seed"])


AT = {"loss": "mse", "defence": "none", "queries": "100"}


def test_over_several_victims_the_interval_is_of_their_means(results):
    found = results.estimate("judged.top1_converged", AT)
    means = [np.mean([accuracy_of({**AT, "victim_seed": victim, "seed": seed}) for seed in "01"]) for victim in "012"]
    low, high = DescrStatsW(means).tconfint_mean()
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(means), low, high))
    assert found.n == "3 x 2"


def test_of_a_single_victim_the_interval_is_over_the_seeds(tmp_path):
    axes = {**EXPERIMENT["axes"], "victim_seed": [1]}
    grid = grid_with(tmp_path, axes=axes)
    found = Results(grid, lines_of(grid), ["victim_seed", "seed"]).estimate("judged.top1_converged", AT)
    low, high = DescrStatsW([accuracy_of({**AT, "victim_seed": 1, "seed": seed}) for seed in "01"]).tconfint_mean()
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.n == "2"


def test_a_single_run_has_the_intervals_of_shares(tmp_path):
    axes = {**EXPERIMENT["axes"], "victim_seed": [0], "seed": [0]}
    grid = grid_with(tmp_path, axes=axes)
    lines = lines_of(grid)
    results = Results(grid, lines, ["victim_seed", "seed"])
    found = results.estimate("judged.top1_converged", AT)
    low, high = proportion_confint(round(found.mean / 100 * IMAGES), IMAGES, method="beta")
    assert (found.low, found.high, found.n) == (pytest.approx(100 * low), pytest.approx(100 * high), "1")
    other = {**AT, "loss": "infonce"}
    gap = results.difference("judged.top1_converged", other, AT)
    rows = [results.row("judged", {**at, "victim_seed": "0", "seed": "0"}) for at in (other, AT)]
    right = [np.unpackbits(np.frombuffer(base64.b64decode(row["right"]), np.uint8))[:IMAGES] for row in rows]
    table = [[int(((right[0] == a) & (right[1] == b)).sum()) for b in (1, 0)] for a in (1, 0)]
    assert gap.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert gap.mean == pytest.approx(10)
    assert gap.low < 10 < gap.high
    rows[0]["test_digest"] = "others"
    for line in lines:
        for row in line["rows"]:
            if row.get("right") == rows[0]["right"]:
                row["test_digest"] = "others"
    unpaired = Results(grid, lines, ["victim_seed", "seed"]).difference("judged.top1_converged", other, AT)
    assert (unpaired.mean, unpaired.low, unpaired.p) == (pytest.approx(10), None, None)


def test_differences_are_of_runs_with_the_same_seeds(results):
    other = {**AT, "defence": "noise 1"}
    found = results.difference("judged.top1_converged", other, AT)
    assert (found.mean, found.low, found.high) == (pytest.approx(-8), pytest.approx(-8), pytest.approx(-8))
    assert found.n == "3 x 2"
    assert found.decided


def test_what_has_not_run_is_left_out(grid):
    lines = [line for line in lines_of(grid) if "--losstype infonce" not in line["command"]]
    results = Results(grid, lines, ["victim_seed", "seed"])
    assert results.estimate("user.top1_converged", AT) is not None
    few = [line for line in lines if not line["rows"] or "top1_converged" not in line["rows"][0]]
    assert Results(grid, few, ["victim_seed", "seed"]).estimate("judged.top1_converged", AT) is None


def test_a_step_that_knows_fewer_axes_gives_each_line_its_figure(results):
    assert results.estimate("user.top1_converged", AT).n == "3 x 1"
    assert results.estimate("user.top1_converged", {**AT, "defence": "noise 1"}).mean == 71 - len("noise 1")


def test_of_the_rows_of_several_encoders_a_line_has_its_own(results, grid):
    copies = [cell for cell in grid.unique() if cell.step == "copy" and dict(cell.at)["victim_seed"] == "1"]
    assert results.estimate("proof.accuracy", AT).n == "3 x 2"
    for position, copy in enumerate(copies):
        row = results.row("proof", dict(copy.at))
        assert row["accuracy"] == position


def test_an_encoder_that_is_judged_beside_several_victims_is_a_single_run(grid):
    """As an attacker's own encoder, which is the same whoever the victim is."""
    lines = lines_of(grid)
    one = Results(grid, lines, ["victim_seed", "seed"]).row("judged", {**AT, "victim_seed": "0", "seed": "0"})
    here = {cell.command for at, cell in grid.cells["judged"].items() if AT.items() <= dict(at).items()}
    for line in lines:
        if line["command"] in here:
            line["rows"] = [{**line["rows"][0], "top1_converged": one["top1_converged"], "right": one["right"]}]
    results = Results(grid, lines, ["victim_seed", "seed"])
    found = results.estimate("judged.top1_converged", AT)
    low, high = proportion_confint(round(found.mean / 100 * IMAGES), IMAGES, method="beta")
    assert (found.mean, found.low, found.high) == pytest.approx((one["top1_converged"], 100 * low, 100 * high))
    assert found.n == "1"
    words, _ = frames(Layout(grid), results)
    assert words["n"][0] == "1, differences 3 x 2"


def test_a_copy_is_compared_with_what_has_fewer_seeds(results):
    """Each of a user's figures, which know no loss and no seed of an attacker, with those of the same victim."""
    found = results.difference("judged.top1_converged", AT, AT, "user.top1_converged")
    values = [
        np.mean([accuracy_of({**AT, "victim_seed": victim, "seed": seed}) for seed in "01"])
        - (70 + int(victim) - len("none"))
        for victim in "012"
    ]
    assert (found.mean, found.n) == (pytest.approx(np.mean(values)), "3 x 2")
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue) if np.std(values) > 0 else found.p is None


def test_a_cost_is_in_percent_of_its_own_victims(grid, results):
    """Copies of the victims 0, 1 and 2 take a quarter, a half and three quarters of an hour, each victim an hour."""
    found = results.share("copy.run_seconds", AT, "victim.run_seconds")
    assert (found.mean, found.n) == (pytest.approx(50), "3 x 2")
    words, _ = frames(Layout(grid), results)
    assert words["100: cost"][0].startswith("50.0 [")


def test_what_a_test_could_not_decide_is_counted(grid, results):
    words, _ = frames(Layout(grid), results)
    assert results.undecided("proof.found", AT) == 2
    assert set(words["100: stolen"]) == {"2 of 4, 2 undecided"}


def test_costs_are_of_hours_and_queries(grid):
    results = Results(grid, lines_of(grid), ["victim_seed", "seed"], Prices(thousand_queries=2.0, hour=3.0))
    assert results.estimate("copy.dollars", {**AT, "queries": "1000"}).mean == pytest.approx(2 + 3 * 0.5)


def test_bold_is_the_best_whose_lead_is_decided(grid, results):
    words, numbers = frames(Layout(grid), results)
    column = words["100: copy"]
    assert [text.startswith("**") for text in column] == [False, True, False, False, False, False]
    assert list(words["defence"]) == ["none", "none", "noise 0.5", "noise 0.5", "noise 1", "noise 1"]
    assert list(words["n"]) == ["3 x 2"] * 6
    assert numbers["100: copy (mean)"][1] == pytest.approx(
        results.estimate("judged.top1_converged", {**AT, "loss": "infonce"}).mean
    )
    assert words["100: to none"][0] == "", "a line is not compared with itself"


def test_a_claim_is_decided_by_the_interval_of_the_difference(grid, results):
    first, second, third = verdicts(grid, results)
    assert (first.verdict, second.verdict) == ("holds", "does not")
    of = ("judged.top1_converged", "user.top1_converged")
    here, there = (results.estimate(name, {**AT, "queries": "1000"}).mean for name in of)
    assert f"difference {here - there:+.1f}" in third.evidence
    assert third.evidence.startswith(f"judged.top1_converged at queries 1000: {here:.1f} [")
    assert f"; user.top1_converged at loss mse: {there:.1f} [" in third.evidence
    assert "difference +10.0" in first.evidence
    nothing = verdicts(grid, Results(grid, [], ["victim_seed", "seed"]))
    assert {one.verdict for one in nothing} == {"not measured"}


def test_a_single_run_decides_no_claim(tmp_path):
    axes = {**EXPERIMENT["axes"], "victim_seed": [0], "seed": [0]}
    grid = grid_with(tmp_path, axes=axes)
    results = Results(grid, lines_of(grid), ["victim_seed", "seed"])
    assert {one.verdict for one in verdicts(grid, results)} == {"undecided"}


class _Page(html.parser.HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self):
        super().__init__()
        self.sources, self.text, self.open = [], "", []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_files_of_an_experiment_are_written(grid, tmp_path):
    text = write_report(grid, lines_of(grid), tmp_path / "out", Prices())
    out = tmp_path / "out"
    assert (out / "table.md").read_text() == text
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert len(rows) == 6
    assert float(rows[0]["100: copy (low)"]) < float(rows[0]["100: copy (mean)"]) < float(rows[0]["100: copy (high)"])
    assert [one["verdict"] for one in json.loads((out / "claims.json").read_text())][:2] == ["holds", "does not"]
    for name in EXPERIMENT["pictures"]:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    page = _Page()
    page.feed((out / "report.html").read_text())
    assert page.open == []
    assert all(source.startswith("data:") for source in page.sources), "the page needs no other file"
    assert len(page.sources) == 1 + len(EXPERIMENT["pictures"])
    assert "Losses & <defences>." in page.text
    assert "a paper" in page.text
    assert "61.5" in page.text
    assert page.text.index("infonce is better") < page.text.index("noise 0.5")


def drawn(grid, results, name, monkeypatch):
    """The axes of a picture, before its figure is closed."""
    from matplotlib import pyplot

    kept = {}
    monkeypatch.setattr(pyplot, "close", lambda figure: kept.setdefault(len(kept), figure))
    pictures.draw(grid, results, grid.path.parent)
    names = list(pictures.declared_pictures(grid))
    return kept[names.index(name)].axes


def test_a_roc_is_the_mean_of_the_runs_curves(grid, results, monkeypatch):
    (axes,) = drawn(grid, results, "roc", monkeypatch)
    curve, chance = axes.lines
    assert curve.get_label() == "plain (n 3)", "a curve that no run has is left out"
    found = dict(zip(np.round(curve.get_xdata(), 3), curve.get_ydata(), strict=True))
    assert (found[0.0], found[0.25], found[0.5], found[1.0]) == (0.5, 0.5, 1.0, 1.0)
    assert list(chance.get_xdata()) == [0, 1]


def test_maps_stand_side_by_side_the_victims_first(grid, results, monkeypatch):
    panels = drawn(grid, results, "map", monkeypatch)
    assert [panel.get_title() for panel in panels] == ["victim", "mse", "infonce"]
    assert panels[0].collections[0].get_offsets().tolist() == [[1, 1], [0, 0]]
    assert panels[2].collections[0].get_offsets().tolist() == [[0, 1], [0.5, -1]]


def test_the_same_results_give_the_same_files(grid, tmp_path):
    for name in ("a", "b"):
        write_report(grid, lines_of(grid), tmp_path / name, Prices())
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_report_before_any_run_has_ended_says_so(grid, tmp_path):
    write_report(grid, [], tmp_path / "out", Prices())
    assert "0 of" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
def test_the_table_compiles(grid, tmp_path):
    write_report(grid, lines_of(grid), tmp_path, Prices())
    body = (tmp_path / "table.tex").read_text()
    paper = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{body}\\end{{document}}\n"
    (tmp_path / "paper.tex").write_text(paper)
    done = subprocess.run(["pdflatex", "-halt-on-error", "paper.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_table_for_papers_uses_booktabs_and_escapes(grid, tmp_path):
    write_report(grid, lines_of(grid), tmp_path, Prices())
    body = (tmp_path / "table.tex").read_text()
    assert all(rule in body for rule in ("\\toprule", "\\midrule", "\\bottomrule"))
    assert "**" not in body
    assert "\\bfseries" in body
    assert not re.search(r"(?<!\\)[%_&#]", body.replace(" & ", " "))
