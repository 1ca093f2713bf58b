"""Steal an encoder by first re-creating its projection head from the representations it answers.

python stealhead.py -data ./datasets --dataset cifar10 --datasetsteal svhn --losstype infonce --num_queries 9000

Phase 1 trains a head on answers to views of some of the images; phase 2 trains the copy to match, through a head of its
own, what that head makes of the answers. Both phases spend one budget; phase 2 uses phase 1's answers again for free.
"""

import dataclasses
from argparse import Namespace

import torch
from torch import Tensor

import options
import runs
from loss import HEAD_LOSSES, STEAL_LOSSES
from models import SimSiamHeads, build_copy, projection_head
from simclr import SimCLR
from stopping import script
from training import check_plan
from utils import Run, UserError, seeded
from victim import Service, Victim

# The copy sees what was sent, so there is nothing here for a loss about augmentations of its own.
LOSSES = {name: loss for name, loss in STEAL_LOSSES.items() if not loss.plain_first}


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    options.add_data_options(
        parser, dataset="data set that the victim was trained on", datasetsteal="data set that the queries are from"
    )
    options.add_victim_options(parser, "--archvic", "--arch-victim")
    options.add_switch(
        parser, "--victimhead", False, "the victim answers its projections too; --losshead msewithhead needs them"
    )
    options.add_defence_options(parser)
    options.add_arch(parser, "-a", "--arch", "--archstolen", text="the copy's architecture", name="archstolen")
    queries = options.add_query_options(parser)
    queries.add_argument("--n-views", metavar="N", type=options.count, default=2, help="queries (views) for each image")
    queries.add_argument(
        "--head-queries", metavar="N", type=options.count, help="share of the budget for the head (default: half)"
    )
    options.add_training_options(parser, LOSSES, epochs=100)
    head = parser.add_argument_group("head")
    head.add_argument(
        "--losshead", choices=list(HEAD_LOSSES), default="infonce", help="loss that the head is trained by"
    )
    head.add_argument("--lrhead", metavar="LR", type=options.positive, default=1e-3, help="Adam's learning rate for it")
    head.add_argument("--epochshead", metavar="N", type=options.count, help="epochs for it (default: twice --epochs)")
    head.add_argument("--out_dim", metavar="N", type=options.count, default=128, help="width of its outputs")
    options.add_run_options(parser, recipe=False)
    args = parser.parse_args()
    args.attack = "stealhead"
    loss, head_loss = LOSSES[args.losstype], HEAD_LOSSES[args.losshead]
    options.fill(args, options.of_loss(loss), {"temperature": 0.07})
    options.fill(args, {"head_queries": args.num_queries // 2, "epochshead": 2 * args.epochs})
    idle = options.idle_with(loss, args)
    for name in head_loss.takes.values():
        idle.pop(name, None)
    if args.losshead == "msewithhead":
        idle["out_dim"] = "with --losshead msewithhead: the true projections have their width"
    options.resolve_defence(args, args.losshead)
    options.refuse_idle(parser, args, {**idle, **options.idle_without_defence(args)})
    return parser, args


def check(args: Namespace) -> None:
    """UserError for combinations that cannot work."""
    if args.n_views < HEAD_LOSSES[args.losshead].min_views:
        raise UserError(
            f"--losshead {args.losshead} compares views: --n-views {args.n_views} is too few, give 2 or more"
        )
    if args.victimhead != (args.losshead == "msewithhead"):
        raise UserError("--victimhead True and --losshead msewithhead go together: give both or neither")
    if not args.n_views <= args.head_queries <= args.num_queries:
        raise UserError(
            f"--head-queries {args.head_queries} must be from --n-views {args.n_views} to {args.num_queries}"
        )


def recreate_head(args: Namespace, answers: Tensor, images: int, trainer: dict, run: Run) -> torch.nn.Module:
    """Phase 1: a head (frozen) trained on the answers (V * N, D) to the first so many of N images."""
    rows = answers.view(args.n_views, -1, answers.shape[1])[:, :images].flatten(0, 1)
    dim = answers.shape[1] - args.out_dim if args.victimhead else answers.shape[1]
    with seeded(args.seed, "head"):
        head = projection_head(dim, args.out_dim)
    loss = HEAD_LOSSES[args.losshead]
    settings = dataclasses.replace(
        options.training(args),
        epochs=args.epochshead,
        batch_size=min(loss.batch_size, images),
        lr=args.lrhead,
        weight_decay=loss.weight_decay,
        optimizer=loss.optimizer,
    )
    SimCLR(head, loss, settings, run, **trainer).train_head(rows[:, :dim], rows[:, dim:] if args.victimhead else None)
    return head.eval().requires_grad_(False)


@script
def main() -> None:
    parser, args = parse()
    check(args)
    loss, training = LOSSES[args.losstype], options.training(args)
    check_plan(training.plan(loss), loss)
    precision = options.set_up(args)
    path, encoder = runs.open_victim(args)
    if args.victimhead:
        if not encoder.has_head:
            raise UserError(f"{path} has no projection head: leave out --victimhead")
        args.out_dim = encoder.out_dim
        if not {"truncate", "transform"}.isdisjoint((args.defence or "").split(",")):
            raise UserError(f"under --defence {args.defence} nobody can tell projections apart: leave out --victimhead")
    images_of_head = args.head_queries // args.n_views
    queries = runs.queries_of(args, args.num_queries // args.n_views)
    service = Service(encoder.to(precision.device), "both" if args.victimhead else "representations")
    victim = Victim(service, args.num_queries, options.defences(args), precision)
    with seeded(args.seed):
        model = build_copy(args.archstolen, args.out_dim, encoder.normalize, head=True)
        companion = SimSiamHeads(args.out_dim, args.out_dim) if loss.predictor else None

    core = ("attack", "datasetsteal", "archstolen", "losshead", "losstype")
    run, config, extra = runs.open_copy(parser, args, core, (path, encoder), queries, precision)

    def refine(answers: Tensor) -> Tensor:
        """The answers through the re-created head."""
        spent = images_of_head * args.n_views
        run.say(
            f"of these queries {spent} train the head, all {len(answers)} the copy: {len(answers) - spent} are its own"
        )
        common = {
            "precision": precision,
            "config": {**config, "kind": "head"},
            "resume": args.resume,
            "clear": args.clear,
        }
        head = recreate_head(args, answers, images_of_head, common, Run(run.folder / "head"))
        run.say(f"head: {run.folder / 'head' / 'checkpoint.pth.tar'}")
        h = answers[:, : answers.shape[1] - args.out_dim] if args.victimhead else answers
        return torch.cat([head(part) for part in h.split(4096)])

    trainer = SimCLR(model, loss, training, run, precision, config, extra, args.resume, args.clear, companion)
    trainer.steal(queries.images, victim, queries.labels, refine)
    print(f"copy: {run.checkpoint}")


if __name__ == "__main__":
    main()
