"""Evidence of theft: the two methods of verify.py, measured on an encoder and compared with independent encoders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from attacks import victims
from data_aug.datasets import DATASETS, canonical_name, check_name, load_dataset, take_balanced, unlabelled_split
from defenses.dataset_inference import COMPONENTS, halves, log_likelihoods
from defenses.watermark import check_width, read_watermark, watermark_scores
from evaluation.statistics import cohens_d, distance_from, further_draw, sign_test, welch
from evaluation.test_images import load_test
from files.reading import checked, number, optional, text
from loss import TRAIN_LOSSES
from models import SimCLREncoder, read_checkpoint
from settings import Settings, setting
from training import finding
from training.record import Record
from training.represent import represent
from utils import Precision, UserError
from victim import version_of

Figures = dict[str, float]
Measured = tuple[Tensor, ...]  # a method's measurements of an encoder, on the CPU

_INFERENCE = {
    "acts": lambda command: "with --method watermark" if command.method == "watermark" else None,
    "title": "dataset inference",
}


@dataclass(frozen=True)
class OwnershipTest(Settings):
    """The method by which encoders are tested, the images, and the level at which a test is passed."""

    method: str | None = setting(None, "how copies are recognised", choices=("watermark", "dataset-inference"))
    level: float = setting(0.05, "p-value below which a test is passed", above=0, below=1)
    dataset: str | None = setting(
        None, "data set that the victim was trained on", read=check_name, otherwise="as its file says"
    )
    num_test: int | None = setting(None, "use the last N test images", at_least=1, otherwise="all not queried")
    num_train: int | None = setting(
        None, "number of the victim's training images to use", at_least=1, otherwise="all", **_INFERENCE
    )
    components: int = setting(
        COMPONENTS, "components of the Gaussian mixture; the authors took 50 for ImageNet", at_least=1, **_INFERENCE
    )
    title = "test"


@dataclass
class Candidate:
    """An encoder under test. `kind`: victim, suspect or independent; the tests fill in `measured` and the rest.

    found: whether it was found to be stolen, None where the method cannot decide.
    """

    kind: str
    path: Path
    checkpoint: dict
    encoder: SimCLREncoder
    measured: Measured = ()
    figures: Figures | None = None
    found: bool | None = None
    verdict: str = ""

    @property
    def settings(self) -> dict:
        """The settings of the run that made it; empty for files from elsewhere."""
        return self.checkpoint.get("settings", {})


def open_candidates(victim: Path, suspects: Sequence[Path], independents: Sequence[Path]) -> list[Candidate]:
    """The victim, the suspects and the independent encoders. UserError for a file that cannot have the role given."""
    candidates = []
    for kind, paths in {"victim": [victim], "suspect": suspects, "independent": independents}.items():
        for path in paths:
            checkpoint = read_checkpoint(path)
            if kind != "suspect":  # a thief may have stopped early
                finding.check_finished(checkpoint, path)
            candidates.append(Candidate(kind, path, checkpoint, victims.encoder_of(checkpoint, path)))
    stolen_from = version_of(candidates[0].encoder)
    for candidate in candidates:
        versions = version_of(candidate.encoder), candidate.checkpoint.get("stolen_from")
        if candidate.kind == "independent" and stolen_from in versions:
            raise UserError(f"{candidate.path} is the victim or a copy of it: leave it out of --independent")
    return candidates


# ---- images ----------------------------------------------------------------------------------------------------------


def dataset_of(test: OwnershipTest, victim: Candidate) -> str:
    """The data set that the victim was trained on. UserError where its file does not say, or contradicts --dataset.

    --dataset also says where images are now that are no longer where the victim's file says.
    """
    known = str(victim.settings.get("dataset", ""))
    path = known.partition(":")[2]
    if known not in DATASETS and not (path and Path(path).exists()):
        if test.dataset is None:  # a victim of the 2022 code, or of other people
            says = (
                f"was trained on {known}, which is not there"
                if known
                else "does not say which data set it was trained on"
            )
            raise UserError(f"{victim.path} {says}: give --dataset NAME or --dataset folder:PATH")
        return test.dataset
    if test.dataset and canonical_name(known) != canonical_name(test.dataset):
        raise UserError(f"{victim.path} was trained with dataset {known}, not {test.dataset}: give --dataset {known}")
    return known


def unseen_images(test: OwnershipTest, dataset: str, root: Path, candidates: Sequence[Candidate]) -> Tensor:
    """Test images uint8 (N, 3, H, W) that no attacker is known to have queried: the same for all encoders."""
    records = [Record.of(candidate.checkpoint) for candidate in candidates]
    images, _, left_out = load_test(dataset, root, *records, number=test.num_test)
    if left_out:
        print(f"{left_out} test images of {dataset} were queried, and are left out")
    if len(images) < 2:
        remedy = "choose another --dataset" if test.num_test is None else "give --num-test 2 or more"
        raise UserError(f"{len(images)} test image is too few for a test: {remedy}")
    return images


def training_images(dataset: str, root: Path, victim: Candidate) -> Tensor:
    """The images uint8 (N, 3, H, W) that the victim was trained on, as run.py selects them."""
    fields = {"losstype": text(), "num_train": optional(number(whole=True, at_least=1)), "seed": number(whole=True)}
    settings = checked(victim.settings, fields, f"{victim.path}: settings")
    loss = TRAIN_LOSSES.get(settings.get("losstype"))
    split = "train" if loss and loss.needs_labels else unlabelled_split(dataset)
    images, labels = load_dataset(dataset, root, split)
    if settings.get("num_train"):
        images = images[take_balanced(labels, settings["num_train"], settings.get("seed", 0))]
    return images


# ---- the two methods -------------------------------------------------------------------------------------------------

Measure = Callable[[Candidate], Measured]
# (test, data root, candidates, precision, seed) -> a function that measures a candidate, and the numbers of images.
Prepare = Callable[[OwnershipTest, Path, Sequence[Candidate], Precision, int], tuple[Measure, dict[str, int]]]


def measure_watermark(
    test: OwnershipTest, root: Path, candidates: Sequence[Candidate], precision: Precision, seed: int
) -> tuple[Measure, dict[str, int]]:
    """Measures whether each image's two turned versions were read right, bool (2, N), and its mean score (N,)."""
    victim = candidates[0]
    mlp = read_watermark(victim.checkpoint, str(victim.path))
    for candidate in candidates:
        check_width(mlp, candidate.encoder, str(candidate.path))
    images = unseen_images(test, dataset_of(test, victim), root, candidates)

    def measure(candidate: Candidate) -> Measured:
        right, probability = watermark_scores(candidate.encoder, mlp, images, precision, seed)
        # The two versions of an image are not independent draws, so they are averaged.
        return right.view(2, -1), probability.view(2, -1).mean(dim=0)

    return measure, {"test_images": len(images)}


def judge_watermark(measured: Measured, others: Sequence[Measured]) -> Figures:
    """Accuracy in percent, effect size and p-values of a watermark reading; `others`: independent encoders' readings.

    p_binomial: images with both versions read right, against those with both read wrong. The remaining images say
    nothing: an MLP that always gives the same answer reads one version of each right. p_t: Welch's t-test against each
    image's mean score over `others`. p_encoders: `further_draw` of the accuracy. effect: Cohen's d of the scores
    against those of `others`, or without others their distance from 0.5.
    """
    right, score = measured
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


def measure_inference(
    test: OwnershipTest, root: Path, candidates: Sequence[Candidate], precision: Precision, seed: int
) -> tuple[Measure, dict[str, int]]:
    """Measures log-likelihoods of images that the victim was trained on (N,), and of images that it never saw (M,)."""
    dataset = dataset_of(test, candidates[0])
    trained = training_images(dataset, root, candidates[0])
    fitted, held_out = halves(len(trained), test.num_train, seed)
    unseen = unseen_images(test, dataset, root, candidates)
    if test.components > len(fitted):
        raise UserError(
            f"--components {test.components} is more than the {len(fitted)} images to fit: give {len(fitted)} or less"
        )
    for candidate in candidates:
        if candidate.kind == "independent" and candidate.settings.get("dataset") == dataset:
            print(f"note: {candidate.path} was trained on {dataset} too: dataset inference may call it stolen for that")

    def measure(candidate: Candidate) -> Measured:
        encoder = candidate.encoder.to(precision.device, memory_format=precision.memory_format)
        parts = [represent(encoder, images, precision) for images in (trained[fitted], trained[held_out], unseen)]
        return log_likelihoods(*parts, components=test.components, seed=seed)

    return measure, {"fitted_images": len(fitted), "held_out_images": len(held_out), "test_images": len(unseen)}


def judge_inference(measured: Measured, others: Sequence[Measured]) -> Figures:
    """Difference in nats, Cohen's d and p-values of log-likelihoods; `others`: those of independent encoders.

    p_t: Welch's t-test of held-out training images against unseen images. p_encoders: `further_draw` of the effect.
    """
    trained, unseen = measured
    effect = cohens_d(trained, unseen)
    difference = (trained.mean() - unseen.mean()).item()
    figures = {"difference": difference, "effect": effect, "p_t": welch(trained, unseen)}
    if len(others) > 1:
        figures["p_encoders"] = further_draw(effect, [cohens_d(*other) for other in others])
    return figures


@dataclass(frozen=True)
class Method:
    """A way to recognise copies: its measurements, the figures from them, the figure for the ROC, a verdict's claim."""

    prepare: Prepare
    judge: Callable[[Measured, Sequence[Measured]], Figures]
    score: str
    claim: str


METHODS = {
    "watermark": Method(
        *(measure_watermark, judge_watermark, "accuracy"),
        "the victim's MLP is right on {accuracy:.1f} % of the turned images",
    ),
    "dataset-inference": Method(
        *(measure_inference, judge_inference, "effect"),
        "log-likelihood of the victim's training images minus that of unseen images {difference:.3g} nats",
    ),
}


def measure_all(
    test: OwnershipTest, root: Path, candidates: Sequence[Candidate], precision: Precision, seed: int
) -> dict[str, int]:
    """Measure every candidate by the test's method; returns the numbers of images."""
    measure, counts = METHODS[test.method].prepare(test, root, candidates, precision, seed)
    for candidate in candidates:
        try:
            candidate.measured = measure(candidate)
        except UserError as error:
            raise UserError(f"{candidate.path}: {error}") from None
        candidate.encoder.cpu()
    return counts
