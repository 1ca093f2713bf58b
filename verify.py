"""Is this encoder stolen? Asks the rotation watermark in a victim, or the images that the victim was trained on.

python verify.py --method watermark --victim VICTIM.pth.tar --suspect SUSPECT.pth.tar --independent A.pth.tar B.pth.tar

A suspect is called stolen when every test that the encoders given allow has a p-value below --level. Tests over images
tell chance from a difference, however small; the test over encoders tells a copy's difference from those that encoders
have by nature, and needs two or more that are independent of the victim. Where a test does not find the victim itself,
it cannot decide anything.
"""

import hashlib
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

import options
import runs
from defenses.dataset_inference import COMPONENTS
from models import read_checkpoint
from ownership import METHODS, Figures, Judged, dataset_of
from statistical_tests import roc
from stopping import script
from utils import Run, UserError
from victim import version_of


def share(text: str) -> float:
    """A number between 0 and 1."""
    value = options.positive(text)
    if value >= 1:
        raise ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    options.add_data_options(parser)
    parser.add_argument("--method", choices=list(METHODS), required=True, help="what gives a copy away")
    paths = {"metavar": "PATH", "type": Path}
    parser.add_argument("--suspect", nargs="+", required=True, **paths, help="checkpoints of the encoders in question")
    parser.add_argument("--victim", required=True, **paths, help="the owner's checkpoint; a watermark's has its MLP")
    parser.add_argument("--independent", nargs="+", **paths, help="checkpoints that are surely no copies")
    parser.add_argument("--level", metavar="P", type=share, default=0.05, help="p-value below which a test is passed")
    parser.add_argument(
        "--dataset", metavar="NAME", type=options.dataset_name, help="the victim's (default: what its file says)"
    )
    parser.add_argument(
        "--num-test", metavar="N", type=options.count, help="the last N test images only (default: all not queried)"
    )
    inference = parser.add_argument_group("dataset inference")
    inference.add_argument(
        "--num-train", metavar="N", type=options.count, help="of the victim's training images (default: all)"
    )
    inference.add_argument(
        "--components",
        metavar="N",
        type=options.count,
        default=COMPONENTS,
        help="of the Gaussian mixture; the authors took 50 for ImageNet",
    )
    options.add_run_options(parser, recipe=False)
    args = parser.parse_args()
    only = "with --method watermark" if args.method == "watermark" else None
    options.refuse_idle(parser, args, {"num_train": only, "components": only})
    return parser, args


# ---- encoders and images ----


def open_all(args: Namespace) -> list[Judged]:
    """The victim, the suspects and the independent encoders. UserError for one that cannot be what it is given as."""
    paths = [("victim", args.victim), *(("suspect", path) for path in args.suspect)]
    paths += [("independent", path) for path in args.independent or ()]
    encoders = []
    for kind, path in paths:
        checkpoint = read_checkpoint(path)
        if kind != "suspect":  # a thief may have stopped early
            runs.check_finished(checkpoint, path)
        encoders.append(Judged(kind, path, checkpoint, runs.encoder_of(checkpoint, path)))
    stolen_from = version_of(encoders[0].encoder)
    for one in encoders:
        if one.kind == "independent" and stolen_from in (version_of(one.encoder), one.checkpoint.get("stolen_from")):
            raise UserError(f"{one.path} is the victim or a copy of it: it is not an independent encoder")
    return encoders


# ---- the verdict ----


def judge_all(args: Namespace, encoders: Sequence[Judged]) -> None:
    """Fill in the figures and verdicts; an independent encoder is judged beside the other independent ones."""
    *_, judge, _, claim = METHODS[args.method]
    for one in encoders:
        others = [other.measured for other in encoders if other.kind == "independent" and other is not one]
        one.figures = judge(one.measured, others)
    decides = passes(encoders[0].figures, args.level)
    for one in encoders:
        one.found = passes(one.figures, args.level) if decides or one.kind == "victim" else None
        tests = ", ".join(f"{key[2:]} p = {value:.3g}" for key, value in one.figures.items() if key.startswith("p_"))
        facts = f"{claim.format(**one.figures)}; effect size {one.figures['effect']:.2f}; {tests}"
        finding = ("stolen" if one.found else "no proof of theft") if decides else "undecided"
        if one.kind == "victim":
            finding = "found, so the method works" if decides else "not found, so the method cannot decide here"
        elif decides:
            facts += caveat(one.figures)
        one.verdict = f"{finding} at level {args.level:g} ({facts})"


def passes(figures: Figures, level: float) -> bool:
    """Whether each p-value that there is lies below the level."""
    return all(value < level for name, value in figures.items() if name.startswith("p_"))


def caveat(figures: Figures) -> str:
    """What a verdict lacks for want of independent encoders, for its end."""
    if "p_encoders" in figures:
        return ""
    alone = "" if "p_t" in figures else "by the binomial test against 50 % alone, "
    return f"; {alone}not held against the spread of independent encoders: an innocent one may pass"


def table(encoders: Sequence[Judged]) -> str:
    """One Markdown row for each encoder."""
    found = {True: "yes", False: "no", None: "undecided"}
    names = list(dict.fromkeys(name for one in encoders for name in one.figures))
    lines = [f"| kind | {' | '.join(names)} | found | encoder |", "|---" * (len(names) + 3) + "|"]
    for one in encoders:
        cells = " | ".join(f"{one.figures[name]:.3g}" if name in one.figures else "" for name in names)
        lines.append(f"| {one.kind} | {cells} | {found[one.found]} | {short_name(one.path)} |")
    return "\n".join(lines)


def each_test(group: Sequence[Judged], args: Namespace) -> str:
    """How many of the encoders each test finds, in words: what it would be worth alone."""
    tests = list(dict.fromkeys(name for one in group for name in one.figures if name.startswith("p_")))
    counts = {name: sum(one.figures.get(name, 1) < args.level for one in group) for name in tests}
    return "each test alone: " + ", ".join(f"{name[2:]} {count}" for name, count in counts.items())


def short_name(path: Path) -> str:
    return path.parent.name if path.name == "checkpoint.pth.tar" else path.name


def curve(args: Namespace, encoders: Sequence[Judged]) -> tuple[list[str], Figures]:
    """What the rule and the method's score do over all suspects and independent encoders, in words and as figures."""
    groups = {kind: [one for one in encoders if one.kind == kind] for kind in ("suspect", "independent")}
    shares = {kind: [bool(one.found) for one in group] for kind, group in groups.items()}
    lines = [
        f"{kind} encoders found at level {args.level:g}: {sum(shares[kind])} of {len(group)}; {each_test(group, args)}"
        for kind, group in groups.items()
        if group
    ]
    if min(map(len, groups.values())) < 2:
        return [*lines, "no ROC is drawn: it takes two suspects and two independent encoders or more"], {}
    name = METHODS[args.method][2]
    points, area = roc(*([one.figures[name] for one in group] for group in groups.values()))
    steps = ", ".join(f"{100 * false:.0f}/{100 * hit:.0f}" for false, hit in points)
    lines.append(f"ROC by {name}: AUC {area:.3f}; false accusations/detections in %: {steps}")
    return lines, {"auc": area, "false_accusations": sum(shares["independent"]) / len(shares["independent"])}


# ---- the run ----


def run_of(parser: options.Parser, args: Namespace) -> Run:
    """The folder for these encoders, below the victim's."""
    paths = [*args.suspect, "and", *(args.independent or ())]
    digest = hashlib.sha256("\n".join(map(str, paths)).encode()).hexdigest()[:8]
    name = runs.run_name("verify", parser, args, ("method", "seed"), ("suspect", "dataset"))
    return Run(runs.home_of(args.victim, args.checkpoint_dir) / f"{name}-{digest}")


def row_of(one: Judged, args: Namespace, more: dict) -> dict:
    """What results.jsonl says of a suspect."""
    settings = one.checkpoint.get("settings", {})
    return {
        **{"model": one.kind, "arch": one.encoder.arch, "losstype": settings.get("losstype")},
        **{"attack": settings.get("attack"), "method": args.method, "level": args.level},
        **one.figures,
        **{"found": one.found, "verdict": one.verdict, "independents": len(args.independent or ())},
        **runs.ledger_figures(one.checkpoint),
        **{"defence": settings.get("defence"), "seed": args.seed},
        **{"checkpoint": str(one.path), "victim": str(args.victim)},
        **more,
    }


@script
def main() -> None:
    started = time.perf_counter()
    parser, args = parse()
    precision = options.set_up(args)
    args.victim = runs.locate(args.victim, args.checkpoint_dir)
    encoders = open_all(args)
    measure, counts = METHODS[args.method][0](args, encoders, precision)
    run = run_of(parser, args)
    rows = [record["row"] for record in run.records() if "row" in record] if args.resume else []
    if rows:
        print(f"{run.metrics} is there already", *(f"{row['checkpoint']}: {row['verdict']}" for row in rows), sep="\n")
        return
    for one in encoders:
        one.measured = measure(one)
        one.encoder.cpu()
    judge_all(args, encoders)
    words, overall = curve(args, encoders)
    config = runs.configuration("verify", args, precision)
    for name in ("suspect", "independent"):
        config["settings"][name] = [str(path) for path in vars(args)[name] or ()]
    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    run.start(config, args.clear)
    dataset = dataset_of(args, encoders[0])
    number = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items())
    run.say(f"{args.method} on {dataset}: {number}, {precision}")
    run.say(table(encoders))
    for line in words:
        run.say(line)
    for one in encoders:
        if one.kind != "independent":
            run.say(f"{one.kind} {short_name(one.path)}: {one.verdict}")
    more = {"dataset": dataset, **counts, **overall, "seconds": round(time.perf_counter() - started, 1)}
    for step, one in enumerate(one for one in encoders if one.kind == "suspect"):
        runs.add_row(run, args.checkpoint_dir, row_of(one, args, {**more, **config["provenance"]}), step)
    run.finish()


if __name__ == "__main__":
    main()
