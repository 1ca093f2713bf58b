"""Files of strangers: every reader gets files that are cut, forged, of another kind, or meant to do harm.

Held is a right result, or exit code 2 and one line that names the file, with nothing written, little memory and soon.
"""

import json
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_aug.shapes import make_shapes, make_textures
from tests.campaign import checkpoints, pictures, texts
from tests.campaign.forked import Ended, call
from tests.campaign.kills import EXPERIMENT, MACHINE, checked_call, made, placed, write_npz

ADDRESS_SPACE, MEMORY = 6144, 2048  # MiB that a script may reserve, and use
JUDGE = f"--dataset-test npz:shapes.npz -n 60 --num-test 60 --probe knn {MACHINE}"
TRAIN = f"run.py --dataset npz:shapes.npz --arch resnet10w32 --num-train 64 -b 32 {MACHINE}"


@dataclass(frozen=True)
class Reader:
    """A command that reads a file, which trials replace: `path` below the prepared folder, and what goes into it."""

    line: str
    path: str
    kinds: Mapping[str, tuple[str, Callable]]  # name -> what must come of it, and what makes it
    figures: Callable[[Path, Ended], Any]
    seconds: float = 20


def _row(folder: Path, ended: Ended) -> dict:
    """The figures of the row that linear_eval.py wrote."""
    row = json.loads((folder / "checkpoints/results.jsonl").read_text().splitlines()[-1])
    names = ("model", "arch", "knn", "test_images", "train_images", "queries", "distinct", "test_images_queried")
    return {name: row.get(name) for name in names}


def _weights(folder: Path, ended: Ended) -> list:
    """The weights that run.py went on to; none where it found nothing to do."""
    paths = [path for path in folder.rglob("checkpoint.pth.tar") if "2ep" in str(path)]
    return [value.tolist() for path in paths for value in torch.load(path, weights_only=True)["state_dict"].values()]


def _printed(folder: Path, ended: Ended) -> str:
    return ended.out


def _table(folder: Path, ended: Ended) -> str:
    return (folder / "results/demo/small/table.md").read_text()


def _nothing(folder: Path, ended: Ended) -> None:
    return None


LINEAR = f"linear_eval.py --modeltype victim --victim victim.pth.tar --seed 1 {JUDGE}"
_JUDGED = "linear_eval.py --modeltype"
_RANDOM = f"{_JUDGED} random --arch resnet10w32 --probe knn {MACHINE} --dataset-test"
READERS = {
    "victim": Reader(f"{_JUDGED} victim --victim strange.pth.tar {JUDGE}", "strange.pth.tar", checkpoints.KINDS, _row),
    "copy": Reader(f"{_JUDGED} stolen --stolen strange.pth.tar {JUDGE}", "strange.pth.tar", checkpoints.KINDS, _row),
    "resume": Reader(f"{TRAIN} --epochs 2 --resume strange.pth.tar", "strange.pth.tar", checkpoints.KINDS, _weights),
    "timm": Reader(f"{_JUDGED} victim --victim timm {JUDGE}", "timm/config.json", checkpoints.CONFIGURATIONS, _row),
    "huggingface": Reader(
        f"{_JUDGED} victim --victim huggingface {JUDGE}", "huggingface/config.json", checkpoints.CONFIGURATIONS, _row
    ),
    "config.yml": Reader("runs.py", "checkpoints/victim-1/config.yml", texts.YAML, _nothing),
    "results.jsonl": Reader("runs.py", "checkpoints/results.jsonl", texts.LINES, _printed),
    "metrics.jsonl": Reader(f"{LINEAR} --resume", "{linear}/metrics.jsonl", texts.LINES, _printed),
    "cells.jsonl": Reader("reproduce.py small.yaml", "results/demo/small/cells.jsonl", texts.LINES, _table, seconds=60),
    "experiment": Reader("reproduce.py strange.yaml", "strange.yaml", texts.EXPERIMENTS, _nothing),
    "npz": Reader(f"{_RANDOM} npz:strange.npz", "strange.npz", pictures.ARRAYS, _row),
    "folder": Reader(f"{_RANDOM} folder:strange", "strange", pictures.PICTURES, _row),
}
CASES = [(reader, kind) for reader, found in READERS.items() for kind in found.kinds]
random.Random(0).shuffle(CASES)  # so that few trials are of all sorts


def prepare(work: Path, numbers: list[int], each) -> None:
    """A folder with a good file of every sort, and what each reader makes of its good file."""
    base = work / "base"
    base.mkdir()
    write_npz(base / "shapes.npz", make_shapes, 96, 1060)
    write_npz(base / "textures.npz", make_textures, 96, 60)
    victim = made(checked_call(f"{TRAIN} --epochs 1", base))
    steal = f"steal.py --victim {victim} --datasetsteal npz:textures.npz --archstolen resnet10w32 --losstype mse"
    copy = made(checked_call(f"{steal} --num_queries 64 --epochs 1 -b 32 {MACHINE}", base))
    content = torch.load(base / victim, weights_only=True)
    content["settings"]["epochs"] = 2
    torch.save(content, base / "resume.pth.tar")
    shutil.copy(base / victim, base / "victim.pth.tar")
    shutil.copy(base / copy, base / "copy.pth.tar")
    (base / victim).parent.rename(base / "checkpoints/victim-1")
    pictures.write_arrays(base / "strange.npz")
    pictures.write_pictures(base / "strange")
    checked_call(LINEAR, base)
    (base / "small.yaml").write_text(EXPERIMENT.replace("HERE/npz:", f"npz:{base}/"))
    wanted = {CASES[number % len(CASES)][0] for number in numbers}
    for name in wanted & set(checkpoints.LIBRARIES):
        checkpoints.LIBRARIES[name](base / name)
    if "cells.jsonl" in wanted:
        checked_call("reproduce.py small.yaml --jobs 2", base)
    each(_good, [(work, reader) for reader in sorted(wanted)])


def _file(base: Path, reader: str) -> str:
    """The path, below the prepared folder, of the file that a reader reads."""
    linear = next(base.rglob("linear-*"))
    return READERS[reader].path.format(linear=linear.relative_to(base))


def _folder(work: Path, reader: str, name: str) -> Path:
    """A copy of the prepared folder with a good file for the reader."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "base", folder)
    if READERS[reader].path == "strange.pth.tar":
        shutil.copy(folder / f"{reader}.pth.tar", folder / "strange.pth.tar")
    if reader == "experiment":
        shutil.copy(folder / "small.yaml", folder / "strange.yaml")
    return folder


def _good(work: Path, reader: str) -> None:
    """What a reader makes of a good file."""
    folder = _folder(work, reader, f"good {reader}")
    figures = None
    if reader != "experiment":
        ended = call(placed(READERS[reader].line, work).split(), folder, limit=60)
        if ended.code != 0:  # its trials then say that the figures are other ones
            print(f"{reader}: a good file: exit code {ended.code}: {ended.last}", file=sys.stderr)
        else:
            figures = READERS[reader].figures(folder, ended)
    (work / f"good {reader}.json").write_text(json.dumps(figures))
    shutil.rmtree(folder)


# ---- a trial ---------------------------------------------------------------------------------------------------------


def trial(work: Path, number: int, draws: random.Random) -> tuple[str, str | None]:
    """What was tried, and what went wrong, if anything did."""
    name, kind = CASES[number % len(CASES)]
    reader = READERS[name]
    folder = _folder(work, name, f"file-{number}")
    said = None
    try:
        must, make = reader.kinds[kind]
        said = make(folder / _file(work / "base", name), draws)
        before = _listing(folder)
        ended = call(placed(reader.line, work).split(), folder, limit=reader.seconds, memory=ADDRESS_SPACE)
        good = json.loads((work / f"good {name}.json").read_text())
        wrong = _wrong(reader, folder, ended, must, good, before)
    except Exception:
        wrong = f"the campaign failed: {traceback.format_exc().splitlines()[-1]}"
    shutil.rmtree(folder, ignore_errors=True)
    return f"{name}: {kind}{f' ({said})' if said else ''}", wrong


def _listing(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


def _wrong(reader: Reader, folder: Path, ended: Ended, must: str, good: Any, before: Mapping) -> str | None:
    """What is wrong with how a script ended that read a strange file."""
    errors = ended.err.strip().splitlines()
    if (folder / "canary").exists():
        return "THE FILE RAN CODE"
    if ended.code is None:
        return f"it did not end in {reader.seconds:.0f} s"
    if ended.memory > MEMORY:
        return f"it took {ended.memory:.0f} MiB"
    if "Traceback" in ended.err or ended.code not in (0, 2):
        return f"exit code {ended.code}: {ended.last}"
    if len(errors) > 1:
        return f"exit code {ended.code}, {len(errors)} lines of errors: {errors[0][:150]} ... {ended.last[:150]}"
    if ended.code == 0:
        if must == "refused":
            return f"it was accepted: {ended.last}"
        figures = None if must == "any" else json.loads(json.dumps(reader.figures(folder, ended)))
        return None if must == "any" or figures == good else f"other figures, exit code 0: {_other(good, figures)}"
    if must == "works":
        return f"refused: {ended.last}"
    names = (reader.path.split("/")[0] if "/" not in reader.path else Path(reader.path).name, "timm", "huggingface")
    if not any(name in ended.err for name in names):
        return f"the file is not named: {ended.last}"
    written = [path for path, when in _listing(folder).items() if before.get(path) != when]
    return f"refused, and {Path(written[0]).relative_to(folder)} is written" if written else None


def _other(good: Any, figures: Any) -> str:
    if isinstance(good, dict):
        return ", ".join(
            f"{name} {figures.get(name)} for {good[name]}" for name in good if figures.get(name) != good[name]
        )
    return "another result"
