"""The encoders that verify.py tests, the images that it tests them on, and the settings of the test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks import victims
from data_aug.datasets import DATASETS, canonical_name, check_name, load_queries, load_training
from data_aug.sizes import SIZE
from defenses import DEFENCES, Defence
from defenses.dataset_inference import Mixture, published_mixture
from evaluation.alignment import Aligned, Alignment
from evaluation.fidelity import untrained_like
from evaluation.test_images import are_queried, load_test
from files.reading import checked, number, optional, text
from loss import TRAIN_LOSSES
from models import SimCLREncoder, read_checkpoint
from settings import Command, Settings, setting
from training import finding
from training.record import Record
from training.represent import represent
from utils import Precision, UserError, generator
from victim import version_of

Figures = dict[str, float]
Measured = tuple[Tensor, ...]  # a method's measurements of an encoder, on the CPU

# Images of the victim's data set on which many suspects are scored, where the command line does not say how many.
TRAINED, UNSEEN = 800, 400
PROBES = 1000  # of them, on which the maps of accounts are undone
IN_ANSWERS = ("mark", "transform")  # defences that leave traces in answers: a method looks for those of each
RANKING = "ranking"  # the method by which many suspects are compared
SIMILARITY_IMAGES = 20_000  # of the victim's training images, the authors' number


def _only_with(*methods: str) -> Callable[[Command], str | None]:
    return lambda command: None if command.method in (None, *methods) else f"with --method {command.method}"


_WITH_TEST_IMAGES = _only_with("watermark", "sslguard", "dataset-inference", *IN_ANSWERS, RANKING)
_INFERENCE = {"acts": _only_with("dataset-inference", RANKING), "title": "dataset inference"}


@dataclass(frozen=True)
class Encoders(Settings):
    """The encoders to test: checkpoints, run folders or run names."""

    victim: Path | None = setting(
        None,
        "the owner's encoder; a watermark needs a checkpoint with its MLP",
        named=False,
        otherwise="the only victim",
    )
    suspect: Sequence[Path] | None = setting(
        None,
        "encoders to test",
        read=Path,
        several=True,
        named=False,
        acts=lambda command: "with --suspects" if command.suspects else None,
    )
    independent: Sequence[Path] | None = setting(
        None, "encoders known to be independent of the victim", read=Path, several=True, named=False
    )
    title = "encoders"


@dataclass(frozen=True)
class OwnershipTest(Settings):
    """The method by which encoders are tested, the images, and the level at which a test is passed.

    defence: the one whose traces in answers the method looks for, as the owner had it in force.
    """

    method: str | None = setting(
        None,
        "how copies are recognised; ranking, with --suspects: by neighbours and all of these but mark and transform",
        choices=("watermark", "sslguard", "dataset-inference", "similarity", *IN_ANSWERS, RANKING),
    )
    level: float = setting(
        0.05, "probability of any false accusation among the suspects: a test's p-values are below it", above=0, below=1
    )
    dataset: str | None = setting(
        None, "data set that the victim was trained on", read=check_name, otherwise="as its file says"
    )
    num_test: int | None = setting(
        None,
        "use the last N test images",
        at_least=1,
        otherwise=f"all not queried; for transform {PROBES} at most, to rank suspects {UNSEEN}",
        acts=lambda command: "with --asked" if command.asked else _WITH_TEST_IMAGES(command),
    )
    num_train: int | None = setting(
        None,
        "number of the victim's training images to use",
        at_least=1,
        otherwise=f"all; for similarity {SIMILARITY_IMAGES} at most, to rank suspects {TRAINED}",
        acts=_only_with("dataset-inference", "similarity", RANKING),
    )
    align: bool = setting(
        False,
        "first turn representations into the victim's (orthogonal Procrustes) by half of the images",
        acts=_only_with("watermark", "sslguard", "similarity", RANKING),
    )
    secret: int | None = setting(
        None, "the owner's secret when answers were given", otherwise="--seed", acts=_only_with(*IN_ANSWERS)
    )
    account: str = setting("default", "account whose map is undone", acts=_only_with("transform"))
    asked: str | None = setting(
        None,
        "look for the mark on images that were asked about: those of this data set that encoders are known to have "
        "queried, else all that can be",
        read=check_name,
        otherwise="on test images that none has queried",
        acts=_only_with("mark"),
    )
    components: int | None = setting(
        None,
        "components of the Gaussian mixture",
        at_least=1,
        otherwise="as published: 10, for ImageNet 50",
        **_INFERENCE,
    )
    covariance: str | None = setting(
        None,
        "covariances of the mixture",
        choices=("full", "diag"),
        otherwise="as published: full, for ImageNet diag",
        **_INFERENCE,
    )
    standardise: bool | None = setting(
        None,
        "standardise the dimensions of representations first",
        otherwise="as published: False, for ImageNet True",
        **_INFERENCE,
    )
    crops: bool = setting(
        False,
        "represent a random resized crop of each image",
        acts=_only_with("dataset-inference"),
        title="dataset inference",
    )
    defence: Defence | None = None
    title = "test"

    def mixture(self, dataset: str) -> Mixture:
        """The mixture of dataset inference: what is given, the rest as published for the victim's data set."""
        given = {name: getattr(self, name) for name in ("covariance", "components", "standardise")}
        return replace(
            published_mixture(dataset), **{name: value for name, value in given.items() if value is not None}
        )


def use_test(command: Command) -> OwnershipTest:
    """Put the test into force, with the defence whose traces it looks for."""
    if command.method not in IN_ANSWERS:
        return command.use(OwnershipTest)
    secret = command.seed if command.secret is None else command.secret
    return command.use(OwnershipTest, defence=command.use(DEFENCES[command.method], secret=secret))


@dataclass
class Candidate:
    """An encoder under test. `kind`: victim, suspect, independent or untrained; the tests fill in the rest.

    size: of a victim, the side of the images on which all encoders are tested.
    found: whether it was found to be stolen, None where the method cannot decide. doubt: why the method cannot decide
    on this encoder, in words; empty where it can.
    """

    kind: str
    path: Path
    checkpoint: dict
    encoder: SimCLREncoder
    measured: Measured = ()
    figures: Figures | None = None
    found: bool | None = None
    verdict: str = ""
    doubt: str = ""
    size: int = SIZE

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
    for candidate in candidates:
        if candidate.kind == "independent":
            check_independent(candidate, candidates[0])
    return candidates


def check_independent(candidate: Candidate, victim: Candidate) -> None:
    """UserError where an encoder given as independent is the victim, or is known to be a copy of it."""
    # SSLGuard's watermark is put into a trained encoder, which the run names: that is the owner's too.
    owned = {version_of(victim.encoder), str(victim.settings.get("weights"))}
    if owned & {version_of(candidate.encoder), candidate.checkpoint.get("stolen_from")}:
        raise UserError(f"{candidate.path} is the victim or a copy of it: leave it out of --independent")


def add_control(candidates: list[Candidate], seed: int) -> None:
    """Add an untrained encoder of the victim's architecture, which no method may find; a line where there is none."""
    victim = candidates[0]
    encoder = untrained_like(victim.encoder, seed)
    if encoder is None:
        print(f"note: {victim.path} is a {victim.encoder.arch}, which cannot be built untrained here: no control")
    else:
        candidates.append(Candidate("untrained", Path(encoder.arch), {}, encoder))


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
    """Test images uint8 (N, 3, H, W) that no attacker is known to have queried: the same for all encoders.

    The first of the candidates is the victim.
    """
    records = [Record.of(candidate.checkpoint) for candidate in candidates]
    images, _, left_out = load_test(dataset, root, *records, number=test.num_test, size=candidates[0].size)
    if left_out:
        print(f"{left_out} test images of {dataset} were queried, and are left out")
    if len(images) < 2:
        remedy = "choose another --dataset" if test.num_test is None else "give --num-test 2 or more"
        raise UserError(f"{len(images)} test image is too few for a test: {remedy}")
    return images


def asked_images(test: OwnershipTest, dataset: str, root: Path, candidates: Sequence[Candidate]) -> Tensor:
    """Images of `test.asked`, which an owner finds among the account's queries: uint8 (N, 3, H, W).

    Those that a checkpoint says were queried, or where none says so, all that an attacker of this victim can query.
    """
    images = load_queries(test.asked, dataset, root, size=candidates[0].size)[0]
    queried = are_queried(images, *(Record.of(candidate.checkpoint).query_digests for candidate in candidates))
    return images[queried] if queried.any() else images


def training_images(dataset: str, root: Path, victim: Candidate) -> Tensor:
    """The images uint8 (N, 3, H, W) that the victim was trained on, as run.py selects them."""
    return training_data(dataset, root, victim)[0]


def training_data(dataset: str, root: Path, victim: Candidate) -> tuple[Tensor, Tensor]:
    """As `training_images`, with their labels (N,)."""
    fields = {"losstype": text(), "num_train": optional(number(whole=True, at_least=1)), "seed": number(whole=True)}
    settings = checked(victim.settings, fields, f"{victim.path}: settings")
    loss = TRAIN_LOSSES.get(settings.get("losstype"))
    labelled = bool(loss and loss.needs_labels)
    return load_training(dataset, root, labelled, settings.get("num_train"), settings.get("seed", 0), victim.size)[:2]


def represent_by(candidate: Candidate, images: Tensor, precision: Precision) -> Tensor:
    """Representations (N, D) of images by a candidate's encoder, on the device."""
    encoder = candidate.encoder.to(precision.device, memory_format=precision.memory_format)
    return represent(encoder, images, precision)


def split_probes(test: OwnershipTest, images: Tensor, candidates: Sequence[Candidate], seed: int) -> tuple:
    """Images to fit an alignment to, and those to judge by; without --align none, and all.

    Where the former are too few to determine a turn, nothing is decided on any encoder but the victim and the control.
    """
    if not test.align:
        return images[:0], images
    if len(images) < 4:
        raise UserError(f"{len(images)} images are too few to align and to judge: give 4 or more, or no --align")
    half, widest = len(images) // 2, max(candidate.encoder.dim for candidate in candidates)
    if half < widest:
        print(f"note: {half} images do not determine a turn of {widest} dimensions: --align needs {2 * widest} or more")
        for candidate in candidates:
            if candidate.kind in ("suspect", "independent"):
                candidate.doubt = candidate.doubt or f"{half} images do not determine a turn of {widest} dimensions"
    order = torch.randperm(len(images), generator=generator(seed, "alignment"))
    return images[order[:half]], images[order[half:]]


def in_victims_coordinates(
    test: OwnershipTest, images: Tensor, candidates: Sequence[Candidate], precision: Precision, seed: int
) -> tuple[Tensor, Callable[[Candidate], nn.Module], dict[str, int]]:
    """The images to judge, what gives each candidate's encoder, and the number of images that it was aligned by.

    With --align half of the images fit the map from a candidate's representations to the victim's. Without it the
    encoders are as they are, and all images are judged.
    """
    probes, images = split_probes(test, images, candidates, seed)
    if not test.align:
        return images, lambda candidate: candidate.encoder, {}
    target = represent_by(candidates[0], probes, precision)

    def aligned(candidate: Candidate) -> nn.Module:
        return Aligned(candidate.encoder, Alignment(represent_by(candidate, probes, precision), target))

    return images, aligned, {"aligned_by_images": len(probes)}
