"""Steal an encoder through the representations it answers.

python steal.py -data ./datasets --dataset cifar10 --datasetsteal svhn --arch resnet34 --losstype mse --num_queries 9000
"""

from argparse import Namespace
from argparse import _ArgumentGroup as ArgumentGroup

import options
import runs
from attacks import ATTACKS
from defenses.watermark import check_width, read_watermark, watermark_line
from evaluation import load_test
from loss import STEAL_LOSSES, Loss
from models import SimSiamHeads, build_copy, read_checkpoint
from simclr import SimCLR
from stopping import script
from training import check_plan
from utils import UserError, seeded
from victim import Service, Victim


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--attack",
        choices=list(ATTACKS),
        default="direct",
        help="published attack whose settings fill in what is not given",
    )
    options.add_data_options(
        parser, dataset="data set that the victim was trained on", datasetsteal="data set that the queries are from"
    )
    options.add_victim_options(parser, "-a", "--arch")
    options.add_switch(parser, "--victimhead", False, "the victim answers projections instead of representations")
    options.add_switch(parser, "--watermark", False, "steal the watermarked victim, and test the copy for the mark")
    options.add_defence_options(parser)
    queries = options.add_query_options(parser, num_queries=None)
    queries.add_argument("--n-views", metavar="N", type=options.count, help="queries for each image")
    options.add_switch(queries, "--queryaug", None, "send random views (default: with several queries for an image)")
    options.add_switch(
        queries, "--prototype", None, "the mean answer to an image's queries is the target of all its views"
    )
    add_adaptive_options(queries)
    options.add_arch(
        parser, "--archstolen", text="the copy's architecture (default: resnet34)", default=None, name="archstolen"
    )
    options.add_switch(parser, "--stolenhead", False, "the copy matches the answers through a head of its own")
    training = options.add_training_options(parser, STEAL_LOSSES, epochs=100, losstype=None)
    training.add_argument(
        "--out_dim", metavar="N", type=options.count, default=512, help="width of symmetrized's heads"
    )
    options.add_switch(training, "--useaug", None, "the copy sees random views of its own, not what the victim saw")
    training.add_argument("--copy-views", metavar="N", type=options.count, help="how many of them (default: --n-views)")
    options.add_run_options(parser, job=True)
    args = parser.parse_args()
    complete(parser, args)
    return parser, args


def add_adaptive_options(queries: ArgumentGroup) -> None:
    """What an attacker does who expects a defence (adaptive.py)."""
    queries.add_argument(
        "--repeat", metavar="K", type=options.count, default=1, help="ask each query K times and take the mean answer"
    )
    options.add_switch(
        queries,
        "--restore",
        False,
        "undo poisoning, rounding, top-k and noise as far as all answers show them",
    )
    queries.add_argument(
        "--max-coverage",
        metavar="P",
        type=options.positive,
        help="choose queries that stay in few buckets, and stop when a hash table of one's own is P percent full",
    )
    queries.add_argument(
        "--sybils", metavar="K", type=options.count, default=1, help="ask as K accounts and align their answers"
    )
    queries.add_argument(
        "--shared",
        metavar="N",
        type=options.count,
        help="queries that all sybils ask, to be aligned by (default: a twentieth of the budget)",
    )


def complete(parser: options.Parser, args: Namespace) -> None:
    """Fill in what the command line left open: the attack's values, the loss's, then those of the 2022 code."""
    attack = ATTACKS[args.attack]
    options.fill(args, attack, {"losstype": "infonce"})
    loss = STEAL_LOSSES[args.losstype]
    general = {"archstolen": "resnet34", "num_queries": 9000, "temperature": 0.07, "prototype": False, "useaug": False}
    options.fill(args, options.of_loss(loss), general, {"n_views": loss.min_views})
    paired = args.n_views if args.useaug and not args.prototype else loss.min_views
    shared = max(2, args.num_queries // 20) if args.sybils > 1 else 0
    options.fill(args, {"queryaug": args.n_views > 1, "copy_views": paired, "shared": shared})
    options.resolve_defence(args, args.losstype)
    refuse(parser, args, loss)


def refuse(parser: options.Parser, args: Namespace, loss: Loss) -> None:
    """UserError for flags that cannot act, or not together."""
    if args.max_coverage is not None and (args.n_views > 1 or args.sybils > 1 or args.queryaug):
        raise UserError(
            "--max-coverage chooses plain images for one account: leave out --n-views, --queryaug, --sybils"
        )
    if args.recipe == "released" and (args.max_coverage is not None or args.restore):
        raise UserError("--max-coverage and --restore take all answers together: leave out --recipe released")
    options.refuse_idle(
        parser,
        args,
        {
            "lambda_aug": None if args.useaug else "without --useaug: there are no augmentations to weigh",
            **options.idle_with(loss, args),
            "copy_views": None if args.useaug else "without --useaug: the copy sees what was sent",
            "prototype": None if args.n_views > 1 else "with one query for each image",
            "shared": None if args.sybils > 1 else "without --sybils",
            **options.idle_without_defence(args),
            "out_dim": None if loss.predictor else f"with the loss {args.losstype}: heads are as wide as an answer",
            "force": None if args.dataset == args.datasetsteal else f"on another data set than {args.dataset}",
        },
    )


def images_for(args: Namespace) -> int:
    """How many images the budget covers. UserError when that is none."""
    if args.sybils > 1 and args.shared < 2:
        raise UserError(f"--shared {args.shared} is too few to align accounts by: give 2 or more, better 100")
    overhead = (args.sybils - 1) * args.shared
    count = (args.num_queries // args.repeat - overhead) // args.n_views
    if count < 1 or args.shared >= count * args.n_views:
        raise UserError(
            f"--num_queries {args.num_queries} are too few for {args.repeat} askings of {args.n_views} views and "
            f"{overhead} shared queries: give more, or lower --repeat, --sybils or --shared"
        )
    return count


@script
def main() -> None:
    parser, args = parse()
    loss, training = STEAL_LOSSES[args.losstype], options.training(args)
    check_plan(training.plan(loss), loss)
    precision = options.set_up(args)
    path, encoder = runs.open_victim(args)
    mlp = read_watermark(read_checkpoint(path), str(path)) if args.watermark else None
    if args.victimhead and not encoder.has_head:
        raise UserError(f"{path} has no projection head: leave out --victimhead")
    # The released recipe asks everything again in every epoch: that is what its budget has to cover.
    rounds = args.epochs if args.recipe == "released" else 1
    service = Service(encoder.to(precision.device), "projections" if args.victimhead else "representations")
    victim = Victim(service, args.num_queries * rounds, options.defences(args), precision)
    count = images_for(args)
    queries = runs.queries_of(args, count)
    with seeded(args.seed):
        model = build_copy(args.archstolen, victim.dim, encoder.normalize, args.stolenhead)
        companion = SimSiamHeads(victim.dim, args.out_dim) if loss.predictor else None
    if mlp is not None:
        check_width(mlp, model)

    core = ("datasetsteal", "archstolen", "losstype")
    run, config, extra = runs.open_copy(parser, args, core, (path, encoder), queries, precision)
    if loss.needs_labels:
        print(f"{args.losstype}: this attacker has the true labels of the images queried")
    trainer = SimCLR(model, loss, training, run, precision, config, extra, args.resume, args.clear, companion)
    trainer.steal(queries.images, victim, queries.labels, budget=count)
    if mlp is not None:
        test, _, _ = load_test(args.dataset, args.data, trainer.extra)
        print(watermark_line(model, mlp, test, precision, args.seed))
    print(f"copy: {run.checkpoint}")


if __name__ == "__main__":
    main()
