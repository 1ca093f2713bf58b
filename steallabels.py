"""Steal a downstream classifier through the labels or probabilities it answers: the baseline for stealing encoders.

python steallabels.py -data ./datasets --dataset cifar10 --dataset-test cifar10 --num_queries 9000

The victim is a linear layer on a frozen encoder, as linear_eval.py trains it, or a supervised network of run.py.
"""

import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

import options
import runs
from evaluation import agreement, load_test, represent
from loss import LABEL_LOSSES
from models import SimCLREncoder, build_encoder, read_checkpoint
from probes import top1_top5
from simclr import SimCLR
from stopping import script
from utils import UserError, seeded
from victim import Service, Victim, digest_tensor

MODES = {"direct": "direct", "standard": "direct", "knockoff": "knockoff"}  # standard is the 2022 name of direct


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    options.add_data_options(
        parser,
        dataset="data set that the victim's encoder was trained on",
        datasetsteal="data set that the queries are from",
        dataset_test="downstream data set, which the classifier is for (with --victimtype supervised: --dataset)",
    )
    options.add_victim_options(parser, "--archvic", "--arch-victim")
    parser.add_argument("--victimtype", choices=["simclr", "supervised"], default="simclr", help="kind of victim")
    parser.add_argument(
        "--classifier", metavar="PATH", type=Path, help="linear_eval.py's checkpoint of its linear layer"
    )
    options.add_arch(
        parser,
        *("-a", "--arch", "--archstolen"),
        text="the copy's architecture",
        default="resnet18",
        name="archstolen",
    )
    options.add_query_options(parser)
    training = options.add_training_options(parser, LABEL_LOSSES, epochs=100, losstype=None)
    training.add_argument("--mode", choices=list(MODES), default="direct", help="which recipe: the same as --losstype")
    training.add_argument(
        "--modeloutput", choices=["labels", "logits"], help="what is answered (default: labels; knockoff: logits)"
    )
    parser.add_argument("--num-test", metavar="N", type=options.count, help="test on the last N images only")
    options.add_run_options(parser, recipe=False)
    args = parser.parse_args()
    if {"losstype", "mode"} <= args.given and MODES[args.mode] != args.losstype:
        raise UserError(f"--mode {args.mode} and --losstype {args.losstype} contradict each other: give one")
    args.losstype = args.mode = args.losstype or MODES[args.mode]
    args.attack = "steallabels"
    loss = LABEL_LOSSES[args.losstype]
    options.fill(args, options.of_loss(loss), {"modeloutput": "logits" if args.losstype == "knockoff" else "labels"})
    supervised = args.victimtype == "supervised"
    of_supervised = "with --victimtype supervised" if supervised else None
    idle = dict.fromkeys(("classifier", "lossvictim"), of_supervised)
    idle["force"] = None if args.dataset == args.datasetsteal else f"on another data set than {args.dataset}"
    options.refuse_idle(parser, args, {**options.idle_with(loss, args), **idle})
    if supervised:
        if "dataset_test" in args.given and args.dataset_test != args.dataset:
            raise UserError(f"a supervised victim classifies its own data set: give --dataset-test {args.dataset}")
        args.dataset_test, args.lossvictim = args.dataset, "supervised"
    return parser, args


def open_classifier(args: Namespace, victim: Path, encoder: SimCLREncoder) -> nn.Linear:
    """The victim's linear layer: a supervised network's own, or the one that linear_eval.py trained on its encoder."""
    if args.victimtype == "supervised":
        return encoder.backbone.fc
    wanted = {"modeltype": "victim", "dataset_test": args.dataset_test, "probe": "linear", "finetune": False}
    home = runs.home_of(victim, args.checkpoint_dir)
    try:
        path = args.classifier or runs.find_run(
            home, "linear", wanted, {"recipe": "standard", "seed": args.seed}, flag="--classifier"
        )
    except UserError as error:
        judge = f"linear_eval.py --modeltype victim --victim {victim} --arch {encoder.arch}"
        command = f"{judge} --dataset-test {args.dataset_test}"
        raise UserError(f"{error} (`{command}` trains one)") from None
    state = read_checkpoint(path).get("state_dict", {})
    weight = state.get("fc.weight")
    if weight is None or weight.shape[1] != encoder.dim or "fc.bias" not in state:
        raise UserError(f"{path} has no linear layer for representations of {encoder.dim} numbers")
    layer = nn.Linear(*reversed(weight.shape))
    layer.load_state_dict({"weight": weight, "bias": state["fc.bias"]})
    return layer


@script
def main() -> None:
    started = time.perf_counter()
    parser, args = parse()
    loss = LABEL_LOSSES[args.losstype]
    precision = options.set_up(args)
    path, encoder = runs.open_victim(args)
    classifier = open_classifier(args, path, encoder)
    sells = "labels" if args.modeloutput == "labels" else "probabilities"
    service = Service(encoder, sells, classifier).to(precision.device)
    queries = runs.queries_of(args, args.num_queries)
    victim = Victim(service, budget=args.num_queries, precision=precision)
    with seeded(args.seed):
        model = build_encoder(args.archstolen, victim.dim, encoder.normalize, head="linear")
    core = ("attack", "dataset_test", "datasetsteal", "archstolen", "losstype")
    run, config, extra = runs.open_copy(parser, args, core, (path, encoder), queries, precision)
    trainer = SimCLR(model, loss, options.training(args), run, precision, config, extra, args.resume, args.clear)
    # Before anything is paid for: are there test images that were not queried?
    record = {**queries.record(), "query_digests": digest_tensor(queries.images)}
    images, labels, queried = load_test(args.dataset_test, args.data, record, args.num_test)
    if len(labels) and int(labels.max()) >= victim.dim:
        raise UserError(f"{args.dataset_test} has more classes than the victim's {victim.dim}: give its --dataset-test")
    trainer.steal(queries.images, victim)

    labels = labels.to(precision.device)
    copied = represent(model, images, precision, output=model.project)
    original = torch.cat([classifier(h) for h in represent(encoder, images, precision).split(4096)])
    figures = {
        **top1_top5(copied, labels),
        "victim_top1": top1_top5(original, labels)["top1"],
        "agreement": agreement(copied.argmax(dim=1), original.argmax(dim=1)),
    }
    row = {
        **{"model": "stolen", "attack": args.attack, "arch": args.archstolen, "losstype": args.losstype},
        **{"modeloutput": args.modeloutput, "downstream": args.dataset_test},
        **{name: round(value, 6) for name, value in figures.items()},
        **{"test_images": len(labels), "test_images_queried": queried, **runs.ledger_figures(trainer.extra)},
        **{"seed": args.seed, "seconds": round(time.perf_counter() - started, 1), "checkpoint": str(run.checkpoint)},
        **config["provenance"],
    }
    runs.add_row(run, args.checkpoint_dir, row, step=args.epochs)
    print(f"copy: {run.checkpoint}")


if __name__ == "__main__":
    main()
