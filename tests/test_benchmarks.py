"""The benchmarks run, at sizes that say nothing about speed."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import defences, scaling, steps
from benchmarks.__main__ import ROWS, main, names_of
from benchmarks.report import Results, as_markdown
from benchmarks.row import Ratio, claim, make_row
from benchmarks.timing import Contest, Effort, Missing, peer
from defenses import Call
from models import build_encoder
from tests.conftest import ROOT
from utils import Precision

CPU = Precision("fp32", torch.device("cpu"))
RUN = {"date": "", "commit": "", "seconds": 1, "threads": 1, "clock_mhz": None, "quick": False}
RUN["peak_memory_bytes"] = {"resident": 1}
ABSENT = "kornia is not installed: pip install -r requirements-bench.txt"


def run(folder, *words):
    """The real command, on a machine without kornia; returns its output, and what it has written as JSON."""
    (folder / "kornia.py").write_text("raise ModuleNotFoundError(\"No module named 'kornia'\", name='kornia')\n")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--out", str(folder / "out"), *words]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "out").glob("*.json")
    return done.stdout, json.loads(file.read_text()), file


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    return folder, *run(folder, "--rows", "views-simclr", "growth-ledger")


def test_the_file_says_where_and_how_each_row_was_measured(written):
    _, _, content, file = written
    assert content["device"] == file.stem
    assert file.stem.endswith("-1-threads-quick")
    assert content["machine"]["threads"] == 1
    assert content["versions"].keys() >= {"python", "commit", "torch", "torchvision", "lightly", "kornia"}
    assert list(content["rows"]) == ["views-simclr", "growth-ledger"]
    for row in content["rows"].values():
        assert row["run"].keys() >= {"commit", "date", "seconds", "rounds", "threads", "clock_mhz"}
        assert row["run"]["peak_memory_bytes"]["resident"] > 50e6
        assert row["run"]["quick"]


def test_a_row_has_figures_of_each_way_and_their_ratio(written):
    row = written[2]["rows"]["growth-ledger"]
    empty, full = row["ways"].values()
    assert 0 < empty["min"] <= empty["median"] <= empty["max"]
    (ratio,) = row["ratios"]
    assert ratio["median"] == pytest.approx(empty["median"] / full["median"], rel=1e-3)


def test_a_peer_that_is_missing_is_named_and_the_others_go_on(written):
    _, out, content, file = written
    row = content["rows"]["views-simclr"]
    assert row["ways"]["kornia"] == {"missing": ABSENT}
    assert {"ours", "torchvision v2, batched", "torchvision on PIL, one process"} <= {
        name for name, way in row["ways"].items() if "median" in way
    }
    assert ABSENT in out
    page = file.with_suffix(".md").read_text()
    assert page.count(ABSENT) == 1
    assert "| views-simclr | ours / kornia | missing | at least 5 | not measured |" in page


def test_the_page_is_made_from_the_file(written):
    _, _, content, file = written
    page = file.with_suffix(".md").read_text()
    assert page == as_markdown(content)
    table = [line for line in page.splitlines() if line.startswith("| empty |")]
    assert f"{content['rows']['growth-ledger']['ways']['empty']['median']:.4g}" in table[0]


def test_a_row_that_runs_again_replaces_its_own_entry_only(written):
    folder, _, before, _ = written
    _, after, file = run(folder, "--rows", "growth-ledger")
    assert list(after["rows"]) == list(before["rows"])
    assert after["rows"]["views-simclr"] == before["rows"]["views-simclr"]
    assert after["rows"]["growth-ledger"] != before["rows"]["growth-ledger"]
    assert not list(file.parent.glob(".*"))


def test_a_package_that_is_gone_is_that_of_earlier_rows(tmp_path):
    results = Results(tmp_path / "out", CPU, False, ["one", "two"])
    row = make_row("title", Contest(Effort(CPU)), "s") | {"run": RUN}
    results.head["versions"] |= {"kornia": "0.9.0", "numpy": "1"}
    results.put("one", row)
    results.head["versions"] |= {"kornia": None, "numpy": "2"}
    results.put("two", row)
    versions = json.loads(results.json.read_text())["versions"]
    assert (versions["kornia"], versions["numpy"]) == ("0.9.0", "2")


def test_what_was_left_out_replaces_no_figures(tmp_path):
    results = Results(tmp_path / "out", CPU, False, ["one", "two", "three"])
    figures, absent = make_row("title", Contest(Effort(CPU)), "s"), {"title": "one", "missing": "left out"}
    results.put("three", figures | {"run": RUN})
    results.put("one", absent)
    results.put("three", absent)
    rows = json.loads(results.json.read_text())["rows"]
    assert list(rows) == ["one", "three"]
    assert rows["one"] == absent
    assert rows["three"]["ways"] == {}
    results.put("three", {"title": "three", "failed": "failed: why"})
    assert json.loads(results.json.read_text())["rows"]["three"]["failed"] == "failed: why"
    assert "`three`: failed: why" in results.markdown.read_text()


@pytest.mark.slow
def test_every_row_runs(tmp_path):
    _, content, _ = run(tmp_path)
    assert content["rows"].keys() == ROWS.keys()
    absent = {name: row["missing"] for name, row in content["rows"].items() if "missing" in row}
    assert absent == {"start-compiled": "left out by --quick"}
    allowed = ("left out by --quick", "kornia is not installed", "lightly is not installed")
    ways = [way for row in content["rows"].values() for way in row.get("ways", {}).values() if "missing" in way]
    assert not [way for way in ways if not way["missing"].startswith(allowed)]


def test_rows_are_chosen_by_name_or_first_word(capsys, monkeypatch):
    assert names_of([]) == list(ROWS)
    assert names_of(["views", "step-resnet18"]) == [
        name for name in ROWS if name == "step-resnet18" or name.startswith("views-")
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--rows", "stepp"])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no row 'stepp': choose from step-" in error


# ---- contests --------------------------------------------------------------------------------------------------------


def test_ways_take_turns_and_the_first_call_does_not_count():
    calls, contest = [], Contest(Effort(CPU, rounds=2))
    for name in "ab":
        contest.add(name, lambda name=name: lambda: calls.append(name), amount=2)
    contest.add("own", lambda: lambda: 6.0, amount=2, own_clock=True)
    seconds = contest.run()
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [len(values) for values in seconds.values()] == [2, 2, 2]
    assert seconds["own"] == [3.0, 3.0]


def test_no_round_begins_after_the_time_is_spent():
    contest = Contest(Effort(CPU, rounds=5, seconds=1e-9))
    contest.add("a", lambda: lambda: None)
    assert len(contest.run()["a"]) == 1


def test_a_way_that_fails_is_noted_and_the_others_go_on():
    calls = []

    def fails_later():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("in the second round\nmore")

    contest = Contest(Effort(CPU, rounds=3))
    contest.add("good", lambda: lambda: None)
    contest.add("bad", lambda: lambda: 1 / 0)
    contest.add("late", lambda: fails_later)
    contest.add("absent", lambda: peer("a_package_that_is_not_there"))
    assert contest.run().keys() == {"good"}
    assert contest.missing == {
        "bad": "failed: ZeroDivisionError: division by zero",
        "late": "failed: RuntimeError: in the second round",
        "absent": "a_package_that_is_not_there is not installed: pip install -r requirements-bench.txt",
    }
    row = make_row("title", contest, "s", [Ratio("good", "bad", 2.0)])
    assert list(row["ways"]) == ["good", "bad", "late", "absent"]
    assert row["ratios"][0]["missing"] == "bad: failed: ZeroDivisionError: division by zero"


def test_a_peer_that_is_broken_says_how(tmp_path, monkeypatch):
    (tmp_path / "a_broken_package.py").write_text("import another_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Missing, match="a_broken_package cannot be imported: No module named 'another_that"):
        peer("a_broken_package")


def test_ratios_are_of_rounds_and_claims_are_judged():
    contest = Contest(Effort(CPU))
    contest.names = ["ours", "theirs"]
    contest.seconds = {"ours": [1.0, 2.0, 1.0], "theirs": [4.0, 6.0, 5.0]}
    row = make_row("title", contest, "images/s", [Ratio("ours", "theirs", 4.0), Ratio("ours", "theirs", 4.5)])
    assert row["ways"]["ours"]["median"] == 1
    assert row["ways"]["theirs"]["median"] == 0.2
    first, second = row["ratios"]
    assert (first["median"], first["min"], first["max"]) == (4, 3, 5)
    assert (first["reached"], second["reached"]) == (True, False)
    assert claim("seconds", 4.0, at_most=5)["reached"]
    assert not claim("seconds", 6.0, at_most=5)["reached"]
    assert "missing" in claim("seconds", None, at_most=5)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_step_has_its_split_and_its_share_of_the_peak():
    row = steps.step(Effort(CPU, rounds=1, quick=True), "resnet10w32")
    split, shares = row["split"]["ours"], row["share_of_peak"]
    parts = sum(split[name] for name in ("views", "forward", "backward", "optimizer", "idle"))
    assert parts == pytest.approx(split["step"], rel=1e-2)
    speed = row["ways"]["ours"]["median"]
    expected = speed * shares["flop_per_image"] / shares["peak"]["flop_per_second"]
    assert shares["ways"]["ours"] == pytest.approx(expected, rel=1e-2)
    assert {(ratio["of"], ratio["over"]) for ratio in row["ratios"]} >= {("ours", "classic, 2 workers")}


def test_flops_of_a_step_are_counted():
    """Of the small network, by hand: three times the forward pass, but no gradient of the images; two views."""
    forward = 2 * 1024 * 27 * 32  # the stem
    forward += 2 * 1024 * 9 * 32 * 32 * 2  # the first stage
    for width, pixels in ((64, 256), (128, 64), (256, 16)):
        forward += 2 * pixels * (9 * width // 2 * width + 9 * width * width + width // 2 * width)
    forward += 2 * (256 * 256 + 256 * 128)  # the head
    assert steps.flop_of("resnet10w32") == 2 * (3 * forward - 2 * 1024 * 27 * 32)


def test_poisoning_is_timed_with_a_full_memory():
    earlier = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    defence = defences.full_poisoning(earlier, torch.sign, size=4)
    assert defence.poison_memory == len(defence.scores()) == 10
    oldest = Call(digests=[], representations=earlier[:1], project=torch.sign)
    assert defence.nearest(oldest).item() == pytest.approx(1)


def test_what_many_gpus_exchange_and_keep():
    """Of the small network, whose numbers can be counted by hand."""
    network = build_encoder("resnet10w32-imagenet")
    parameters = sum(one.numel() for one in network.parameters())
    channels = 32 + 2 * 32 + 3 * (64 + 128 + 256)  # of the stem, the first stage, and the others with their shortcuts
    alone, four = (scaling.exchanged("resnet10w32-imagenet", 64, gpus) for gpus in (1, 4))
    assert alone["gradients"] == alone["features"] == alone["batch norms"] == 0
    assert four["gradients"] == 1.5 * 4 * parameters
    assert four["features"] == 0.75 * 4 * 64 * 256
    norms = (four["collectives"] - 2) / 2
    assert norms == 12
    assert four["batch norms"] == 3 * 4 * (2 * channels + norms) + 1.5 * 4 * 2 * channels
    # Twice the side is four times the memory, but for what doesn't depend on it.
    small, large = (scaling.kept_for_backward("resnet10w32-imagenet", size) for size in (32, 64))
    assert 3.5 < large / small < 4.1


def test_a_step_and_nothing_else_is_measured_for_one_process():
    args = scaling.Scaling(arch="resnet10w32-imagenet", size=32, batch_size=4, rounds=2)
    found = scaling.measure(args, CPU)
    assert found.keys() == {"step"}
    assert len(found["step"]) == 2
    assert min(found["step"]) > 0
