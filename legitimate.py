"""What a paying user loses under a defence: a downstream head trained and used on the answers, defended and not.

python legitimate.py -data ./datasets --dataset cifar10 --arch resnet34 --defence noise --sigma 0.5

The user has labelled images, buys the victim's representations of them, trains a head on these, and buys those of the
images that the head is for: training and use see the same defence, in one account.
"""

import time
from argparse import Namespace

import torch

import options
import runs
from data_aug.datasets import load_labelled, load_queries
from defenses import Defence
from evaluation import load_test
from loss import STEAL_LOSSES
from models import SimCLREncoder
from probes import Labelled, logistic_regression, mlp_probe
from stopping import script
from utils import Precision, Run, UserError
from victim import Purchases, Service, Victim, digest_tensor

ACCOUNT = "user"


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    options.add_data_options(
        parser,
        dataset="data set that the victim was trained on",
        dataset_test="the user's: as trained on by the victim, its test images without the last 1,000 are the user's",
    )
    options.add_victim_options(parser, "-a", "--arch", "--archvic")
    options.add_defence_options(parser)
    parser.add_argument(
        "--losstype",
        choices=list(STEAL_LOSSES),
        default="infonce",
        help="--defence True means what it does against an attack by this loss",
    )
    parser.add_argument(
        "--num_queries", metavar="N", type=options.count, default=9000, help="labelled images that the user trains on"
    )
    parser.add_argument("--num-test", metavar="N", type=options.count, help="test on the last N images only")
    head = parser.add_argument_group("head")
    head.add_argument("--epochs", metavar="N", type=options.count, default=100, help="epochs of the head's training")
    head.add_argument("-b", "--batch-size", metavar="N", type=options.count, default=64, help="images in a batch")
    head.add_argument("--lrhead", metavar="LR", type=options.positive, default=1e-3, help="Adam's learning rate")
    head.add_argument("--wd", "--weight-decay", metavar="WD", type=float, default=1e-4, dest="weight_decay")
    options.add_run_options(parser, recipe=False)
    args = parser.parse_args()
    named = args.defence is True
    options.resolve_defence(args, args.losstype)
    idle = {"losstype": None if named else "without --defence True"}
    options.refuse_idle(parser, args, {**idle, **options.idle_without_defence(args)})
    return parser, args


def load_user(args: Namespace) -> tuple[Labelled, Labelled, int]:
    """The user's labelled images to train on and to test on, and how many of the latter are among the former."""
    name = args.dataset_test
    if name == args.dataset:  # the victim was trained on the others
        images, labels, split = load_queries(name, args.dataset, args.data)
    else:
        images, labels, split = *load_labelled(name, args.data, "train"), "train"
    if (labels < 0).any():
        raise UserError(f"the {split} split of {name} has images without labels: choose another --dataset-test")
    if args.num_queries > len(images):
        raise UserError(f"the {split} split of {name} has {len(images)} images for a user: lower --num_queries")
    images, labels = images[: args.num_queries], labels[: args.num_queries]
    record = {"query_set": {"dataset": name, "split": split}, "query_digests": digest_tensor(images)}
    test_images, test_labels, common = load_test(name, args.data, record, args.num_test)
    return (images, labels), (test_images, test_labels), common


def served(
    args: Namespace,
    encoder: SimCLREncoder,
    train: Labelled,
    test: Labelled,
    precision: Precision,
    defences: list[Defence],
) -> tuple[dict[str, float], Victim]:
    """What a user reaches on answers of a victim with these defences, and that victim.

    top1 and top5: the head of the 2022 code, two layers as wide as an answer; top1_converged: a linear one.
    """
    victim = Victim(Service(encoder), defences=defences, precision=precision)
    purchases = Purchases(victim)
    answers = [
        (purchases.ask(images, ACCOUNT).to(precision.device), labels.to(precision.device))
        for images, labels in (train, test)
    ]
    settings = {"epochs": args.epochs, "batch_size": args.batch_size, "weight_decay": args.weight_decay}
    head = mlp_probe(*answers, args.lrhead, args.seed, hidden=victim.dim, **settings)
    linear = logistic_regression(*answers, args.seed)
    scores = {name: head.scores[name] for name in ("top1", "top5", "loss")}
    scores["top1_converged"] = linear.scores["top1"]
    return scores, victim


@script
def main() -> None:
    started = time.perf_counter()
    parser, args = parse()
    precision = options.set_up(args)
    defences = options.defences(args)
    path, encoder = runs.open_victim(args)
    encoder = encoder.to(precision.device)
    train, test, common = load_user(args)
    implied = ("dataset", "arch", "epochstrain", "lossvictim", "losstype")
    name = runs.run_name("legitimate", parser, args, ("dataset_test", "num_queries", "seed"), implied)
    run = Run(runs.home_of(path, args.checkpoint_dir) / name)
    config = runs.configuration("legitimate", args, precision)

    # The defended answers first: what cannot work is refused before anything is written.
    scores, victim = served(args, encoder, train, test, precision, defences)
    clean = served(args, encoder, train, test, precision, [])[0] if defences else scores
    run.start(config, args.clear)
    run.say(f"victim: {path}")
    sources = {ACCOUNT: torch.arange(len(train[1]) + len(test[1]))}
    row = {
        **{"model": "user", "arch": encoder.arch, "downstream": args.dataset_test, "defence": args.defence},
        **{name: round(value, 6) for name, value in scores.items()},
        **{f"clean_{name}": round(value, 6) for name, value in clean.items()},
        **victim.met(sources),
        **{"train_images": len(train[1]), "test_images": len(test[1]), "test_images_queried": common},
        **{"queries": victim.ledger.queries, "distinct": victim.ledger.distinct, "seed": args.seed},
        **{"seconds": round(time.perf_counter() - started, 1), "checkpoint": str(path), **config["provenance"]},
    }
    run.say(f"without a defence: top1 {clean['top1']:.2f}, top1_converged {clean['top1_converged']:.2f}")
    if defences:
        lost = clean["top1_converged"] - scores["top1_converged"]
        run.say(f"with {args.defence}: top1 {scores['top1']:.2f}, top1_converged {scores['top1_converged']:.2f}")
        run.say(f"the user loses {clean['top1'] - scores['top1']:.2f} and {lost:.2f} points")
    runs.add_row(run, args.checkpoint_dir, row, step=args.epochs)
    run.finish()


if __name__ == "__main__":
    main()
