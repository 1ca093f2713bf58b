"""Judge a victim, a stolen copy or a random encoder on a downstream data set, and how close a copy is to its victim.

python linear_eval.py --dataset cifar10 --datasetsteal svhn --dataset-test stl10 --losstype mse --num_queries 9000
"""

import copy
import time
from argparse import Namespace
from pathlib import Path

from torch import nn

import options
import runs
from attacks import ATTACKS
from data_aug.datasets import load_labelled, take_balanced
from evaluation import Space, compare, evaluate, load_test, released_probe, represent, represent_both
from loss import LABEL_LOSSES, STEAL_LOSSES, TRAIN_LOSSES
from models import ARCHITECTURES, SimCLREncoder, build_encoder, read_checkpoint
from probes import Labelled, classes_of, knn_accuracy, mlp_probe, top1_top5
from simclr import SimCLR
from stopping import script
from training import Training
from utils import Precision, Run, UserError, save_checkpoint, seeded
from victim import version_of

LOSSES = list(dict.fromkeys([*STEAL_LOSSES, *TRAIN_LOSSES, *LABEL_LOSSES]))
# By what a copy is looked for where the command line doesn't say, for every attack.
COPIES = {**ATTACKS, "stealhead": {}, "steallabels": {"losstype": "direct", "archstolen": "resnet18"}}
# Flags that name the encoder that is judged, with the setting in its file that they are about if there is one; for
# another kind of encoder they mean nothing.
NAMING = {
    "victim": {
        **{"victim": None, "dataset": "dataset", "losstype": "losstype", "epochstrain": "epochs"},
        "watermark": "watermark",
    },
    "stolen": {
        **dict.fromkeys(("victim", "stolen", "head")),
        **{name: name for name in ("dataset", "losstype", "datasetsteal", "epochs", "num_queries", "attack")},
        **{name: name for name in ("epochstrain", "victimhead", "stolenhead", "watermark", "defence", "sigma", "mu")},
        "entropy": None,
    },
    "random": {},
}
# Settings by which an encoder is looked for only where the command line has them.
IF_GIVEN = ("epochstrain", "victimhead", "stolenhead", "watermark", "sigma", "mu")
# Where several copies fit, the one of an attacker who asks each query once, as one account, and takes what it gets.
PLAIN = {"repeat": 1, "restore": False, "max_coverage": None, "sybils": 1, "watermark": False}


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    options.add_data_options(
        parser,
        dataset="data set that the victim was trained on",
        datasetsteal="data set that the queries were from",
        dataset_test="downstream data set",
    )
    parser.add_argument(
        "-n", "--num-labeled", metavar="N", type=options.count, default=50000, help="labelled images, class-balanced"
    )
    parser.add_argument(
        "--num-test", metavar="N", type=options.count, help="test on the last N images only (default: see the README)"
    )
    model = parser.add_argument_group("encoder")
    model.add_argument("--modeltype", choices=list(NAMING), default="stolen", help="which is judged")
    model.add_argument("--victim", metavar="PATH", type=Path, help="checkpoint of the victim (default: found by flags)")
    model.add_argument("--stolen", metavar="PATH", type=Path, help="checkpoint of the copy (default: found by flags)")
    options.add_arch(
        model,
        "-a",
        "--arch",
        text="the judged encoder's architecture (default: the attack's, or resnet34)",
        default=None,
    )
    model.add_argument("--attack", choices=list(COPIES), default="direct", help="of the copy")
    model.add_argument("--losstype", choices=LOSSES, help="loss of the encoder (default: the attack's, or infonce)")
    model.add_argument("--epochstrain", metavar="N", type=options.count, default=200, help="epochs of the victim")
    model.add_argument("--epochs", metavar="N", type=options.count, default=100, help="epochs of the copy")
    model.add_argument("--num_queries", metavar="N", type=options.count, help="budget of the copy (default: 9000)")
    options.add_switch(model, "--head", False, "the copy is stealhead.py's: the same as --attack stealhead")
    options.add_switch(model, "--victimhead", False, "the copy was stolen from projections")
    options.add_switch(model, "--stolenhead", False, "the copy was stolen through a head of its own")
    options.add_switch(model, "--watermark", False, "the watermarked victim, or a copy of it")
    options.add_defence_flag(model, "the copy was stolen against this defence")
    model.add_argument("--sigma", metavar="S", type=float, default=0.5, help="of that defence")
    model.add_argument("--mu", metavar="M", type=float, default=5.0, help="of that defence")
    probe = parser.add_argument_group("probe")
    probe.add_argument("--probe", choices=["linear", "mlp", "knn"], default="linear", help="what reads representations")
    options.add_switch(probe, "--finetune", False, "train the whole encoder on the labelled images instead")
    probe.add_argument("--probe-epochs", metavar="N", type=options.count, default=100, help="epochs of the probe")
    probe.add_argument("-b", "--batch-size", metavar="N", type=options.count, default=256, help="images in a batch")
    probe.add_argument("--lr", metavar="LR", type=options.positive, help="Adam's (default: 1e-4 for copies, else 3e-4)")
    options.add_switch(probe, "--save", False, "keep the classifier, encoder and linear layer, in the checkpoint")
    closeness = parser.add_argument_group("fidelity")
    options.add_switch(closeness, "--fidelity", False, "compare the copy with its victim")
    closeness.add_argument(
        "--independent",
        metavar="PATH|random",
        help="the encoder whose figures stand beside the copy's: a checkpoint, or an untrained one "
        "(default: the other victim of the same data set and architecture, such as one of another seed)",
    )
    options.add_run_options(parser)
    args = parser.parse_args()
    if args.head:
        args.attack = "stealhead"
    named = {"losstype": "infonce", "num_queries": 9000, "archstolen": "resnet34"}
    named |= COPIES[args.attack] if args.modeltype == "stolen" else {}
    named["arch"] = named["archstolen"]
    options.fill(args, {name: named[name] for name in ("losstype", "num_queries", "arch")})
    options.fill(args, {"lr": 1e-4 if args.modeltype == "stolen" else 3e-4})
    options.resolve_defence(args, args.losstype)
    refuse(parser, args)
    return parser, args


def refuse(parser: options.Parser, args: Namespace) -> None:
    """UserError for flags that cannot act."""
    naming = {flag for flags in NAMING.values() for flag in flags}
    idle = dict.fromkeys(naming - NAMING[args.modeltype].keys(), f"with --modeltype {args.modeltype}")
    if args.finetune:
        idle |= dict.fromkeys(("probe", "save", "fidelity"), "with --finetune")
    elif args.probe != "linear":
        idle["save"] = f"with --probe {args.probe}"
        if args.probe == "knn":
            idle |= dict.fromkeys(("probe_epochs", "batch_size", "lr"), "with --probe knn")
    if args.recipe == "released":
        idle |= dict.fromkeys(("probe", "finetune", "save", "fidelity"), "with --recipe released")
    if args.modeltype != "stolen":
        idle["fidelity"] = f"with --modeltype {args.modeltype}: it is a copy's"
    if not args.fidelity:
        idle["independent"] = "without --fidelity"
    options.refuse_idle(parser, args, idle)


def find(args: Namespace) -> Path:
    """The checkpoint to judge."""
    kind = args.modeltype
    if vars(args)[kind]:
        return vars(args)[kind]
    wanted = {"arch" if kind == "victim" else "archstolen": args.arch}
    for flag, name in NAMING[kind].items():
        if name and (flag in args.given or name not in IF_GIVEN):
            wanted[name] = getattr(args, flag)
    if kind == "stolen" and args.victim:
        wanted["victim"] = str(args.victim)
    return runs.find_run(args.checkpoint_dir, kind, wanted, {"seed": args.seed, "recipe": args.recipe, **PLAIN})


def choose(args: Namespace) -> tuple[Path | None, dict, SimCLREncoder]:
    """The encoder to judge, with its file and what that holds; none for a random one."""
    if args.modeltype == "random":
        with seeded(args.seed):
            return None, {}, build_encoder(args.arch)
    path = find(args)
    checkpoint = read_checkpoint(path)
    runs.check_finished(checkpoint, path)
    named = {flag: name for flag, name in NAMING[args.modeltype].items() if name}
    runs.check_named(checkpoint, path, args, named)
    found_by_flags = vars(args)[args.modeltype] is None
    return (
        path,
        checkpoint,
        runs.encoder_of(checkpoint, path, args.arch if found_by_flags or "arch" in args.given else None),
    )


def load_train(args: Namespace) -> Labelled:
    """Labelled images of the downstream data set, as many as asked for."""
    images, labels = load_labelled(args.dataset_test, args.data, "train")
    if args.num_labeled >= len(labels):
        return images, labels
    chosen = take_balanced(labels, args.num_labeled, args.seed)
    return images[chosen], labels[chosen]


def finetune(
    args: Namespace, encoder: SimCLREncoder, train: Labelled, test: Labelled, precision: Precision, run: Run
) -> dict[str, float]:
    """Scores of a copy of the encoder with a linear layer, all of it trained on the labelled images."""
    model = copy.deepcopy(encoder).requires_grad_(True)
    with seeded(args.seed, "probe"):
        model.backbone.fc = nn.Linear(model.dim, classes_of(train, test))
    training = Training(args.probe_epochs, args.batch_size, args.lr, weight_decay=8e-4, seed=args.seed, n_views=1)
    config = runs.configuration("finetuned", args, precision)
    job = SimCLR(model, TRAIN_LOSSES["supervised"], training, run, precision, config, resume=args.resume)
    job.train(*train)
    return top1_top5(represent(model, test[0], precision, output=model.project), test[1].to(precision.device))


def judge(
    args: Namespace, encoder: SimCLREncoder, train: Labelled, test: Labelled, precision: Precision, run: Run
) -> dict[str, float]:
    """Scores of the encoder itself by a protocol that trains it, or has it in train mode."""
    if args.finetune:
        return finetune(args, encoder, train, test, precision, Run(run.folder / "finetuned"))
    return released_probe(encoder, train, test, args.lr, precision, seed=args.seed, **settings_of(args, run))


def read_out(args: Namespace, space: Space, run: Run) -> tuple[dict, dict]:
    """Scores of representations by the probe chosen, and the state_dict of the linear layer if it is one."""
    if args.probe == "knn":
        return {"knn": knn_accuracy(*space)}, {}
    if args.probe == "mlp":
        scores = mlp_probe(*space, args.lr, args.seed, **settings_of(args, run)).scores
        return {name: scores[name] for name in ("top1", "top5")}, {}
    scores, probe = evaluate(*space, args.lr, args.seed, **settings_of(args, run))
    return scores, {"fc.weight": probe.weight.cpu(), "fc.bias": probe.bias.cpu()}


def settings_of(args: Namespace, run: Run) -> dict:
    """What every probe that is trained takes of the flags."""

    def each_epoch(epoch: int, scores: dict[str, float]) -> None:
        run.record(epoch + 1, {"epoch": epoch, **scores})

    return {"batch_size": args.batch_size, "epochs": args.probe_epochs, "each_epoch": each_epoch}


def victim_of(args: Namespace, copy: Path, checkpoint: dict) -> tuple[Path, SimCLREncoder]:
    """The victim that a copy was stolen from. UserError when the file holds other weights, or none is known."""
    above = copy.parent.parent / "checkpoint.pth.tar"  # where it stays when the folder of all runs is moved
    version = checkpoint.get("stolen_from")
    if version is None and not args.victim:  # a copy of the 2022 code
        raise UserError(f"{copy} does not say which victim it was stolen from: give --victim PATH")
    path = args.victim or (above if above.exists() else Path(checkpoint["settings"]["victim"]))
    encoder = runs.encoder_of(read_checkpoint(path), path)
    if version not in (None, version_of(encoder)):
        raise UserError(
            f"{path} is not the victim that this copy was stolen from, or was trained again: give --victim PATH"
        )
    return path, encoder


def independent_of(args: Namespace, victim: Path, encoder: SimCLREncoder) -> tuple[str, SimCLREncoder]:
    """An encoder that has nothing to do with the victim, and what to call it."""
    if args.independent == "random":
        if encoder.arch not in ARCHITECTURES:
            raise UserError(f"{victim} is a {encoder.arch}, of which none is made here: give --independent PATH")
        with seeded(args.seed, "independent"):
            return "random", build_encoder(encoder.arch)
    settings = read_checkpoint(victim).get("settings", {})
    path = args.independent or runs.find_run(
        args.checkpoint_dir,
        "victim",
        {name: settings.get(name) for name in ("dataset", "arch")},
        {name: settings.get(name) for name in ("losstype", "epochs")},
        besides=victim,
        flag="--independent",
    )
    checkpoint = read_checkpoint(path)
    runs.check_finished(checkpoint, Path(path))
    return str(path), runs.encoder_of(checkpoint, Path(path))


@script
def main() -> None:
    started = time.perf_counter()
    parser, args = parse()
    precision = options.set_up(args)
    device = precision.device
    for name in ("victim", "stolen"):
        if vars(args)[name]:
            setattr(args, name, runs.locate(vars(args)[name], args.checkpoint_dir))
    path, checkpoint, encoder = choose(args)
    encoder = encoder.to(device, memory_format=precision.memory_format)
    train = load_train(args)
    last_thousand = args.recipe == "released" and args.dataset_test != "stl10"
    *test, queried = load_test(args.dataset_test, args.data, checkpoint, args.num_test, last_thousand)
    others = {}
    if args.fidelity:
        victim_path, victim = victim_of(args, path, checkpoint)
        independent_path, independent = independent_of(args, victim_path, victim)
        others = {"victim": victim.to(device), "independent": independent.to(device)}

    home = runs.home_of(path, args.checkpoint_dir) if path else args.checkpoint_dir / f"random-{args.arch}"
    implied = (*NAMING["stolen"], "arch", "modeltype", "save")
    run = Run(home / runs.run_name("linear", parser, args, ("dataset_test", "seed"), implied))
    if args.resume and run.checkpoint.exists():
        print(f"{run.checkpoint} is there already\n{runs.as_row(read_checkpoint(run.checkpoint)['row'])}")
        return
    config = runs.configuration("linear", args, precision)
    run.start(config, args.clear)
    run.say(f"{args.modeltype}: {path or args.arch}, {len(train[1])} labelled images, {precision}")
    state = {}
    if args.finetune or args.recipe == "released":
        scores = judge(args, encoder, train, test, precision, run)
    else:
        space = represent_both(encoder, train, test, precision)
        scores, state = read_out(args, space, run)
        if args.save:
            backbone = encoder.state_dict().items()
            state |= {k.removeprefix("backbone."): v.cpu() for k, v in backbone if not k.startswith("backbone.fc.")}
        if others:
            spaces = {name: represent_both(other, train, test, precision) for name, other in others.items()}
            head = encoder.backbone.fc if encoder.has_head else None
            scores |= compare({"copy": space, **spaces}, args.seed, head)
            scores["independent"] = independent_path

    settings = checkpoint.get("settings", {})
    row = {
        "model": args.modeltype,
        "arch": encoder.arch,
        "losstype": settings.get("losstype", args.losstype) if path else None,
        "attack": settings.get("attack"),
        "downstream": args.dataset_test,
        "probe": "finetune" if args.finetune else args.probe,
        **{name: round(value, 6) if isinstance(value, float) else value for name, value in scores.items()},
        "train_images": len(train[1]),
        "test_images": len(test[1]),
        "test_images_queried": queried,
        **runs.ledger_figures(checkpoint),
        "defence": settings.get("defence"),
        **checkpoint.get("met", {}),
        "attacker_labels": settings.get("losstype") == "supcon" and args.modeltype == "stolen",
        "seed": args.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "recipe": args.recipe,
        "checkpoint": str(path) if path else None,
        **config["provenance"],
    }
    # The row first: with the checkpoint there, the run counts as done.
    runs.add_row(run, args.checkpoint_dir, row, step=args.probe_epochs)
    save_checkpoint({"kind": "linear", "arch": encoder.arch, "state_dict": state, "row": row}, run.checkpoint)
    run.finish()


if __name__ == "__main__":
    main()
