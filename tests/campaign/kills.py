"""Kills: a script gets a signal at a random moment, is resumed until it ends, and must end as if nothing had been.

Half of the moments are times, the others are writes (a file opened to write, renamed or removed): those hit the windows
between two files that belong together.
"""

import functools
import json
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_aug.shapes import make_shapes, make_textures
from tests.campaign.forked import Ended, Stop, call

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVED = 75
MACHINE = "--device cpu --precision fp32 --workers 1"
SHAPES = "npz:shapes.npz"
STEAL = f"steal.py --datasetsteal npz:textures.npz --archstolen resnet10w32 --epochs 2 -b 32 {MACHINE}"
DEFENDED = "--losstype infonce --num_queries 96 --defence"
JUDGE = f"--dataset-test {SHAPES} -n 60 --num-test 60 --probe-epochs 3 {MACHINE}"


@dataclass(frozen=True)
class Scenario:
    """A command that is killed. {victim}, {marked} and {copy} are what `prepare` made; budget: that of the victim."""

    name: str
    line: str
    budget: int | None = None
    limit: float = 60


SCENARIOS = (
    Scenario("run", f"run.py --dataset {SHAPES} --num-train 96 --arch resnet10w32 --epochs 3 -b 32 {MACHINE}"),
    Scenario("steal, mse", f"{STEAL} --victim {{victim}} --losstype mse --num_queries 530 --epochs 1", 530),
    Scenario(
        "steal, views",
        f"{STEAL} --victim {{victim}} --losstype infonce --n-views 2 --useaug --copy-views 2 --num_queries 128",
        128,
    ),
    Scenario("steal, sybils", f"{STEAL} --victim {{victim}} --losstype mse --num_queries 120 --sybils 3", 120),
    Scenario("steal, coverage", f"{STEAL} --victim {{victim}} --losstype mse --num_queries 100 --max-coverage 50", 100),
    Scenario("steal, released", f"{STEAL} --victim {{victim}} --losstype mse --num_queries 96 --recipe released", 192),
    Scenario("steal, watermark", f"{STEAL} --victim {{marked}} --losstype mse --num_queries 96 --watermark", 96),
    Scenario("steal, poisoning", f"{STEAL} --victim {{victim}} {DEFENDED} poisoning", 96),
    Scenario("steal, buckets", f"{STEAL} --victim {{victim}} {DEFENDED} buckets", 96),
    Scenario("steal, rda", f"{STEAL} --victim {{victim}} --attack rda --num_queries 320", 320),
    Scenario("steal, repeat", f"{STEAL} --victim {{victim}} --losstype mse --num_queries 192 --repeat 2", 192),
    Scenario("stealhead", f"{STEAL.replace('steal.py', 'stealhead.py')} --victim {{victim}} --num_queries 96", 96),
    Scenario(
        "steallabels",
        f"{STEAL.replace('steal.py', 'steallabels.py')} --victim {{victim}} --dataset-test {SHAPES} --num_queries 96",
        96,
    ),
    Scenario(
        "legitimate",
        f"legitimate.py --victim {{victim}} --dataset-test npz:textures.npz --num_queries 80 --epochs 20 "
        f"--defence noise {MACHINE}",
    ),
    Scenario("linear_eval", f"linear_eval.py --modeltype victim --victim {{victim}} --seed 3 {JUDGE}"),
    Scenario("linear_eval, fidelity", f"linear_eval.py --stolen {{copy}} --fidelity --independent random {JUDGE}"),
    Scenario("reproduce", "reproduce.py small.yaml --jobs 2", limit=150),
)
RARE = 15  # reproduce.py starts real processes, which takes 30 times as long: a trial in so many rounds is one of it
_ON = MACHINE.replace("--workers 1", "")
EXPERIMENT = f"""
axes:
  loss: [mse]
steps:
  victim: run.py --dataset HERE/{SHAPES} --num-train 64 --arch resnet10w32 --epochs 1 -b 32 {_ON}
  copy: steal.py --victim {{victim}} --losstype {{loss}} --datasetsteal HERE/npz:textures.npz --archstolen
    resnet10w32 --epochs 1 -b 32 --num_queries 64 {_ON}
  judged: linear_eval.py --modeltype stolen --stolen {{copy}} --dataset-test HERE/{SHAPES} -n 40 --num-test 40
    --probe-epochs 2 {_ON}
scales:
  demo: {{}}
table:
  of: judged
  lines: [loss]
  columns:
    accuracy: judged.top1_converged
"""


# ---- before the trials -----------------------------------------------------------------------------------------------


@functools.cache
def _drawn(make: Callable, split: str) -> tuple[Tensor, Tensor]:
    return make(split)


def write_npz(path: Path, make: Callable, train: int, test: int) -> None:
    """The first images of the embedded shapes or textures."""
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        images, labels = _drawn(make, split)
        arrays[f"x_{split}"] = images[:count].permute(0, 2, 3, 1).numpy()
        arrays[f"y_{split}"] = labels[:count].numpy()
    np.savez(path, **arrays)


def placed(line: str, work: Path) -> str:
    """A command whose data are those of the prepared folder: a run's name has a digest of their path."""
    return re.sub(r"npz:(shapes|textures)\.npz", rf"npz:{work / 'base'}/\1.npz", line)


def checked_call(line: str, base: Path) -> Ended:
    """A command that has to work in the prepared folder: trials are made of what it leaves."""
    ended = call(placed(line, base.parent).split(), base, limit=150)
    assert ended.code == 0, f"{line}: exit code {ended.code}: {ended.last}"
    return ended


def made(ended: Ended) -> str:
    """The checkpoint that a script says it made."""
    named = [line for line in ended.out.splitlines() if line.startswith(("victim: ", "copy: "))]
    return named[-1].split(": ", 1)[1]


def scenario_of(number: int) -> Scenario:
    """Each in turn; the last of them seldom."""
    turn, place = divmod(number, len(SCENARIOS) - 1)
    if place == 0 and turn % RARE == RARE - 1:
        return SCENARIOS[-1]
    return SCENARIOS[place]


def prepare(work: Path, numbers: list[int], each) -> None:
    """The victims that are attacked, and an undisturbed run of each scenario; `each` maps as several processes."""
    base = work / "base"
    base.mkdir()
    write_npz(base / "shapes.npz", make_shapes, 96, 1060)
    write_npz(base / "textures.npz", make_textures, 720, 60)
    scenarios = list(dict.fromkeys(map(scenario_of, numbers)))
    train = f"run.py --dataset {SHAPES} --arch resnet10w32 --num-train 64 --epochs 1 -b 32 {MACHINE}"
    names = {"victim": made(checked_call(train, base))} if any("{" in scenario.line for scenario in scenarios) else {}
    if any("{marked}" in scenario.line for scenario in scenarios):
        names["marked"] = made(checked_call(f"{train} --watermark", base))
    if any("{copy}" in scenario.line for scenario in scenarios):
        copy = f"{STEAL} --victim {names['victim']} --losstype mse --num_queries 64 --seed 5"
        names["copy"] = made(checked_call(copy, base))
    if any(scenario.name == "steallabels" for scenario in scenarios):
        checked_call(f"linear_eval.py --modeltype victim --victim {names['victim']} {JUDGE}", base)
    (base / "small.yaml").write_text(EXPERIMENT)
    (work / "names.json").write_text(json.dumps(names))
    each(reference, [(work, scenario) for scenario in scenarios])


def fresh(work: Path, name: str) -> Path:
    """A copy of the prepared folder, which a trial may change."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "base", folder)
    text = (folder / "small.yaml").read_text()
    for data in ("shapes", "textures"):
        text = text.replace(f"HERE/npz:{data}.npz", f"npz:{work / 'base' / data}.npz")
    (folder / "small.yaml").write_text(text)
    return folder


def reference(work: Path, scenario: Scenario) -> None:
    """An undisturbed run of a scenario, and what it took."""
    folder = fresh(work, _whole(scenario))
    words = placed(scenario.line.format(**json.loads((work / "names.json").read_text())), work).split()
    ended = call(words, folder, limit=150)
    taken = {"code": ended.code, "last": ended.last, "seconds": ended.seconds, "writes": ended.writes}
    (work / f"{_whole(scenario)}.json").write_text(json.dumps(taken))


def _whole(scenario: Scenario) -> str:
    return f"undisturbed-{scenario.name.replace(', ', '-')}"


# ---- a trial ---------------------------------------------------------------------------------------------------------


def trial(work: Path, number: int, draws: random.Random) -> tuple[str, str | None]:
    """What was tried, and what went wrong, if anything did."""
    scenario = scenario_of(number)
    whole = json.loads((work / f"{_whole(scenario)}.json").read_text())
    if whole["code"] != 0:
        return f"{scenario.name}, undisturbed", f"exit code {whole['code']}: {whole['last']}"
    folder = fresh(work, f"kill {number}")  # a space in its path
    line = placed(scenario.line.format(**json.loads((work / "names.json").read_text())), work).split()
    stops = [_draw_stop(draws, whole) for _ in range(draws.choice((1, 1, 2)))]
    tried = f"{scenario.name}: {', '.join(map(str, stops))}"
    ends = []
    for turn, stop in enumerate([*stops, None]):
        ends.append(call([*line, *["--resume"][: turn and line[0] != "reproduce.py"]], folder, stop, scenario.limit))
        lost = any("lost in a stop" in ended.out + ended.err for ended in ends)
        if lost and ends[-1].code == 2 and "--batch-size 0 " not in ends[-1].err and ends[-1].err.count("\n") == 1:
            return f"{tried}, answers lost", None  # too few are left to train on, and the budget is spent
        wrong = _wrong_end(ends[-1], stop)
        if wrong:
            return f"{tried}{', answers lost' * lost}", f"call {turn + 1}: {wrong}"
    if lost and not any(stop.signal == signal.SIGKILL for stop in stops):
        return tried, "answers were lost, though nothing was killed"
    wrong = wrong_files(work / _whole(scenario), folder, lost)
    wrong = wrong or wrong_bill(work, scenario, folder, sum(ended.answered for ended in ends), lost)
    shutil.rmtree(folder)
    return f"{tried}{', answers lost' * lost}", wrong


def _draw_stop(draws: random.Random, whole: Mapping[str, Any]) -> Stop:
    number = draws.choice(SIGNALS)
    group = number in (signal.SIGKILL, signal.SIGHUP) or draws.random() < 0.5
    if draws.random() < 0.5:
        return Stop(number, seconds=round(draws.uniform(0.02, whole["seconds"]), 3), group=group)
    return Stop(number, event=draws.randint(1, max(1, whole["writes"])))


def _wrong_end(ended: Ended, stop: Stop | None) -> str | None:
    """What is wrong with how a call ended."""
    if ended.code is None:
        return "it did not end"
    if "Traceback" in ended.err or "Exception ignored" in ended.err:
        return f"a traceback: {ended.last}"
    if ended.left:
        return "it left processes behind"
    if ended.code == 0 or (stop is not None and stop.signal == signal.SIGKILL and ended.code == -signal.SIGKILL):
        return None
    if stop is None or stop.signal == signal.SIGKILL:
        return f"exit code {ended.code}: {ended.last}"
    if ended.code != SAVED or ended.err.strip().count("\n") or not ended.err.strip():
        return f"{stop.signal.name}: exit code {ended.code}, {len(ended.err.splitlines())} lines: {ended.last}"
    return None


# ---- what must be equal ----------------------------------------------------------------------------------------------

# Entries of rows and checkpoints that differ from run to run, or are checked by `wrong_bill`.
VARY = {"seconds", "time", "command", "commit", "checkpoint", "settings", "ledger", "images_per_second", "provenance"}
VARY |= {"folder", "run_seconds", "images_trained"}


def wrong_files(there: Path, here: Path, lost: bool) -> str | None:
    """The first thing in which the files of a killed and resumed run are not those of the undisturbed one.

    lost: answers that were paid for were lost in a kill, beyond what the budget covers, and the copy was trained
    without them: then only the files' names and the numbers of their lines have to be the same.
    """
    names = [{_name(path, root) for path in root.rglob("*") if path.is_file()} for root in (there, here)]
    if names[0] != names[1]:
        path = min(names[0] ^ names[1])
        return f"the file {path} is {'missing' if path in names[0] else 'left over'}"
    for path in sorted(names[0]):
        if lost and path.endswith(".jsonl"):
            if len((there / path).read_text().splitlines()) != len((here / path).read_text().splitlines()):
                return f"{path}: another number of lines"
        elif path.endswith((".pth.tar", ".jsonl", "table.md")) and not lost:
            wrong = _differing(there / path, here / path)
            if wrong:
                return f"{path}: {wrong}"
    return None


def wrong_bill(work: Path, scenario: Scenario, folder: Path, answered: int, lost: bool) -> str | None:
    """What is wrong with the ledgers of the copies that a scenario made, given how many images the victim answered.

    A query is written down before it is sent, and counts as asked even if its answer was lost. It may be asked again
    within the budget. So answered <= asked <= budget, and the same images were asked about as without a kill.
    """
    for path in folder.rglob("stolen-*/checkpoint.pth.tar"):
        name = path.relative_to(folder)
        before, after = (
            torch.load(root / name, weights_only=True)["ledger"] for root in (work / _whole(scenario), folder)
        )
        for account in before.keys() | after.keys():
            entries = [ledger.get(account, {"images": torch.zeros(0), "queries": 0}) for ledger in (before, after)]
            if not lost and not torch.equal(entries[0]["images"], entries[1]["images"]):
                return f"{name}: the ledger of {account} has other images"
            if entries[1]["queries"] < entries[0]["queries"]:
                return f"{name}: the ledger of {account} has {entries[1]['queries']} of {entries[0]['queries']} queries"
        asked = sum(entry["queries"] for entry in after.values())
        new = scenario.budget and not (work / "base" / name).exists()
        if new and not answered <= asked <= scenario.budget:
            return f"{name}: {answered} images answered, {asked} in the ledger, a budget of {scenario.budget}"
    return None


def _name(path: Path, root: Path) -> str:
    name = str(path.relative_to(root))
    return name.split("events.out")[0] + "events" if "events.out" in name else name


def _differing(there: Path, here: Path) -> str | None:
    if there.suffix == ".md":
        return None if there.read_text() == here.read_text() else "another table"
    if there.suffix == ".jsonl":
        before, after = (_lines(path) for path in (there, here))
        more, fewer = after - before, before - after
        return f"{sum(more.values())} lines too many, {sum(fewer.values())} missing" if more or fewer else None
    before, after = (dict(_flat(torch.load(path, weights_only=True))) for path in (there, here))
    if before.keys() != after.keys():
        return f"other entries: {sorted(before.keys() ^ after.keys())[:3]}"
    return next((f"another {name}" for name in before if not _same(before[name], after[name])), None)


def _lines(path: Path) -> Counter:
    """How often each line is there, without what differs from run to run."""
    return Counter(json.dumps(dict(_flat(json.loads(line))), sort_keys=True) for line in path.read_text().splitlines())


def _flat(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key not in VARY:
                yield from _flat(value, f"{name}.{key}")
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _flat(value, f"{name}.{index}")
    else:
        yield name, content


def _same(before: Any, after: Any) -> bool:
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return before == after
    return (
        before.dtype == after.dtype
        and before.shape == after.shape
        and before.numpy().tobytes() == after.numpy().tobytes()
    )
