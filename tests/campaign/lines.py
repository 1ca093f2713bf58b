"""Command lines that cannot be: every setting of every script out of its range, and a table of others, by hand.

Held is exit code 2 and one line of error that names the flag or the value, with nothing written and soon.
"""

import importlib
import json
import random
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_aug.shapes import make_shapes, make_textures
from settings import Setting
from tests.campaign.forked import Ended, call
from tests.campaign.kills import EXPERIMENT, MACHINE, SHAPES, checked_call, made, placed, write_npz

WITH_PARSERS = ("run", "steal", "linear_eval", "legitimate", "stealhead", "steallabels")
WITH_PARSERS = (*WITH_PARSERS, "verify", "detect", "stealsimsiam", "linsimsiam")
MEMORY = 6144  # MiB of address space that a script may add
SECONDS = 20
LONG, MANY = "x" * 5000, 10**9
# A line is a command, perhaps after variables of the environment; {victim}, {copy} and {linear} were made before.
RUN = f"run.py --dataset {SHAPES} --arch resnet10w32 --num-train 64 --epochs 1 -b 32"
TEXTURES = "npz:textures.npz"
STEAL = f"steal.py --victim {{victim}} --datasetsteal {TEXTURES} --archstolen resnet10w32 --epochs 1 -b 32"
STEAL = f"{STEAL} --losstype mse --num_queries 64"
HEAD = STEAL.replace("steal.py", "stealhead.py").replace("--losstype mse", "")
LABELS = STEAL.replace("steal.py", "steallabels.py").replace("--losstype mse", f"--dataset-test {SHAPES}")
JUDGE = f"linear_eval.py --dataset-test {SHAPES} -n 60 --num-test 60 --probe knn"
USER = f"legitimate.py --victim {{victim}} --dataset-test {TEXTURES} --num_queries 60 --epochs 1"
VERIFY = "verify.py --victim {victim} --suspect {copy} --method dataset-inference"
DETECT = f"detect.py --victim {{victim}} --dataset {SHAPES} --streams 2 --stream-length 30"
LARGE = f"stealsimsiam.py --pretrained {{victim}} --datasetsteal {TEXTURES} --num_queries 64 --epochs 2 --size 32 -b 32"
LARGE = f"{LARGE} --workers 0"
LAYER = f"linsimsiam.py --pretrained {{victim}} --dataset {SHAPES} --epochs 1 --size 32 -b 32 --workers 0"
# (a line that works, what is added to it): the error has to name the first of the words added, or its value.
ADDED = [
    *((RUN, words) for words in (
        "--device meta", "--device nonsense", "--device cuda:99", "--device ''", "--device cpu,cpu", "--gpu -3",
        "--gpu 99 --device cpu", "--world-size 0", "--world-size 2 --rank 5", "--rank -7",
        "--world-size 2 --rank 0 --dist-url nonsense", "--world-size 2 --rank 0 --dist-url tcp://127.0.0.1:0",
        "--world-size 2 --rank 1 --dist-url tcp://nowhere.invalid:29411", "--dist-backend nonsense",
        "--world-size 2 --rank 0 --dist-url tcp://127.0.0.1:99999999", f"--num-train {MANY}", f"-b {MANY}",
        f"--out_dim {10**12}", f"--out_dim {10**30}", f"--n-views {10**9}", "--checkpoint-dir textures.npz",
        "--checkpoint-dir /proc/nowhere", f"--checkpoint-dir {LONG}", "--checkpoint-dir 'a\0b'", "--dataset npz:",
        "--dataset npz:nowhere.npz", "--dataset folder:", "--dataset folder:nowhere", "--dataset 'npz:a\0b'",
        f"--dataset folder:{LONG}", "--dataset folder:textures.npz", "--dataset npz:.", "--dataset ''",
        "--resume nowhere.pth.tar", "--resume 'a\0b'", f"--resume {LONG}", "--resume .", "--logdir textures.npz",
        "--momentum 0.5", "--losstype supervised --out_dim 5", "nonsense", "--epoch 3", "--epochs", "--epochs 3 4",
        "--epochs=", "--arch resnet", "--arch ''", "--arch 'resnet34 '", "--fp16-precision --precision bf16",
        "--wd 1e400", "--temperature 0", "--nonsense 3", "--normalize perhaps", "--data '' --dataset cifar10",
    )),
    *((STEAL, words) for words in (
        "--victim 'a**b'", "--victim nowhere", "--victim '*'", "--victim '['", "--victim ''", "--victim .",
        "--victim /", "--victim ..", "--victim 'a\0b'", f"--victim {LONG}", "--victim 7", "--victim textures.npz",
        f"--num_queries {MANY}", f"--num_queries {10**30}", "--n-views 65", "--sybils 50", "--shared 5",
        "--max-coverage 5 --sybils 3", "--max-coverage 5 --n-views 2", "--useaug --copy-views 3 --n-views 2",
        "--copy-views 4", "--prototype", "--watermark", "--defence noise,noise",
        "--defence noise,", "--defence ,", "--defence nonsense", "--defence ''", "--sigma 1", "--secret 1",
        f"--datasetsteal {SHAPES} --num_queries 500", "--force", "--dataset cifar10", "--arch resnet18",
        "--epochstrain 7", "--lossvictim supervised", "--archstolen resnet9", "--temperature 0.5", "--repeat 65",
        f"-b {MANY}", "--stolenhead --victimhead --losstype nonsense", "--attack nonsense", "--out_dim 5",
    )),
    *((f"{JUDGE} --stolen {{copy}}", words) for words in (
        "-n 1", "-n 0", f"--num-test {MANY}", "--stolen {victim}", "--stolen {linear}", "--stolen nowhere",
        "--stolen 'a**b'", "--stolen 7", "--independent random", "--fidelity --independent nowhere",
        "--attack rda --head", "--save", "--dataset-test npz:nowhere.npz", "--datasetsteal svhn", "--sigma 0.5",
        "--modeltype random", "--finetune --recipe released", "--lr 1e-3", "--victim textures.npz",
    )),
    (f"{JUDGE} --modeltype victim", "--victim {copy}"),
    (f"{JUDGE} --modeltype victim --victim {{victim}}", "--fidelity"),
    (f"{JUDGE} --modeltype random", "--stolen {copy}"),
    *((USER, words) for words in (f"--num_queries {MANY}", f"--num-test {MANY}", "--sigma 1",
                                  "--losstype mse", "--defence nonsense", "--victim nowhere")),
    *((HEAD, words) for words in ("--victimhead", "--losshead msewithhead", "--head-queries 65", "--n-views 1",
                                  "--losstype stolenencoder", f"--out_dim {10**12}", "--sybils 2")),
    *((LABELS, words) for words in ("--mode knockoff --losstype direct", "--classifier nowhere",
                                    "--classifier {victim}", f"--num_queries {MANY}", "--victimtype supervised",
                                    f"--dataset-test {TEXTURES}", f"--num-test {MANY}")),
    *((VERIFY, words) for words in ("--suspect nowhere", "--suspect 'a**b'", "--method nonsense", "--level 2",
                                    "--method watermark", "--suspect", "--independent nowhere",
                                    f"--num-test {MANY}", "--suspect textures.npz", f"--components {MANY}")),
    *((DETECT, words) for words in (f"--stream-length {MANY}", "--streams 0", "--victim {copy}",
                                    "--user-classes 99", "--dataset-users nonsense", "--victim nowhere")),
    *((LARGE, words) for words in ("--pretrained nowhere", "--size 0", "--start-epoch 5", "--workers -1", "-e",
                                   f"--size {10**6}", f"--num_queries {MANY}", "--n-views 2", "--epochstrain 99",
                                   "--datasetsteal imagenet", "--query-view nonsense", "--arch resnet50")),
    *((LAYER, words) for words in ("--start-epoch 100", "-e", "--pretrained nowhere", "--modeltype stolen",
                                   "--size -1", "--dataset imagenet", f"-b {MANY}")),
    ("reproduce.py small.yaml", "--jobs 0"), ("reproduce.py small.yaml", "--results textures.npz"),
    ("reproduce.py small.yaml", "other.yaml"), ("demo.py", "--out textures.npz"), ("demo.py", "--out 'a\0b'"),
    ("runs.py", "--checkpoint-dir nowhere"), ("runs.py", "nonsense"), ("runs.py", "--checkpoint-dir textures.npz"),
]  # fmt: skip
# (a whole line, what the error has to name)
WHOLE = [
    *((line, name) for line, name in (
        ("verify.py", "--method"), ("verify.py --method watermark", "--suspect"), ("reproduce.py", "experiments"),
        ("reproduce.py nowhere.yaml", "nowhere.yaml"), ("reproduce.py ''", ""), ("reproduce.py .", ""),
        ("reproduce.py 'a\0b'", ""), (f"reproduce.py {LONG}", ""), ("stealsimsiam.py", "--pretrained"),
        ("linsimsiam.py", "--pretrained"), ("steal.py --checkpoint-dir nowhere", "nowhere"),
    )),
    *((f"{variables} {RUN}", variables.split()[0].split("=")[0]) for variables in (
        "RANK=x WORLD_SIZE=2", "WORLD_SIZE= RANK=", "WORLD_SIZE=x RANK=0", "RANK=5 WORLD_SIZE=2", "WORLD_SIZE=0 RANK=0",
        "RANK=-1 WORLD_SIZE=2", "MASTER_PORT=x RANK=0 WORLD_SIZE=2", "MASTER_PORT=0 RANK=0 WORLD_SIZE=2",
        "LOCAL_RANK=x RANK=0 WORLD_SIZE=2", "SLURM_STEP_NUM_TASKS=x", "SLURM_PROCID= SLURM_STEP_NUM_TASKS=2",
        "SLURM_PROCID=x SLURM_STEP_NUM_TASKS=2", "MASTER_ADDR=nowhere.invalid RANK=1 WORLD_SIZE=2",
    )),
    (f"RANK=0 WORLD_SIZE=2 {DETECT}", ""), (f"{RUN} --world-size 2", "--dist-url"),
]  # fmt: skip
HAND = [(f"{line} {words}", words) for line, words in ADDED] + WHOLE
CASES: list[tuple[str, str] | None] = [*HAND, *[None] * (300 - len(HAND))]  # None: one of `derived`
random.Random(0).shuffle(CASES)


# ---- from the parsers ------------------------------------------------------------------------------------------------


def derived() -> list[tuple[str, str]]:
    """A script with each of its settings at each value that it cannot have, and the flag."""
    return [
        (f"{script}.py {flag} {shlex.quote(value)}", flag)
        for script in WITH_PARSERS
        for declared in importlib.import_module(script).make_parser().settings.values()
        for flag in [declared.flag]
        for value in dict.fromkeys(_bad_values(declared))
    ]


def _bad_values(declared: Setting) -> Iterator[str]:
    if declared.choices is not None:
        yield from ("nonsense", "")
    elif declared.kind is bool and declared.read is None:
        yield from ("perhaps", "2", "")
    elif declared.kind in (int, float) and declared.read is None:
        yield from ("nan", "inf", "-inf", "1e999", "x", "", "1,5")
        if declared.kind is int:
            yield from ("1.5", "1e3", "0x10")
        for limit, step in (("at_least", -1), ("above", 0), ("below", 0), ("at_most", 1), ("at_least", -(10**30))):
            if getattr(declared, limit) is not None:
                yield str(getattr(declared, limit) + step)
    elif declared.name in ("dataset", "datasetsteal", "dataset_test", "arch", "archstolen"):
        yield from ("nonsense", "", "cifar10 ")


# ---- trials ----------------------------------------------------------------------------------------------------------


def prepare(work: Path, numbers: list[int], each) -> None:
    """A folder with data, a victim, a copy and a judged encoder, in which nothing may change."""
    base = work / "base"
    base.mkdir()
    write_npz(base / "shapes.npz", make_shapes, 96, 1060)
    write_npz(base / "textures.npz", make_textures, 96, 60)
    names = dict.fromkeys(("victim", "copy", "linear"), "")
    if any("{" in case[0] for case in (CASES[number % len(CASES)] for number in numbers) if case):
        names["victim"] = made(checked_call(f"{RUN} {MACHINE}", base))
        names["copy"] = made(checked_call(f"{STEAL} {MACHINE}".format(**names), base))
        line = f"{JUDGE} --modeltype victim --probe linear --probe-epochs 1 --victim {{victim}}"
        checked_call(line.format(**names), base)
        names["linear"] = str(next(base.rglob("linear-*/checkpoint.pth.tar")).relative_to(base))
    (base / "small.yaml").write_text(EXPERIMENT.replace("HERE/npz:", f"npz:{base}/"))
    (work / "names.json").write_text(json.dumps(names))


def trial(work: Path, number: int, draws: random.Random) -> tuple[str, str | None]:
    """The line, and what went wrong, if anything did."""
    line, named = CASES[number % len(CASES)] or draws.choice(derived())
    folder = work / f"line-{number}"
    shutil.copytree(work / "base", folder)
    names = json.loads((work / "names.json").read_text())
    words = shlex.split(placed(line, work).format(**names))
    variables = dict(word.split("=", 1) for word in words[: next(n for n, word in enumerate(words) if "=" not in word)])
    before = _listing(folder)
    ended = call(words[len(variables) :], folder, limit=SECONDS, memory=MEMORY, variables=variables)
    wrong = _wrong(ended, shlex.split(named.format(**names)))
    written = _listing(folder) ^ before
    if not wrong and written:
        wrong = f"refused, and changed: {sorted(written)[0][0]}"
    shutil.rmtree(folder)
    return line.replace(LONG, "x...x").replace("\0", "NUL"), wrong


def _listing(folder: Path) -> set[tuple[str, int]]:
    return {(str(path.relative_to(folder)), path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def _wrong(ended: Ended, named: list[str]) -> str | None:
    if ended.code is None:
        return f"it did not end in {SECONDS} s"
    if "Traceback" in ended.err or ended.code != 2:
        return f"exit code {ended.code}: {ended.last}"
    lines = ended.err.strip().splitlines()
    if len(lines) != 1:
        return f"{len(lines)} lines of errors: {lines[0][:150]} ... {ended.last[:150]}"
    # Of the words added, one has to be in the message: a flag, in either spelling, or a value, perhaps without npz:.
    known = [part[:100] for word in named for part in re.split("[=:\0]", word.strip("-").replace("_", "-"))]
    if named and all(named) and not any(word in lines[0].replace("_", "-") for word in known if word):
        return f"the error names none of {' '.join(named)[:100]}: {ended.last}"
    return None
