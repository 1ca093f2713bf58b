"""What gives a stolen encoder away: the two methods of verify.py, measured on one encoder and judged beside others."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_aug.datasets import load_dataset, take_balanced, unlabelled_split
from defenses.dataset_inference import halves, log_likelihoods
from defenses.watermark import check_width, read_watermark, watermark_scores
from evaluation import load_test, represent
from loss import TRAIN_LOSSES
from models import SimCLREncoder
from statistical_tests import cohens_d, distance_from, further_draw, sign_test, welch
from utils import Precision, UserError

Figures = dict[str, float]
Measured = tuple[Tensor, ...]


@dataclass
class Judged:
    """An encoder under test: `kind` is victim, suspect or independent; the rest fills as the tests go."""

    kind: str
    path: Path
    checkpoint: dict
    encoder: SimCLREncoder
    measured: Measured = ()
    figures: Figures | None = None
    found: bool | None = None  # None: the method cannot decide
    verdict: str = ""


Measure = Callable[[Judged], Measured]


# ---- images ----


def dataset_of(args: Namespace, victim: Judged) -> str:
    """The data set that the victim was trained on."""
    held = victim.checkpoint.get("settings", {}).get("dataset")
    if held is None and args.dataset is None:  # a victim of the 2022 code
        raise UserError(f"{victim.path} does not say which data set it was trained on: give --dataset NAME")
    if args.dataset not in (None, held) and held is not None:
        raise UserError(f"{victim.path} was trained with dataset {held}, not {args.dataset}: give --dataset {held}")
    return held or args.dataset


def unseen_images(args: Namespace, dataset: str, encoders: Sequence[Judged]) -> Tensor:
    """Test images uint8 (N, 3, H, W) that no encoder's thief is known to have queried: the same for all encoders."""
    # Each is offered the last so many images of one split, so that the fewest are in everybody's part.
    with_queries = [one.checkpoint for one in encoders if "query_set" in one.checkpoint]
    images = min((load_test(dataset, args.data, copy, args.num_test)[0] for copy in [{}, *with_queries]), key=len)
    if len(images) < 2:
        raise UserError(f"{len(images)} test image is too few for a test: give --num-test 2 or more")
    return images


def training_images(args: Namespace, dataset: str, victim: Judged) -> Tensor:
    """The images uint8 (N, 3, H, W) that the victim was trained on, as run.py took them."""
    settings = victim.checkpoint.get("settings", {})
    loss = TRAIN_LOSSES.get(settings.get("losstype"))
    split = "train" if loss and loss.needs_labels else unlabelled_split(dataset)
    images, labels = load_dataset(dataset, args.data, split)
    if settings.get("num_train"):
        images = images[take_balanced(labels, settings["num_train"], settings["seed"])]
    return images


# ---- the two methods: what is measured on each encoder, and what that says beside independent ones -------------------
# Each gives a function that measures an encoder, its tensors on the CPU, and how many images there are of what.


def watermark(args: Namespace, encoders: Sequence[Judged], precision: Precision) -> tuple[Measure, dict[str, int]]:
    """-> of each image whether its two turned versions were read right, bool (2, N), and its mean score (N,)."""
    victim = encoders[0]
    mlp = read_watermark(victim.checkpoint, str(victim.path))
    for one in encoders:
        check_width(mlp, one.encoder, str(one.path))
    images = unseen_images(args, dataset_of(args, victim), encoders)

    def measure(one: Judged) -> Measured:
        right, probability = watermark_scores(one.encoder, mlp, images, precision, args.seed)
        # An image's two versions are one draw of an image, not two.
        return right.view(2, -1), probability.view(2, -1).mean(dim=0)

    return measure, {"test_images": len(images)}


def judge_watermark(own: Measured, others: Sequence[Measured]) -> Figures:
    """Accuracy in percent, effect size and p-values of one encoder's reading, beside those of independent encoders.

    p_binomial: images of which both versions were read right, against those of which both were read wrong. The others
    say nothing: an MLP that gives every image the same answer reads one version of each right. p_t: Welch's t-test
    against each image's mean score on the others. p_encoders: `further_draw` of the accuracy. The effect is Cohen's d
    of the scores against the others', or without others their distance from 0.5.
    """
    right, score = own
    accuracy = 100 * right.double().mean().item()
    wins, losses = right.all(dim=0).sum().item(), (~right).all(dim=0).sum().item()
    figures = {"accuracy": accuracy, "effect": distance_from(score, 0.5), "p_binomial": sign_test(wins, losses)}
    if others:
        scores = [other for _, other in others]
        pooled = [value for other in scores for value in other.tolist()]
        figures["effect"] = cohens_d(score, pooled)
        figures["p_t"] = welch(score, sum(scores) / len(scores))
    if len(others) > 1:
        figures["p_encoders"] = further_draw(accuracy, [100 * read.double().mean().item() for read, _ in others])
    return figures


def dataset_inference(
    args: Namespace, encoders: Sequence[Judged], precision: Precision
) -> tuple[Measure, dict[str, int]]:
    """-> log-likelihoods of images that the victim was trained on (N,), and of images that it was not (M,)."""
    dataset = dataset_of(args, encoders[0])
    trained = training_images(args, dataset, encoders[0])
    fitted, held = halves(len(trained), args.num_train, args.seed)
    unseen = unseen_images(args, dataset, encoders)
    if args.components > len(fitted):
        raise UserError(f"--components {args.components} is more than the {len(fitted)} images that are fitted")
    for one in encoders:
        if one.kind == "independent" and one.checkpoint.get("settings", {}).get("dataset") == dataset:
            print(f"note: {one.path} was trained on {dataset} too: dataset inference may find it for that")

    def measure(one: Judged) -> Measured:
        encoder = one.encoder.to(precision.device, memory_format=precision.memory_format)
        parts = [represent(encoder, images, precision) for images in (trained[fitted], trained[held], unseen)]
        return log_likelihoods(*parts, components=args.components, seed=args.seed)

    return measure, {"fitted_images": len(fitted), "held_out_images": len(held), "test_images": len(unseen)}


def judge_inference(own: Measured, others: Sequence[Measured]) -> Figures:
    """Difference in nats, Cohen's d and p-values of one encoder's log-likelihoods, beside those of independent ones.

    p_t: Welch's t-test of held-out training images against unseen ones. p_encoders: `further_draw` of the effect.
    """
    trained, unseen = own
    effect = cohens_d(trained, unseen)
    difference = (trained.mean() - unseen.mean()).item()
    figures = {"difference": difference, "effect": effect, "p_t": welch(trained, unseen)}
    if len(others) > 1:
        figures["p_encoders"] = further_draw(effect, [cohens_d(*other) for other in others])
    return figures


# Each method's parts, the figure that the ROC is drawn over, and the claim of a verdict.
METHODS = {
    "watermark": (
        watermark,
        judge_watermark,
        "accuracy",
        "the victim's MLP is right on {accuracy:.1f} % of the turned images",
    ),
    "dataset-inference": (
        *(dataset_inference, judge_inference, "effect"),
        "log-likelihood of the victim's training images less that of unseen ones {difference:.3g} nats",
    ),
}
