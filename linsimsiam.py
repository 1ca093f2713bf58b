"""Judge an ImageNet-scale victim, or a copy that stealsimsiam.py made, by a linear layer on its representations.

python linsimsiam.py --modeltype stolen --datasetsteal imagenet --num_queries 100000 --dataset cifar10 --lars --lr 1.0
"""

import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn

import large_scale
import options
import runs
from attacks import Streamed
from data_aug.pictures import Pictures, Views, open_pictures
from evaluation import represent_streamed
from loss import STEAL_LOSSES, TRAIN_LOSSES
from models import SimCLREncoder, read_checkpoint
from probes import top1_top5
from simclr import SimCLR
from stopping import script
from utils import Precision, Run, UserError, save_checkpoint, seeded

# Flags that say which copy, with the setting in its file; in this order the error that none is found lists them.
COPY = {"datasetsteal": "datasetsteal", "losstype": "losstype", "num_queries": "num_queries", "epochssteal": "epochs"}


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    large_scale.add_picture_options(parser, dataset="downstream data set")
    encoder = parser.add_argument_group("encoder")
    encoder.add_argument("--modeltype", choices=["victim", "stolen"], default="victim", help="which is judged")
    encoder.add_argument("--pretrained", "--victim", dest="victim", metavar="PATH", type=Path, help="the victim's file")
    encoder.add_argument("--stolen", metavar="PATH", type=Path, help="the copy's (default: found by the flags below)")
    large_scale.add_large_arch(encoder, "-a", "--arch", default="resnet50", text="architecture of what is judged")
    encoder.add_argument("--datasetsteal", metavar="NAME", default="cifar10", help="data set of its queries")
    encoder.add_argument("--losstype", choices=list(STEAL_LOSSES), default="infonce", help="loss of the copy")
    encoder.add_argument("--num_queries", metavar="N", type=options.count, default=10000, help="budget of the copy")
    encoder.add_argument("--epochssteal", metavar="N", type=options.count, default=100, help="epochs of the copy")
    encoder.add_argument(
        "--epochstrain", metavar="N", type=options.count, help="refuse a victim that was trained for other epochs"
    )
    probe = large_scale.add_sgd_options(parser, batch_size=256)
    probe.add_argument("--epochs", metavar="N", type=options.count, default=100, help="epochs of the linear layer")
    options.add_switch(
        probe, "--augment", False, "random crops in every epoch, instead of the centres' representations computed once"
    )
    options.add_run_options(parser, recipe=False, job=True, streamed=True)
    args = parser.parse_args()
    of_copy = ("stolen", *COPY)
    idle = dict.fromkeys(of_copy, "with --modeltype victim") if args.modeltype == "victim" else {"victim": None}
    options.refuse_idle(parser, args, {**idle, "epochstrain": None if args.victim else "without --pretrained"})
    return parser, args


def find(args: Namespace) -> Path:
    """The checkpoint to judge. UserError when none is named or found."""
    if args.modeltype == "victim":
        if args.victim is None:
            raise UserError("no victim: give --pretrained PATH of its checkpoint (or --modeltype stolen)")
        return runs.locate(args.victim, args.checkpoint_dir)
    if args.stolen:
        return runs.locate(args.stolen, args.checkpoint_dir)
    wanted = {name: getattr(args, flag) for flag, name in COPY.items() if flag != "epochssteal" or flag in args.given}
    wanted["archstolen"] = args.arch
    if args.victim:
        wanted["victim"] = str(args.victim)
    return runs.find_run(
        args.checkpoint_dir, large_scale.KIND, wanted, {"seed": args.seed, "defence": None}, flag="--stolen"
    )


def choose(args: Namespace) -> tuple[Path, dict, SimCLREncoder]:
    """The encoder to judge, with its file and what that holds."""
    path = find(args)
    checkpoint = read_checkpoint(path)
    if args.modeltype == "stolen":
        runs.check_finished(checkpoint, path)
        runs.check_named(checkpoint, path, args, COPY)
    if args.epochstrain and args.modeltype == "victim" and checkpoint.get("epoch") != args.epochstrain:
        raise UserError(f"{path} was trained for {checkpoint.get('epoch', 'unknown')} epochs, not {args.epochstrain}")
    return path, checkpoint, runs.encoder_of(checkpoint, path, large_scale.large_arch(args))


def unqueried(test: Pictures, checkpoint: dict) -> Tensor:
    """The test images that the copy did not query. UserError when there are none.

    By their positions in the split: what was sent is a view of an image, whose pixels are no test image's.
    """
    positions = torch.arange(len(test))
    queried = checkpoint.get("query_set", {})
    if (queried.get("dataset"), queried.get("split")) == (test.name, test.split):
        positions = positions[~torch.isin(positions, checkpoint["query_indices"])]
        if not len(positions):
            raise UserError(f"all {len(test)} test images of {test.name} were queried: judge on another data set")
    return positions


def labelled(name: str, root: Path, split: str) -> Pictures:
    pictures = open_pictures(name, root, split)
    if (pictures.labels < 0).any():
        raise UserError(f"the {split} split of {name} has images without labels: choose another data set")
    return pictures


def train_probe(
    args: Namespace, encoder: SimCLREncoder, pictures: Pictures, classes: int, precision: Precision, run: Run
) -> nn.Linear:
    """The linear layer, trained on the centres of images represented once, or on fresh crops in every epoch."""
    with seeded(args.seed, "probe"):
        layer = nn.Linear(encoder.dim, classes)
        nn.init.normal_(layer.weight, std=0.01)  # as in the 2022 work, and MoCo's before
        nn.init.zeros_(layer.bias)
    config = runs.configuration("probe", args, precision)
    training = large_scale.sgd_training(args)
    trainer = SimCLR(layer, TRAIN_LOSSES["supervised"], training, run, precision, config, resume=args.resume)
    trainer.first_epoch = max(trainer.first_epoch, training.epochs if args.evaluate else args.start_epoch)
    view = "crop" if args.augment else "center"
    images = Streamed(
        Views(pictures, view, args.size, args.seed, "probe view"), torch.arange(len(pictures)), args.workers
    )
    if args.augment:
        trainer.read_out(images, pictures.labels, encoder)
    elif trainer.first_epoch < training.epochs:
        trainer.read_out(represent_streamed(encoder, images, precision), pictures.labels)
    return layer


@script
def main() -> None:
    started = time.perf_counter()
    parser, args = parse()
    precision = options.set_up(args)
    path, checkpoint, encoder = choose(args)
    encoder = encoder.to(precision.device, memory_format=precision.memory_format)
    train, test = (labelled(args.dataset, args.data, split) for split in ("train", "test"))
    positions = unqueried(test, checkpoint)

    home = runs.home_of(path, args.checkpoint_dir)
    implied = ("modeltype", "arch", "evaluate", "epochstrain", *COPY)
    run = Run(home / runs.run_name("linear-simsiam", parser, args, ("dataset", "seed"), implied))
    probe = Run(run.folder / "probe")
    if args.evaluate and not isinstance(args.resume, Path):
        args.resume = probe.checkpoint
        if not probe.checkpoint.exists():
            raise UserError(f"no linear layer at {probe.checkpoint} to --evaluate: train it first, without that flag")
    elif args.resume is True and run.checkpoint.exists():
        print(f"{run.checkpoint} is there already\n{runs.as_row(read_checkpoint(run.checkpoint)['row'])}")
        return
    config = runs.configuration("linear-simsiam", args, precision)
    run.start(config, args.clear)
    run.say(f"{args.modeltype}: {path}, {len(train)} labelled images, {precision}")
    classes = max(train.classes, test.classes)
    layer = train_probe(args, encoder, train, classes, precision, probe).eval()
    images = Streamed(Views(test, "center", args.size), positions, args.workers)
    with torch.no_grad():
        logits = layer(represent_streamed(encoder, images, precision).float())
    scores = top1_top5(logits, test.labels[positions].to(precision.device))

    settings = checkpoint.get("settings", {})
    row = {
        "model": args.modeltype,
        "arch": encoder.arch,
        "losstype": settings.get("losstype"),
        "downstream": args.dataset,
        "probe": "augmented crops" if args.augment else "centres",
        **{name: round(value, 6) for name, value in scores.items()},
        "train_images": len(train),
        "test_images": len(positions),
        "test_images_queried": len(test) - len(positions),
        **runs.ledger_figures(checkpoint),
        "defence": settings.get("defence"),
        **checkpoint.get("met", {}),
        "seed": args.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "checkpoint": str(path),
        **config["provenance"],
    }
    state = {f"fc.{name}": value.cpu() for name, value in layer.state_dict().items()}
    # The row first: with the checkpoint there, the run counts as done.
    runs.add_row(run, args.checkpoint_dir, row, step=args.epochs)
    save_checkpoint({"kind": "linear-simsiam", "arch": encoder.arch, "state_dict": state, "row": row}, run.checkpoint)
    run.finish()


if __name__ == "__main__":
    main()
