"""Which attackers does a detector tell from users? Streams of queries of both, and the ROC of each statistic.

python detect.py -data ./datasets --dataset cifar10 --victim checkpoints/VICTIM/checkpoint.pth.tar

Every stream is an account of the detector (defenses/detection.py), which sees the representations of its queries, and
all of them have the same length: some statistics grow with it. A statistic is judged against users, so its figures are
about these users: those with a task, who ask about images of few classes of the attackers' data set, and with
--dataset-users those who ask about another data set. An AUC below 0.5 means that users look more like attackers than
the attackers themselves. Streams of a kind share images, so their number says less than that of independent ones would.
"""

import itertools
import math
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

import options
import runs
from attacks import Plan, queries_of
from data_aug.datasets import load_dataset, load_labelled
from defenses import settings_of
from defenses.detection import SCORES, Detection
from evaluation import represent
from models import SimCLREncoder, read_checkpoint
from statistical_tests import roc
from stopping import script
from utils import Precision, Run, UserError, generator

ATTACKERS = {
    "plain": "random images, each asked once",
    "views": "two random views of each image",
    "repeat": "each image several times",
}
FALSE_ALARMS = 0.05  # share of users' streams that may be taken for attacks
USERS_SHARES = (0.5, 0.75)  # of the images of each class that users get, the smallest that does
SHORTEST = 10  # queries of a stream

Scores = dict[str, dict[str, list[float]]]  # kind -> statistic -> the score of each stream


def parse() -> tuple[options.Parser, Namespace]:
    parser = options.Parser(__doc__.splitlines()[0])
    options.add_data_options(parser, dataset="the attackers' and the users'; of its test split")
    parser.add_argument("--victim", metavar="PATH", type=Path, required=True, help="the owner's checkpoint")
    streams = parser.add_argument_group("streams")
    streams.add_argument("--streams", metavar="N", type=options.count, default=50, help="streams of each kind")
    streams.add_argument("--stream-length", metavar="N", type=options.count, default=500, help="queries of a stream")
    streams.add_argument(
        "--user-classes", metavar="N", type=options.count, default=2, help="classes of the task of a user"
    )
    streams.add_argument(
        "--dataset-users", metavar="NAME", type=options.dataset_name, help="of further users; of its test split"
    )
    streams.add_argument(
        "--repeat", metavar="K", type=options.count, default=2, help="times that the attacker `repeat` asks each image"
    )
    detector = parser.add_argument_group("detector")
    for name, one in settings_of(Detection).items():
        flag = f"--{name.replace('_', '-')}"
        detector.add_argument(flag, metavar="N", type=int, default=one.default, help=one.metadata["help"])
    options.add_run_options(parser, recipe=False)
    args = parser.parse_args()
    if args.stream_length < SHORTEST:
        raise UserError(f"--stream-length {args.stream_length} is too short for statistics: give {SHORTEST} or more")
    if args.dataset_users == args.dataset:
        raise UserError(f"--dataset-users {args.dataset} is the attackers' data set: give another, or leave it out")
    Detection(**{name: vars(args)[name] for name in settings_of(Detection)})  # UserError for bad settings
    return parser, args


# ---- who asks which images ----


def load_others(args: Namespace) -> Tensor:
    """Images (N, 3, H, W) of the users with another data set; none without --dataset-users."""
    if not args.dataset_users:
        return torch.empty(0, 3, 0, 0)
    images, _ = load_dataset(args.dataset_users, args.data, "test")
    if len(images) < args.stream_length:
        raise UserError(
            f"the test split of {args.dataset_users} has {len(images)} images and no image is asked twice by a user: "
            f"lower --stream-length {args.stream_length}"
        )
    return images


def part_images(labels: Tensor, length: int, classes: int, seed: int) -> tuple[Tensor, Tensor, str]:
    """Positions in labels (N,) of the attackers' images and of the users', and in words how they were parted.

    Users get the smallest of USERS_SHARES of each class that has `length` images of any so many classes, if that leaves
    the attackers as many; else all are for both. UserError when even all images are too few.
    """
    present = labels.unique()
    if classes > len(present):
        raise UserError(f"--user-classes {classes}: the test split has {len(present)} classes")
    draws = generator(seed, "parts")
    members = [(labels == label).nonzero()[:, 0] for label in present]
    members = [one[torch.randperm(len(one), generator=draws)] for one in members]
    for share in USERS_SHARES:
        users = [one[: int(share * len(one))] for one in members]
        attackers = torch.cat([one[int(share * len(one)) :] for one in members])
        if fewest(users, classes) >= length <= len(attackers):
            return attackers, torch.cat(users), f"users draw from {share:.0%} of each class, attackers from the others"
    everything = torch.arange(len(labels))
    if fewest(members, classes) < length:
        raise UserError(
            f"{classes} classes of the test split may have {fewest(members, classes)} images and no image is asked "
            f"twice by a user: lower --stream-length {length}, or raise --user-classes"
        )
    return everything, everything, "users and attackers draw from the same images, too few to part them"


def fewest(groups: list[Tensor], count: int) -> int:
    """The images in the `count` smallest groups."""
    return sum(sorted(map(len, groups))[:count])


def draw_plain(images: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """So many different ones (count,) of positions (N,), in random order."""
    return images[torch.randperm(len(images), generator=draws)[:count]]


def draw_task(images: Tensor, labels: Tensor, count: int, classes: int, draws: torch.Generator) -> Tensor:
    """`draw_plain` of those of the positions (N,) whose labels (N,) are of a few classes, drawn too."""
    task = draw_plain(labels.unique(), classes, draws)
    return draw_plain(images[torch.isin(labels, task)], count, draws)


# ---- their representations, and what the detector makes of them ----


def attacks_of(
    args: Namespace, encoder: SimCLREncoder, precision: Precision, images: Tensor, known: Tensor, chosen: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Kind and representations (length, D) of the attackers' streams, one after the other.

    The attackers choose from the `chosen` positions of images (N, 3, H, W), whose representations (N, D) are `known`;
    views of them are encoded here.
    """
    length = args.stream_length
    for number in range(args.streams):
        draws = {kind: generator(args.seed, kind, number) for kind in ATTACKERS}
        yield "plain", known[draw_plain(chosen, length, draws["plain"])]
        asked = images[draw_plain(chosen, math.ceil(length / 2), draws["views"])]
        sent = queries_of(asked, Plan(n_views=2, queryaug=True), draws["views"])[:length]
        yield "views", represent(encoder, sent, precision)
        asked = draw_plain(chosen, math.ceil(length / args.repeat), draws["repeat"])
        yield "repeat", known[asked.repeat(args.repeat)[:length]]


def users_of(args: Namespace, known: Tensor, labels: Tensor, chosen: Tensor) -> Iterator[tuple[str, Tensor]]:
    """As `attacks_of`, for users with a task, who choose by labels (N,)."""
    for number in range(args.streams):
        draws = generator(args.seed, "task", number)
        yield "task", known[draw_task(chosen, labels[chosen], args.stream_length, args.user_classes, draws)]


def others_of(args: Namespace, known: Tensor) -> Iterator[tuple[str, Tensor]]:
    """As `attacks_of`, for users who choose at random among all images of another data set."""
    everything = torch.arange(len(known))
    for number in range(args.streams):
        yield "other", known[draw_plain(everything, args.stream_length, generator(args.seed, "other", number))]


def score_all(streams: Iterable[tuple[str, Tensor]], settings: Mapping[str, int], secret: int) -> Scores:
    """The scores of all streams; each is an account to a detector that remembers no other."""
    scores: Scores = {}
    for kind, representations in streams:
        detector = Detection(secret, **settings)
        detector.watch(representations)
        for name, value in detector.scores().items():
            scores.setdefault(kind, {}).setdefault(name, []).append(value)
    return scores


def detected(attacks: list[float], users: list[float]) -> float:
    """The share of attacks above the lowest threshold that at most FALSE_ALARMS of the users exceed."""
    allowed = int(FALSE_ALARMS * len(users))
    threshold = sorted(users, reverse=True)[allowed]
    return sum(value > threshold for value in attacks) / len(attacks)


def users_in(scores: Scores) -> list[str]:
    return [kind for kind in scores if kind not in ATTACKERS]


def judge(scores: Scores) -> dict[str, float]:
    """auc_USERS_ATTACKER_STATISTIC and detected_USERS_ATTACKER_STATISTIC, shares in [0, 1]."""
    figures = {}
    for users in users_in(scores):
        for attacker in ATTACKERS:
            for name in SCORES:
                both = scores[attacker][name], scores[users][name]
                figures[f"auc_{users}_{attacker}_{name}"] = round(roc(*both)[1], 6)
                figures[f"detected_{users}_{attacker}_{name}"] = round(detected(*both), 6)
    return figures


def table(scores: Scores, figures: Mapping[str, float]) -> str:
    """Markdown: the mean scores of each kind, then AUC and detection rate by users, statistic and attacker."""
    lines = ["| kind | streams | " + " | ".join(f"mean {name}" for name in SCORES) + " |", "|---" * 5 + "|"]
    for kind, of_kind in scores.items():
        means = [f"{sum(values) / len(values):.4g}" for values in of_kind.values()]
        lines.append(f"| {kind} | {len(of_kind['nearest'])} | {' | '.join(means)} |")
    lines += ["", f"AUC, and share detected at {FALSE_ALARMS:.0%} false alarms:", ""]
    lines += [f"| users | statistic | {' | '.join(ATTACKERS)} |", "|---" * (2 + len(ATTACKERS)) + "|"]
    for users in users_in(scores):
        for name in SCORES:
            keys = [f"{users}_{attacker}_{name}" for attacker in ATTACKERS]
            cells = [f"{figures[f'auc_{key}']:.3f}, {figures[f'detected_{key}']:.0%}" for key in keys]
            lines.append(f"| {users} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- the run ----


def open_owner(path: Path) -> tuple[SimCLREncoder, Mapping]:
    """The victim's encoder, and the settings that it was trained with. UserError for a copy or an unfinished one."""
    checkpoint = read_checkpoint(path)
    runs.check_finished(checkpoint, path)
    if "query_digests" in checkpoint:
        raise UserError(f"{path} is a copy and may have been trained on these test images: give its victim")
    return runs.encoder_of(checkpoint, path), checkpoint.get("settings", {})


def row_of(args: Namespace, trained: Mapping, figures: Mapping[str, float], more: Mapping) -> dict:
    """What results.jsonl says."""
    names = ("dataset", "dataset_users", "streams", "stream_length", "user_classes", "repeat")
    return {
        **{"model": "victim", "method": "detection", "losstype": trained.get("losstype")},
        **{"trained_on": trained.get("dataset")},
        **{name: vars(args)[name] for name in (*names, *settings_of(Detection))},
        **figures,
        **{"seed": args.seed, "checkpoint": str(args.victim)},
        **more,
    }


@script
def main() -> None:
    started = time.perf_counter()
    parser, args = parse()
    precision = options.set_up(args)
    args.victim = runs.locate(args.victim, args.checkpoint_dir)
    encoder, trained = open_owner(args.victim)
    encoder = encoder.to(precision.device, memory_format=precision.memory_format)
    name = runs.run_name("detect", parser, args, ("dataset", "streams", "stream_length", "seed"))
    run = Run(runs.home_of(args.victim, args.checkpoint_dir) / name)
    shown = run.folder / "table.md"
    if args.resume and any("row" in record for record in run.records()):
        print(f"{run.metrics} is there already\n{shown.read_text()}", end="")
        return
    images, labels = load_labelled(args.dataset, args.data, "test")
    attackers, users, parting = part_images(labels, args.stream_length, args.user_classes, args.seed)
    others = load_others(args)
    known = represent(encoder, images, precision)
    streams = [
        attacks_of(args, encoder, precision, images, known, attackers),
        users_of(args, known, labels, users),
        others_of(args, represent(encoder, others, precision)) if len(others) else (),
    ]
    settings = {name: vars(args)[name] for name in settings_of(Detection)}
    scores = score_all(itertools.chain(*streams), settings, args.seed)
    figures = judge(scores)
    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    config = runs.configuration("detect", args, precision)
    run.start(config, args.clear)
    run.say(f"victim: {args.victim}, {len(images)} test images of {args.dataset}, {precision}; {parting}")
    run.say(table(scores, figures))
    shown.write_text(table(scores, figures) + "\n")
    more = {"arch": encoder.arch, "images": len(images), "parting": parting}
    more["seconds"] = round(time.perf_counter() - started, 1)
    runs.add_row(run, args.checkpoint_dir, row_of(args, trained, figures, {**more, **config["provenance"]}), step=0)
    run.finish()


if __name__ == "__main__":
    main()
