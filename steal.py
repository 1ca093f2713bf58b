"""Steal an encoder through the representations it answers.

python steal.py -data ./datasets --dataset cifar10 --datasetsteal svhn --arch resnet34 --losstype mse --num_queries 9000
"""

from argparse import Namespace

import options
import runs
from attacks import ATTACKS
from loss import STEAL_LOSSES
from models import SimSiamHeads, build_copy
from simclr import SimCLR, check_plan
from utils import UserError, script, seeded
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
    queries = options.add_query_options(parser, num_queries=None)
    queries.add_argument("--n-views", metavar="N", type=options.count, help="queries for each image")
    options.add_switch(queries, "--queryaug", None, "send random views (default: with several queries for an image)")
    options.add_switch(
        queries, "--prototype", None, "the mean answer to an image's queries is the target of all its views"
    )
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
    options.add_run_options(parser)
    args = parser.parse_args()
    complete(parser, args)
    return parser, args


def complete(parser: options.Parser, args: Namespace) -> None:
    """Fill in what the command line left open: the attack's values, the loss's, then those of the 2022 code."""
    attack = ATTACKS[args.attack]
    options.fill(args, attack, {"losstype": "infonce"})
    loss = STEAL_LOSSES[args.losstype]
    general = {"archstolen": "resnet34", "num_queries": 9000, "temperature": 0.07, "prototype": False, "useaug": False}
    options.fill(args, options.of_loss(loss), general, {"n_views": loss.min_views})
    paired = args.n_views if args.useaug and not args.prototype else loss.min_views
    options.fill(args, {"queryaug": args.n_views > 1, "copy_views": paired})
    options.refuse_idle(
        parser,
        args,
        {
            "lambda_aug": None if args.useaug else "without --useaug: there are no augmentations to weigh",
            **options.idle_with(loss, args),
            "copy_views": None if args.useaug else "without --useaug: the copy sees what was sent",
            "prototype": None if args.n_views > 1 else "with one query for each image",
            "out_dim": None if loss.predictor else f"with the loss {args.losstype}: heads are as wide as an answer",
            "force": None if args.dataset == args.datasetsteal else f"on another data set than {args.dataset}",
        },
    )


@script
def main() -> None:
    parser, args = parse()
    loss, training = STEAL_LOSSES[args.losstype], options.training(args)
    check_plan(training.plan(loss), loss)
    precision = options.set_up(args)
    path, encoder = runs.open_victim(args)
    if args.victimhead and not encoder.has_head:
        raise UserError(f"{path} has no projection head: leave out --victimhead")
    queries = runs.queries_of(args, args.n_views)
    # The released recipe asks everything again in every epoch: that is what its budget has to cover.
    rounds = args.epochs if args.recipe == "released" else 1
    service = Service(encoder.to(precision.device), "projections" if args.victimhead else "representations")
    victim = Victim(service, budget=args.num_queries * rounds, precision=precision)
    with seeded(args.seed):
        model = build_copy(args.archstolen, victim.dim, encoder.normalize, args.stolenhead)
        companion = SimSiamHeads(victim.dim, args.out_dim) if loss.predictor else None

    core = ("datasetsteal", "archstolen", "losstype")
    run, config, extra = runs.open_copy(parser, args, core, (path, encoder), queries, precision)
    if loss.needs_labels:
        print(f"{args.losstype}: this attacker has the true labels of the images queried")
    trainer = SimCLR(model, loss, training, run, precision, config, extra, args.resume, args.clear, companion)
    trainer.steal(queries.images, victim, queries.labels)
    print(f"copy: {run.checkpoint}")


if __name__ == "__main__":
    main()
