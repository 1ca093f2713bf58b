"""The names and places of runs, how scripts find what earlier ones made, and how they show it."""

import argparse
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import yaml

from attacks import QuerySet, choose_queries
from models import SimCLREncoder, read_checkpoint
from models.checkpoint import encoder_from_checkpoint
from options import Parser, in_force
from utils import Precision, Run, UserError, first_process, provenance
from victim import Ledger, version_of

# Where a run happens, not what it computes: never part of its name.
_ELSEWHERE = {"data", "checkpoint_dir", "device", "gpu_index", "workers", "resume", "clear", "logdir"}
_ELSEWHERE |= {"fp16_precision", "log_every_n_steps", "victim", "stolen", "independent"}
_ELSEWHERE |= {"world_size", "rank", "dist_url", "dist_backend", "multiprocessing_distributed", "print_freq"}
_BOOKKEEPING = {"given", "presets"}
_SPELT = {"num_queries": "{}q", "epochs": "{}ep", "seed": "seed{}"}


def run_name(
    kind: str, parser: Parser, args: argparse.Namespace, core: Sequence[str], implied: Collection[str] = ()
) -> str:
    """A folder name that no run with other settings has.

    The settings `core` are in every name, `implied` are those that the folder above stands for; any other setting
    appears when it is not at its default or its preset.
    """
    parts = [kind, *(_SPELT.get(name, "{}").format(getattr(args, name)) for name in core)]
    defaults = {action.dest: action.default for action in parser._actions} | getattr(args, "presets", {})
    for name, value in sorted(vars(args).items()):
        if name not in {*core, *implied, *_ELSEWHERE, *_BOOKKEEPING} and value != defaults[name]:
            parts.append(f"{name.replace('_', '')}={value}")
    return "-".join(re.sub(r"[^\w.=+]", "_", part) for part in parts)


def home_of(checkpoint: Path, root: Path) -> Path:
    """The folder below which runs about an encoder go: its own run's, or one under `root` for a file from elsewhere."""
    if (checkpoint.parent / "config.yml").exists():
        return checkpoint.parent
    digest = hashlib.sha256()
    for file in sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return root / f"{checkpoint.absolute().name.split('.')[0]}-{digest.hexdigest()[:8]}"


def locate(path: Path, root: Path) -> Path:
    """The checkpoint, or another library's folder, that is named: by its path, or by its run's folder below `root`.

    UserError when several runs have that name; a path that is nowhere comes back as it is.
    """
    if path.is_file() or (path.is_dir() and not (path / "checkpoint.pth.tar").exists()):
        return path
    places = [path] if path.is_dir() else [root / path, *root.rglob(path.name)]
    files = {place / "checkpoint.pth.tar" for place in places if place.parts[-len(path.parts) :] == path.parts}
    found = sorted(file for file in files if file.exists())
    if len(found) > 1:
        raise UserError(f"several runs are named {path}: {', '.join(map(str, found))}: give the path of one")
    return found[0] if found else path


def configuration(kind: str, args: argparse.Namespace, precision: Precision) -> dict:
    """What config.yml says: every value in force, commit, versions and device."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in _BOOKKEEPING
    }
    return {"kind": kind, "settings": settings, "provenance": provenance(precision)}


def find_run(
    root: Path,
    kind: str,
    wanted: Mapping[str, object],
    preferred: Mapping[str, object],
    besides: Path | None = None,
    flag: str | None = None,
) -> Path:
    """The checkpoint of the one run below `root` of that kind with the settings wanted, other than `besides`.

    Where several match, those with the settings preferred are taken, one setting after the other. UserError when none
    matches, naming the runs that are there, or when several are left, naming these; `flag` takes a path instead.
    """
    flag = flag or f"--{kind}"
    runs = {}
    for config in sorted(root.rglob("config.yml")):
        content, checkpoint = _read_config(config), config.parent / "checkpoint.pth.tar"
        if content.get("kind") == kind and checkpoint.exists() and checkpoint != besides:
            runs[checkpoint] = content["settings"]
    matching = {
        path: settings
        for path, settings in runs.items()
        if all(settings.get(name) == value for name, value in wanted.items())
    }
    for name, value in preferred.items():
        narrower = {path: settings for path, settings in matching.items() if settings.get(name) == value}
        matching = narrower or matching
    asked = ", ".join(f"{name} {value}" for name, value in wanted.items())
    if not matching:
        there = ", ".join(map(str, runs)) or "none"
        raise UserError(f"no {kind} encoder with {asked} in {root}; there: {there}; or give {flag} PATH")
    if len(matching) > 1:
        raise UserError(f"several {kind} encoders with {asked}: {', '.join(map(str, matching))}; give {flag} PATH")
    return next(iter(matching))


def _read_config(path: Path) -> dict:
    """A run's config.yml; empty for a file of that name that is something else."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    return content if isinstance(content, dict) else {}


def check_finished(checkpoint: Mapping, path: Path) -> None:
    """UserError when a run that was interrupted wrote the checkpoint; files of the 2022 code count as finished."""
    wanted = checkpoint.get("settings", {}).get("epochs", checkpoint.get("epoch"))
    if checkpoint.get("epoch") != wanted:
        raise UserError(
            f"{path} stopped after epoch {checkpoint['epoch']} of {wanted}: run the command that made it with --resume"
        )


def check_named(
    checkpoint: Mapping, path: Path, args: argparse.Namespace, named: Mapping[str, str], always: Collection[str] = ()
) -> None:
    """UserError when the checkpoint has another setting than a flag of the command line, or one of `always`, names.

    `named` maps flags to settings; a file of the 2022 code has none and passes.
    """
    for flag, name in named.items():
        held, value = checkpoint.get("settings", {}).get(name), getattr(args, flag)
        if held not in (None, value) and (flag in args.given or flag in always):
            raise UserError(f"{path} was trained with {name} {held}, not {value}: give --{flag} {held}")


def open_victim(args: argparse.Namespace) -> tuple[Path, SimCLREncoder]:
    """The victim that the flags name: its file and the encoder. UserError when flags and file differ."""
    wanted = {"dataset": args.dataset, "arch": args.arch, "epochs": args.epochstrain, "losstype": args.lossvictim}
    watermark = getattr(args, "watermark", False)
    if watermark:
        wanted["watermark"] = True
    preferred = {"seed": args.seed, "recipe": getattr(args, "recipe", "standard"), "watermark": watermark}
    if args.victim:
        path = locate(args.victim, args.checkpoint_dir)
    else:
        path = find_run(args.checkpoint_dir, "victim", wanted, preferred)
    checkpoint = read_checkpoint(path)
    check_finished(checkpoint, path)
    # The data set decides which images may be queried, so it has to be right even where no flag names it.
    flags = {"dataset": "dataset", "epochstrain": "epochs", "lossvictim": "losstype"}
    check_named(checkpoint, path, args, flags, always=("dataset",))
    encoder = encoder_of(checkpoint, path, args.arch if "arch" in args.given or not args.victim else None)
    args.arch = encoder.arch
    return path, encoder


def encoder_of(checkpoint: Mapping, path: Path, arch: str | None = None) -> SimCLREncoder:
    """The encoder of a checkpoint that was read; prints what a file that no run here wrote was taken for."""
    encoder = encoder_from_checkpoint(checkpoint, str(path), arch)
    if "settings" not in checkpoint:
        print(f"{path}: {encoder.report}")
    return encoder


def queries_of(args: argparse.Namespace, count: int) -> QuerySet:
    """So many images of those that the flags name; all of them for an attacker who chooses among them."""
    choice = getattr(args, "max_coverage", None) is not None
    order = args.query_order, args.seed, args.force
    return choose_queries(args.datasetsteal, args.dataset, args.data, count, *order, choice)


def open_copy(
    parser: Parser,
    args: argparse.Namespace,
    core: Sequence[str],
    victim: tuple[Path, SimCLREncoder],
    queries: QuerySet,
    precision: Precision,
    kind: str = "stolen",
) -> tuple[Run, dict, dict]:
    """The run of an attack on that victim, what its config.yml says and its checkpoints hold; prints what is done."""
    implied = ("dataset", "arch", "epochstrain", "lossvictim")
    name = run_name(kind, parser, args, [*core, "num_queries", "epochs", "seed"], implied)
    config = configuration(kind, args, precision)
    path, encoder = victim
    config["settings"]["victim"] = str(path)
    print(f"victim: {path}")
    print(f"copy: {args.archstolen}, {len(queries.images)} images of {queries.dataset} ({queries.split}), {precision}")
    print(in_force(args))
    extra = {"kind": kind, "settings": config["settings"], **queries.record(), "stolen_from": version_of(encoder)}
    return Run(home_of(path, args.checkpoint_dir) / name, args.logdir), config, extra


def ledger_figures(checkpoint: Mapping) -> dict[str, int]:
    """What a row says of a copy's queries."""
    ledger = Ledger()
    ledger.load_state_dict(checkpoint.get("ledger", {}))
    return {"queries": ledger.queries, "distinct": ledger.distinct}


def add_row(run: Run, root: Path, row: Mapping, step: int) -> None:
    """Show a row, and append it to the run's metrics and to the results.jsonl below `root`."""
    run.record(step, {"row": row})
    run.say(as_row(row))
    if first_process():
        # One append of one line: evaluations that run side by side don't mix theirs.
        with (root / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    run.say(f"row: {run.metrics} and {root / 'results.jsonl'}")


def as_row(row: Mapping) -> str:
    """One readable line of an evaluation's row."""
    names = (
        *("model", "attack", "arch", "losstype", "defence", "downstream"),
        *("probe", "top1", "top5", "top1_converged", "knn"),
        *("l2", "cosine", "cka", "overlap", "agreement", "test_images", "queries"),
    )
    values = {name: row[name] for name in names if row.get(name) is not None}
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
