"""Train a victim: a SimCLR encoder, or one by another loss.

python run.py -data ./datasets --dataset cifar10 --epochs 200 --arch resnet34
"""

from argparse import Namespace

import options
import runs
from data_aug.datasets import channel_statistics, load_dataset, take_balanced, unlabelled_split
from defenses.watermark import WatermarkMLP, watermark_line
from loss import TRAIN_LOSSES
from models import build_encoder
from simclr import SimCLR
from stopping import script
from utils import Run, seeded


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    options.add_data_options(parser, dataset="data set that the victim is trained on")
    parser.add_argument("--num-train", metavar="N", type=options.count, help="a class-balanced subset of N images")
    options.add_switch(parser, "--normalize", False, "normalise images by the training set's channel statistics")
    options.add_arch(parser, "-a", "--arch", text="the victim's architecture")
    parser.add_argument("--out_dim", metavar="N", type=options.count, default=128, help="width of the projections")
    options.add_switch(parser, "--watermark", False, "train a rotation watermark with it, which verify.py looks for")
    training = options.add_training_options(parser, TRAIN_LOSSES, epochs=200)
    training.add_argument(
        "--n-views", metavar="N", type=options.count, help="random views of an image (default: 2, or 1)"
    )
    options.add_run_options(parser, job=True)
    args = parser.parse_args()
    loss = TRAIN_LOSSES[args.losstype]
    options.fill(args, options.of_loss(loss), {"n_views": loss.min_views, "temperature": 0.07})
    supervised = "with the loss supervised: the head has an output for each class"
    idle = {"out_dim": supervised if args.losstype == "supervised" else None}
    options.refuse_idle(parser, args, {**options.idle_with(loss, args), **idle})
    return parser, args


@script
def main() -> None:
    parser, args = parse()
    precision = options.set_up(args)
    core = ("dataset", "arch", "losstype", "epochs", "seed")
    run = Run(args.checkpoint_dir / runs.run_name("victim", parser, args, core), args.logdir)
    loss = TRAIN_LOSSES[args.losstype]
    split = "train" if loss.needs_labels else unlabelled_split(args.dataset)
    images, labels = load_dataset(args.dataset, args.data, split)
    if args.num_train:
        chosen = take_balanced(labels, args.num_train, args.seed)
        images, labels = images[chosen], labels[chosen]
    head = ("linear", int(labels.max()) + 1) if args.losstype == "supervised" else ("mlp", args.out_dim)
    with seeded(args.seed):
        normalize = channel_statistics(images) if args.normalize else None
        model = build_encoder(args.arch, max(1, head[1]), normalize, head[0])
        watermark = WatermarkMLP(model.dim) if args.watermark else None
    config = runs.configuration("victim", args, precision)
    extra = {"kind": "victim", "settings": config["settings"], "images": len(images)}
    print(f"victim: {args.arch} on {len(images)} images of {args.dataset} ({split}), {precision}")
    print(options.in_force(args))
    job = (config, extra, args.resume, args.clear, watermark)
    SimCLR(model, loss, options.training(args), run, precision, *job).train(images, labels)
    if watermark:
        test, _ = load_dataset(args.dataset, args.data, "test")
        print(watermark_line(model, watermark.eval(), test, precision, args.seed))
    print(f"victim: {run.checkpoint}")


if __name__ == "__main__":
    main()
