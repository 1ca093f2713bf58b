"""Steal an ImageNet-scale encoder, such as the public SimSiam ResNet-50, through its representations.

python stealsimsiam.py --pretrained models/checkpoint_0099-batch256.pth.tar --datasetsteal imagenet --losstype infonce
"""

from argparse import Namespace
from pathlib import Path

import torch

import large_scale
import options
import runs
from attacks import QuerySet, Streamed
from data_aug.datasets import unlabelled_split
from data_aug.pictures import VIEWS, Views, open_pictures
from loss import STEAL_LOSSES
from models import SimSiamHeads, build_copy, read_checkpoint
from models.layouts import IMAGENET
from simclr import SimCLR
from stopping import script
from training import check_plan
from utils import UserError, generator, seeded
from victim import Service, Victim


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    large_scale.add_picture_options(parser, datasetsteal="data set that the queries are from")
    parser.add_argument("--dataset", metavar="NAME", default="imagenet", help="data set that the victim was trained on")
    options.add_switch(parser, "--useval", False, "query the validation (or test) split instead of the training split")
    victim = parser.add_argument_group("victim")
    victim.add_argument("--pretrained", "--victim", dest="victim", metavar="PATH", type=Path, help="its checkpoint")
    victim.add_argument(
        "--epochstrain", metavar="N", type=options.count, help="refuse a victim that was trained for other epochs"
    )
    large_scale.add_large_arch(
        victim, "-a", "--arch", default="resnet50", text="architecture of the victim, and the copy"
    )
    large_scale.add_large_arch(victim, "--archstolen", default=None, text="the copy's (default: --arch)")
    options.add_defence_options(parser)
    queries = parser.add_argument_group("queries")
    queries.add_argument("--num_queries", metavar="N", type=options.count, default=50000, help="budget, and images")
    queries.add_argument(
        "--query-order", choices=["first", "random"], default="random", help="the first images, or random ones by seed"
    )
    queries.add_argument(
        "--query-view",
        choices=VIEWS,
        default="crop",
        help="what the victim is sent of an image, once: a random resized crop, maybe mirrored, or its centre",
    )
    add_training_options(parser)
    options.add_run_options(parser, recipe=False, job=True, streamed=True)
    args = parser.parse_args()
    complete(parser, args)
    return parser, args


def add_training_options(parser: options.Parser) -> None:
    training = large_scale.add_sgd_options(parser, batch_size=128)
    training.add_argument("--losstype", choices=list(STEAL_LOSSES), default="mse", help="loss")
    training.add_argument("--epochs", "--epochssteal", metavar="N", type=options.count, default=100, help="epochs")
    training.add_argument(
        "--temperature", metavar="T", type=options.positive, default=0.07, help="temperature of contrastive losses"
    )
    training.add_argument(
        "--temperaturesn", metavar="T", type=options.positive, default=1000.0, help="temperature of softnn"
    )
    training.add_argument("--lambda-aug", metavar="L", type=float, default=9.0, help="weight of augmentations")
    training.add_argument("--distance", choices=options.DISTANCES, default="l2", help="stolenencoder's distance")
    training.add_argument("--out_dim", metavar="N", type=options.count, default=512, help="of symmetrized's heads")
    options.add_switch(training, "--useaug", True, "the copy sees random views of what the victim was sent")
    training.add_argument("--copy-views", metavar="N", type=options.count, help="how many of them in a step")


def complete(parser: options.Parser, args: Namespace) -> None:
    """Fill in what follows from other flags, and refuse what cannot act."""
    loss = STEAL_LOSSES[args.losstype]
    options.fill(args, {"archstolen": args.arch, "copy_views": loss.min_views})
    options.resolve_defence(args, args.losstype)
    if args.evaluate:
        raise UserError("--evaluate has no effect here: python linsimsiam.py judges the copy")
    if not args.useaug and loss.min_views > 1:
        raise UserError(
            f"{args.losstype} compares views of an image, and one query gives one: leave out --useaug False"
        )
    idle = dict.fromkeys(("temperature", "temperaturesn", "distance", "lambda_aug"), f"with the loss {args.losstype}")
    options.refuse_idle(
        parser,
        args,
        {
            **{name: reason for name, reason in idle.items() if name not in loss.takes.values()},
            **options.idle_without_defence(args),
            "out_dim": None if loss.predictor else f"with the loss {args.losstype}: heads are as wide as an answer",
            "copy_views": None if args.useaug else "without --useaug: the copy sees what was sent",
        },
    )


def queries_of(args: Namespace) -> QuerySet:
    """The attacker's images. UserError when there are fewer than the budget takes."""
    split = "test" if args.useval else unlabelled_split(args.datasetsteal)
    pictures = open_pictures(args.datasetsteal, args.data, split)
    if args.num_queries > len(pictures):
        raise UserError(
            f"this budget takes {args.num_queries} images, the {split} split of {args.datasetsteal} has "
            f"{len(pictures)}: lower --num_queries"
        )
    positions = torch.arange(args.num_queries)
    if args.query_order == "random":  # the first images of a folder are all of the first classes
        order = torch.randperm(len(pictures), generator=generator(args.seed, "query order"))
        positions = order[: args.num_queries].sort().values
    images = Streamed(Views(pictures, args.query_view, args.size, args.seed), positions, args.workers)
    return QuerySet(images, pictures.labels[positions], positions, args.datasetsteal, split)


@script
def main() -> None:
    parser, args = parse()
    precision = options.set_up(args)
    if args.victim is None:
        raise UserError("no victim: give --pretrained PATH of its checkpoint, in any layout of docs/checkpoints.md")
    loss = STEAL_LOSSES[args.losstype]
    training = large_scale.sgd_training(args)
    check_plan(training.plan(loss), loss)
    args.victim = runs.locate(args.victim, args.checkpoint_dir)
    checkpoint = read_checkpoint(args.victim)
    runs.check_named(checkpoint, args.victim, args, {"dataset": "dataset"})
    encoder = runs.encoder_of(checkpoint, args.victim, large_scale.large_arch(args))
    if args.epochstrain not in (None, checkpoint.get("epoch")):
        raise UserError(
            f"{args.victim} was trained for {checkpoint.get('epoch', 'unknown')} epochs, not {args.epochstrain}: "
            f"leave out --epochstrain, or give another victim"
        )
    victim = Victim(Service(encoder.to(precision.device)), args.num_queries, options.defences(args), precision)
    queries = queries_of(args)
    with seeded(args.seed):
        model = build_copy(f"{args.archstolen}-imagenet", victim.dim, IMAGENET, input_size=args.size)
        companion = SimSiamHeads(victim.dim, args.out_dim) if loss.predictor else None
    core = ("datasetsteal", "archstolen", "losstype")
    run, config, extra = runs.open_copy(
        parser, args, core, (args.victim, encoder), queries, precision, large_scale.KIND
    )
    print(f"lr {training.lr:g}: --lr {args.lr:g} times --batch-size / 256; {training.optimizer}")
    job = (config, extra, args.resume, args.clear, companion)
    trainer = SimCLR(model, loss, training, run, precision, *job)
    trainer.first_epoch = max(trainer.first_epoch, args.start_epoch)
    trainer.steal(queries.images, victim, queries.labels)
    print(f"copy: {run.checkpoint}")


if __name__ == "__main__":
    main()
