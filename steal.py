"""Steal an encoder through the representations it answers.

python steal.py -data ./datasets --dataset cifar10 --datasetsteal svhn --arch resnet34 --losstype mse --num_queries 9000
"""

from argparse import Namespace
from pathlib import Path

import options
from data_aug.datasets import load_queries
from loss import STEAL_LOSSES, TRAIN_LOSSES
from models import build_encoder, read_checkpoint
from models.checkpoint import encoder_from_checkpoint
from simclr import SimCLR
from utils import Run, UserError, script, seeded
from victim import Victim


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    options.add_data_options(
        parser, dataset="data set that the victim was trained on", datasetsteal="data set that the queries are from"
    )
    options.add_switch(parser, "--force", False, "query the train split even if it is the victim's own data set")
    victim = parser.add_argument_group("victim")
    victim.add_argument(
        "--victim", metavar="PATH", type=Path, help="its checkpoint (default: found by the flags below)"
    )
    options.add_arch(victim, "-a", "--arch", text="the victim's architecture")
    victim.add_argument("--epochstrain", metavar="N", type=options.count, default=200, help="epochs it was trained for")
    victim.add_argument("--lossvictim", choices=list(TRAIN_LOSSES), default="infonce", help="loss it was trained with")
    options.add_arch(parser, "--archstolen", text="the copy's architecture")
    parser.add_argument(
        "--num_queries", metavar="N", type=options.count, default=9000, help="budget of the whole attack"
    )
    training = options.add_training_options(parser, STEAL_LOSSES, epochs=100)
    training.add_argument(
        "--n-views",
        metavar="N",
        type=options.count,
        default=1,
        help="1 queries images as they are, N > 1 N views of each",
    )
    options.add_switch(training, "--useaug", False, "augment what the copy sees; the victim saw the image as it was")
    options.add_run_options(parser)
    args = parser.parse_args()
    options.apply_presets(args, STEAL_LOSSES)
    return parser, args


@script
def main() -> None:
    parser, args = parse()
    device, precision = options.set_up(args)
    wanted = {"dataset": args.dataset, "arch": args.arch, "epochs": args.epochstrain, "losstype": args.lossvictim}
    preferred = {"seed": args.seed, "recipe": args.recipe}
    path = args.victim or options.find_run(args.checkpoint_dir, "victim", wanted, preferred)
    checkpoint = read_checkpoint(path)
    options.check_finished(checkpoint, path)
    trained_on = checkpoint.get("settings", {}).get("dataset", args.dataset)
    if trained_on != args.dataset:
        raise UserError(f"{path} was trained on {trained_on}, not {args.dataset}: give --dataset {trained_on}")
    encoder = encoder_from_checkpoint(checkpoint, str(path), args.arch)

    pool, split = load_queries(args.datasetsteal, args.dataset, args.data, args.force)
    needed = args.num_queries // args.n_views
    if needed > len(pool):
        raise UserError(
            f"{args.num_queries} queries with {args.n_views} view{'s' * (args.n_views > 1)} of an image need {needed} "
            f"images, the {split} split of {args.datasetsteal} has {len(pool)} to query: lower --num_queries"
        )
    images = pool[:needed]
    # The released recipe asks everything again in every epoch: that is what its budget has to cover.
    rounds = args.epochs if args.recipe == "released" else 1
    victim = Victim(encoder.to(device), budget=args.num_queries * rounds, precision=precision)
    with seeded(args.seed):
        model = build_encoder(args.archstolen, normalize=encoder.normalize)

    core = {"datasetsteal": "{value}", "archstolen": "{value}", "losstype": "{value}", "num_queries": "{value}q"}
    core |= {"epochs": "{value}ep", "seed": "seed{value}"}
    implied = ("dataset", "arch", "epochstrain", "lossvictim")
    name = options.run_name("stolen", parser, args, core, implied)
    run = Run(options.home_of(path, args.checkpoint_dir) / name, args.logdir)
    config = options.configuration("stolen", args, device, precision)
    config["settings"]["victim"] = str(path)
    query_set = {"dataset": args.datasetsteal, "split": split, "images": len(images)}
    extra = {"kind": "stolen", "settings": config["settings"], "query_set": query_set}
    print(f"victim: {path}\ncopy: {args.archstolen}, {len(images)} images of {args.datasetsteal} ({split}), {device}")
    print(options.in_force(args))
    trainer = SimCLR(model, options.training(args), run, precision, config, extra, args.resume, args.clear)
    trainer.steal(images, victim)
    print(f"copy: {run.checkpoint}")


if __name__ == "__main__":
    main()
