"""Train a victim: a SimCLR encoder.

python run.py -data ./datasets --dataset cifar10 --epochs 200 --arch resnet34
"""

from argparse import Namespace

import options
from data_aug.datasets import channel_statistics, load_dataset, take_balanced, unlabelled_split
from loss import TRAIN_LOSSES
from models import build_encoder
from simclr import SimCLR
from utils import Run, UserError, script, seeded


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    options.add_data_options(parser, dataset="data set that the victim is trained on")
    parser.add_argument("--num-train", metavar="N", type=options.count, help="a class-balanced subset of N images")
    options.add_switch(parser, "--normalize", False, "normalise images by the training set's channel statistics")
    options.add_arch(parser, "-a", "--arch", text="the victim's architecture")
    parser.add_argument("--out_dim", metavar="N", type=options.count, default=128, help="width of the projections")
    training = options.add_training_options(parser, TRAIN_LOSSES, epochs=200)
    training.add_argument("--n-views", metavar="N", type=options.count, default=2, help="random views of an image")
    options.add_run_options(parser)
    args = parser.parse_args()
    options.apply_presets(args, TRAIN_LOSSES)
    return parser, args


@script
def main() -> None:
    parser, args = parse()
    if args.n_views < 2:
        raise UserError(f"--n-views {args.n_views}: contrastive training needs at least 2 views of an image")
    device, precision = options.set_up(args)
    core = {
        "dataset": "{value}",
        "arch": "{value}",
        "losstype": "{value}",
        "epochs": "{value}ep",
        "seed": "seed{value}",
    }
    run = Run(args.checkpoint_dir / options.run_name("victim", parser, args, core), args.logdir)
    split = unlabelled_split(args.dataset)
    images, labels = load_dataset(args.dataset, args.data, split)
    if args.num_train:
        images = images[take_balanced(labels, args.num_train, args.seed)]
    with seeded(args.seed):
        model = build_encoder(args.arch, args.out_dim, channel_statistics(images) if args.normalize else None)
    config = options.configuration("victim", args, device, precision)
    extra = {"kind": "victim", "settings": config["settings"], "images": len(images)}
    print(f"victim: {args.arch} on {len(images)} images of {args.dataset} ({split}), {device}, {precision.name}")
    print(options.in_force(args))
    trainer = SimCLR(model, options.training(args), run, precision, config, extra, args.resume, args.clear)
    trainer.train(images)
    print(f"victim: {run.checkpoint}")


if __name__ == "__main__":
    main()
