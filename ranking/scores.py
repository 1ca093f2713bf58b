"""How close an encoder is to a victim, by every score that needs no other encoder: what `--suspects` ranks by.

score = Scorer(victim, images, names, options, precision, seed)      # the victim is represented once
reading = score(encoder)                                             # so is each encoder, for all scores together
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from defenses.dataset_inference import Mixture, log_likelihoods
from defenses.sslguard import Mark, check_fits, mark_cosines, read_mark
from defenses.watermark import WatermarkMLP, check_width, read_watermark, watermark_scores
from evaluation.alignment import Aligned, Alignment
from evaluation.candidates import Candidate
from evaluation.fidelity import centred_cosines, mutual_information, nearest_neighbours, shared_neighbours
from evaluation.statistics import cohens_d
from models import SimCLREncoder
from ranking.probe_images import ProbeImages
from training.represent import represent
from utils import Precision, UserError

NEIGHBOURS = 10  # of an image, on each set of probe images

# Each is larger for copies than for other encoders. The last three are shares of common neighbours in percent.
SCORES = {
    "watermark": "turned images that the victim's MLP reads right, in percent",
    "sslguard": "mean cosine of the decoded key to the victim's, on images with the trigger",
    "dataset-inference": "by how many deviations the victim's training images are likelier than unseen ones",
    "cosine": "mean magnitude of the cosine to the victim's centred representations",
    "information": "mutual information with the victim's representations, in nats",
    "noise": "neighbours in common with the victim, on images of noise",
    "textures": "the same, on textures",
    "contested": "the same, on the unseen images on which the other encoders have the fewest",
}
MARKS = ("watermark", "sslguard")  # scores that not every victim has
# The sets of probe images that a score reads; marks have images of their own, made of the unseen ones.
_READS = {"dataset-inference": ("trained", "unseen"), "cosine": ("trained",), "information": ("trained",)}
_READS |= {"noise": ("noise",), "textures": ("textures",), "contested": ("unseen",)}


@dataclass
class Reading:
    """An encoder's scores by name; a score that it cannot have is in `lacking`, with the reason.

    common (M,): for each unseen image the share in [0, 1] of its neighbours that are those by the victim. The score
    `contested` follows from these, and from other encoders'.
    """

    scores: dict[str, float] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    common: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """How encoders are scored: by which mixture in dataset inference, and whether they are aligned first."""

    mixture: Mixture
    align: bool = False


class Shown(nn.Module):
    """What an encoder shows as its representations: those, or the outputs of its head. For calls and `dim` alone."""

    def __init__(self, encoder: SimCLREncoder, outputs: bool):
        super().__init__()
        self.encoder, self.outputs = encoder, outputs
        self.dim = encoder.output_dim if outputs else encoder.dim

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.output(images) if self.outputs else self.encoder(images)


def available_scores(victim: Candidate, asked: Sequence[str] | None) -> list[str]:
    """The scores asked for, by default all that the victim has. UserError for a mark that it lacks."""
    for name, read in (("watermark", read_watermark), ("sslguard", read_mark)):
        if asked is not None and name in asked:
            read(victim.checkpoint, str(victim.path))
    if asked is not None:
        return [name for name in SCORES if name in asked]
    keys = {"watermark": (WatermarkMLP.checkpoint_key, "mlp_state_dict"), "sslguard": (Mark.checkpoint_key,)}
    return [name for name in SCORES if name not in MARKS or any(key in victim.checkpoint for key in keys[name])]


class Scorer:
    """Scores encoders by their closeness to a victim. names: of SCORES.

    With `options.align` the first half of the victim's training images fits each encoder's turn into the victim's
    coordinates, and the second half is scored by the cosine. UserError where that half is smaller than the victim's
    width.
    """

    def __init__(
        self,
        victim: Candidate,
        images: ProbeImages,
        names: Sequence[str],
        options: Options,
        precision: Precision,
        seed: int,
    ):
        self.images, self.names, self.options, self.precision, self.seed = images, names, options, precision, seed
        source = str(victim.path)
        self.mlp = read_watermark(victim.checkpoint, source) if "watermark" in names else None
        self.mark = read_mark(victim.checkpoint, source) if "sslguard" in names else None
        self.half = len(images.trained) // 2
        if options.align and self.half < victim.encoder.dim:
            raise UserError(
                f"{self.half} images do not determine a turn of {victim.encoder.dim} dimensions: give "
                f"--num-train {2 * victim.encoder.dim} or more, or no --align"
            )
        read = {name for score in names for name in _READS.get(score, ("trained",) if options.align else ())}
        self.sets = {name: each for name, each in images.sets().items() if name in read}
        self.victim = self._represent(Shown(victim.encoder, outputs=False))
        self.near = {name: self._neighbours(h) for name, h in self.victim.items() if name != "trained"}

    def __call__(self, encoder: SimCLREncoder, outputs: bool = False) -> Reading:
        """The reading of an encoder, or with `outputs` of what its head gives, where that is a linear map.

        An MLP is a projection head, which other encoders have too. UserError for representations that are no numbers.
        """
        shown = Shown(encoder, outputs and isinstance(encoder.backbone.fc, nn.Linear))
        h, reading = self._represent(shown), Reading()
        by_name: dict[str, Callable[[], float]] = {
            "watermark": lambda: self._watermark(shown, h),
            "sslguard": lambda: self._sslguard(shown, h),
            "dataset-inference": lambda: self._inference(h),
            "cosine": lambda: self._cosine(h["trained"]),
            "information": lambda: mutual_information(self.victim["trained"], h["trained"]),
            "noise": lambda: 100 * self._common("noise", h).mean().item(),
            "textures": lambda: 100 * self._common("textures", h).mean().item(),
        }
        for name in self.names:
            if name == "contested":
                reading.common = self._common("unseen", h).cpu()
                continue
            try:
                reading.scores[name] = float(by_name[name]())
            except UserError as error:
                reading.lacking[name] = str(error)
        return reading

    def _represent(self, shown: Shown) -> dict[str, Tensor]:
        """Representations (N, D) of each set of images that a score reads, on the device."""
        shown = shown.to(self.precision.device, memory_format=self.precision.memory_format)
        return {name: represent(shown, images, self.precision) for name, images in self.sets.items()}

    def _neighbours(self, h: Tensor) -> Tensor:
        # Centred: representations of noise lie close together, and a constant dimension must not count.
        return nearest_neighbours(h - h.mean(dim=0), NEIGHBOURS)

    def _common(self, name: str, h: dict[str, Tensor]) -> Tensor:
        return shared_neighbours(self._neighbours(h[name]), self.near[name])

    def _alignment(self, trained: Tensor) -> Alignment:
        if self.half < trained.shape[1]:
            raise UserError(f"{self.half} images do not determine a turn of {trained.shape[1]} dimensions")
        return Alignment(trained[: self.half], self.victim["trained"][: self.half])

    def _in_place(self, shown: Shown, h: dict[str, Tensor]) -> nn.Module:
        """What gives representations in the victim's coordinates, where these are aligned."""
        return Aligned(shown, self._alignment(h["trained"])) if self.options.align else shown

    def _watermark(self, shown: Shown, h: dict[str, Tensor]) -> float:
        encoder = self._in_place(shown, h)
        check_width(self.mlp, encoder)
        right, _ = watermark_scores(encoder, self.mlp, self.images.unseen, self.precision, self.seed)
        return 100 * right.double().mean().item()

    def _sslguard(self, shown: Shown, h: dict[str, Tensor]) -> float:
        encoder = self._in_place(shown, h)
        check_fits(self.mark, encoder)
        return mark_cosines(encoder, self.mark, self.images.unseen, self.precision)[0].double().mean().item()

    def _inference(self, h: dict[str, Tensor]) -> float:
        fitted, held_out = h["trained"][: self.half], h["trained"][self.half :]
        return cohens_d(*log_likelihoods(fitted, held_out, h["unseen"], mixture=self.options.mixture, seed=self.seed))

    def _cosine(self, trained: Tensor) -> float:
        own, begin = self.victim["trained"], 0
        if self.options.align:
            trained, begin = self._alignment(trained)(trained), self.half
        if trained.shape != own.shape:
            raise UserError(f"{trained.shape[1]} numbers, the victim has {own.shape[1]}")
        return centred_cosines(trained[begin:], own[begin:]).abs().mean().item()
