"""Judge a victim, a stolen copy or a random encoder by linear evaluation on a downstream data set.

python linear_eval.py --dataset cifar10 --datasetsteal svhn --dataset-test stl10 --losstype mse --num_queries 9000
"""

import json
import time
from argparse import Namespace
from pathlib import Path

from torch import Tensor

import options
from data_aug.datasets import HELD_OUT, load_dataset, take_balanced
from evaluation import count_queried, evaluate, released_probe
from loss import STEAL_LOSSES, TRAIN_LOSSES
from models import SimCLREncoder, build_encoder, read_checkpoint
from models.checkpoint import encoder_from_checkpoint
from utils import Precision, Run, UserError, save_checkpoint, script, seeded

LOSSES = list(dict.fromkeys([*STEAL_LOSSES, *TRAIN_LOSSES]))


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    options.add_data_options(
        parser,
        dataset="data set that the victim was trained on",
        datasetsteal="data set that the queries were from",
        dataset_test="downstream data set",
    )
    parser.add_argument(
        "-n", "--num-labeled", metavar="N", type=options.count, default=50000, help="labelled images, class-balanced"
    )
    parser.add_argument(
        "--num-test", metavar="N", type=options.count, help="test on the last N images only (default: see the README)"
    )
    model = parser.add_argument_group("encoder")
    model.add_argument("--modeltype", choices=["victim", "stolen", "random"], default="stolen", help="which is judged")
    model.add_argument("--victim", metavar="PATH", type=Path, help="checkpoint of the victim (default: found by flags)")
    model.add_argument("--stolen", metavar="PATH", type=Path, help="checkpoint of the copy (default: found by flags)")
    options.add_arch(model, "-a", "--arch", text="architecture of the encoder that is judged")
    model.add_argument("--losstype", choices=LOSSES, default="infonce", help="loss that it was trained or stolen with")
    model.add_argument("--epochstrain", metavar="N", type=options.count, default=200, help="epochs of the victim")
    model.add_argument("--epochs", metavar="N", type=options.count, default=100, help="epochs of the copy")
    model.add_argument("--num_queries", metavar="N", type=options.count, default=9000, help="budget of the copy")
    probe = parser.add_argument_group("probe")
    probe.add_argument("-b", "--batch-size", metavar="N", type=options.count, default=256, help="images in a batch")
    probe.add_argument("--lr", metavar="LR", type=options.positive, help="Adam's (default: 1e-4 for copies, else 3e-4)")
    options.add_switch(probe, "--save", False, "keep the classifier, encoder and linear layer, in the checkpoint")
    options.add_run_options(parser)
    args = parser.parse_args()
    args.presets = {"lr": 1e-4 if args.modeltype == "stolen" else 3e-4}
    args.lr = args.lr or args.presets["lr"]
    return parser, args


def find(args: Namespace) -> Path:
    """The checkpoint to judge."""
    preferred = {"seed": args.seed, "recipe": args.recipe}
    wanted = {"dataset": args.dataset, "arch": args.arch, "losstype": args.losstype}
    if args.modeltype == "victim":
        wanted |= {"epochs": args.epochstrain}
        return args.victim or options.find_run(args.checkpoint_dir, "victim", wanted, preferred)
    wanted["archstolen"] = wanted.pop("arch")
    wanted |= {"datasetsteal": args.datasetsteal, "epochs": args.epochs, "num_queries": args.num_queries}
    if args.victim:
        wanted["victim"] = str(args.victim)
    return args.stolen or options.find_run(args.checkpoint_dir, "stolen", wanted, preferred)


def load_test(args: Namespace, checkpoint: dict) -> tuple[Tensor, Tensor, int]:
    """Test images, their labels, and how many of them were queried.

    All are taken, but the last 1,000 only where the others may have been queried, or as many as asked for. UserError
    when images were queried that needn't have been.
    """
    images, labels = load_dataset(args.dataset_test, args.data, "test")
    queried = checkpoint.get("query_set", {})
    number = args.num_test or len(images)
    from_test = (queried.get("dataset"), queried.get("split")) == (args.dataset_test, "test")
    if args.num_test is None and (from_test or (args.recipe == "released" and args.dataset_test != "stl10")):
        number = HELD_OUT
    if number > len(images):
        raise UserError(f"--num-test {number}: the test split of {args.dataset_test} has {len(images)} images")
    images, labels = images[-number:], labels[-number:]
    common = count_queried(images, checkpoint["query_digests"]) if queried else 0
    # Publishers' own copies of an image in both splits are theirs to mend: they are counted, not refused.
    if common and (from_test or queried["dataset"] != args.dataset_test):
        raise UserError(f"{common} of the {len(images)} test images were queried: lower --num-test, or test on others")
    return images, labels, common


def choose(args: Namespace) -> tuple[Path | None, dict, SimCLREncoder]:
    """The encoder to judge, with its file and what that holds; none for a random one."""
    if args.modeltype == "random":
        with seeded(args.seed):
            return None, {}, build_encoder(args.arch)
    path = find(args)
    checkpoint = read_checkpoint(path)
    options.check_finished(checkpoint, path)
    return path, checkpoint, encoder_from_checkpoint(checkpoint, str(path), args.arch)


def load_train(args: Namespace) -> tuple[Tensor, Tensor]:
    """Labelled images of the downstream data set, as many as asked for."""
    images, labels = load_dataset(args.dataset_test, args.data, "train")
    if args.num_labeled >= len(labels):
        return images, labels
    chosen = take_balanced(labels, args.num_labeled, args.seed)
    return images[chosen], labels[chosen]


def judge(
    args: Namespace, encoder: SimCLREncoder, train: tuple, test: tuple, precision: Precision, run: Run
) -> tuple[dict, dict]:
    """Scores, and the state_dict of the linear layer, with --save that of the encoder before it too."""

    def each_epoch(epoch: int, scores: dict[str, float]) -> None:
        run.record(epoch + 1, {"epoch": epoch, **scores})

    options_of_both = {"batch_size": args.batch_size, "seed": args.seed, "each_epoch": each_epoch}
    if args.recipe == "released":
        return released_probe(encoder, train, test, args.lr, precision, **options_of_both), {}
    scores, probe = evaluate(encoder, train, test, args.lr, precision, **options_of_both)
    state = {"fc.weight": probe.weight.cpu(), "fc.bias": probe.bias.cpu()}
    if args.save:
        backbone = encoder.state_dict().items()
        state |= {k.removeprefix("backbone."): v.cpu() for k, v in backbone if not k.startswith("backbone.fc.")}
    return scores, state


@script
def main() -> None:
    started = time.perf_counter()
    parser, args = parse()
    device, precision = options.set_up(args)
    path, checkpoint, encoder = choose(args)
    encoder = encoder.to(device, memory_format=precision.memory_format)
    train = load_train(args)
    *test, queried = load_test(args, checkpoint)

    home = options.home_of(path, args.checkpoint_dir) if path else args.checkpoint_dir / f"random-{args.arch}"
    core = {"dataset_test": "{value}", "seed": "seed{value}"}
    implied = (
        "dataset",
        "datasetsteal",
        "arch",
        "losstype",
        "epochstrain",
        "epochs",
        "num_queries",
        "modeltype",
        "save",
    )
    run = Run(home / options.run_name("linear", parser, args, core, implied))
    if args.resume and run.checkpoint.exists():
        print(f"{run.checkpoint} is there already\n{options.as_row(read_checkpoint(run.checkpoint)['row'])}")
        return
    config = options.configuration("linear", args, device, precision)
    run.start(config, args.clear)
    run.say(f"{args.modeltype}: {path or args.arch}, {len(train[1])} labelled images, {device}, {precision.name}")
    scores, state = judge(args, encoder, train, test, precision, run)

    ledger = checkpoint.get("ledger", {}).values()
    row = {
        "model": args.modeltype,
        "arch": encoder.arch,
        "losstype": checkpoint.get("settings", {}).get("losstype", args.losstype) if path else None,
        "downstream": args.dataset_test,
        **{name: round(value, 6 if name == "strength" else 2) for name, value in scores.items()},
        "train_images": len(train[1]),
        "test_images": len(test[1]),
        "test_images_queried": queried,
        "queries": sum(account["queries"] for account in ledger),
        "distinct": sum(len(account["images"]) // 16 for account in ledger),
        "seed": args.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "recipe": args.recipe,
        "checkpoint": str(path) if path else None,
        **config["provenance"],
    }
    save_checkpoint({"kind": "linear", "arch": encoder.arch, "state_dict": state, "row": row}, run.checkpoint)
    run.record(100, {"row": row})
    run.say(options.as_row(row))
    run.finish()
    # One append of one line: evaluations that run side by side don't mix theirs.
    with (args.checkpoint_dir / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"row: {run.metrics} and {args.checkpoint_dir / 'results.jsonl'}")


if __name__ == "__main__":
    main()
