"""Other people's checkpoints: the keys of each layout, their names here, and the images that such an encoder expects.

A new layout is a row of LAYOUTS; docs/checkpoints.md lists them for readers.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from models.resnet import STEMS
from models.simclr import Normalize, SimCLREncoder
from models.tensors import State, Tensors

Inputs = tuple[int | None, Normalize | None]  # the size of images and their normalisation; None: as they are sent

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGENET_SWAV = ((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR10_BY_IMAGE = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # the mean of single images' deviations


@dataclass(frozen=True)
class Layout:
    """A naming scheme for an encoder's tensors.

    `prefix` stands before the backbone's keys, and `parts` renames the part of a key after it. A file is in the layout
    when `mark` (a regular expression) matches the beginning of a key and `only` is true. `inputs` has a row for each
    stem that such encoders have. Keys with a prefix in `ignored` are left out; every other key must have its place.
    """

    name: str
    prefix: str
    mark: str
    inputs: Mapping[str, Inputs]
    ignored: tuple[str, ...] = ()
    head: bool = False  # `fc.` of the backbone is a projection head, and is kept
    shortcut: str = "downsample"  # what a block calls its shortcut
    parts: Mapping[str, str] = field(default_factory=dict)
    only: Callable[[Tensors], bool] = lambda tensors: True

    def fits(self, tensors: Tensors) -> bool:
        return any(re.match(self.mark, key) for key in tensors.state) and self.only(tensors)

    def take(self, state: State) -> tuple[State, Counter]:
        """The tensors by our keys, and how many were left out by prefix; keys that have no place are marked."""
        ours, ignored = {}, Counter()
        for key, value in state.items():
            part = next((prefix for prefix in self.ignored if key.startswith(prefix)), None)
            if part:
                ignored[part] += 1
                continue
            name = self._ours(key)
            ours[f"{key} (twice)" if name in ours else name] = value
        return ours, ignored

    def _ours(self, key: str) -> str:
        if not key.startswith(self.prefix):
            return f"{key} (outside {self.prefix})"
        first, dot, rest = key.removeprefix(self.prefix).partition(".")
        rest = rest.replace(f".{self.shortcut}.", ".shortcut.")
        return f"backbone.{self.parts.get(first, first)}{dot}{rest}"


def _has(*prefixes: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(key.startswith(prefixes) for key in tensors.state)


def _symmetrized(tensors: Tensors) -> bool:
    """Whether the predictor is square, as in the copies of 2022; SimSiam's has a bottleneck, and needs several GPUs."""
    first = tensors.state.get("predictor.0.weight")
    return first is not None and not tensors.wrapped and first.ndim == 2 and first.shape[0] == first.shape[1]


def _of_2022(tensors: Tensors) -> bool:
    """Whether the head is the untrained head of a copy of 2022, which came from several GPUs or has 512 outputs."""
    last = tensors.state.get("backbone.fc.2.weight")
    return last is not None and (tensors.wrapped or last.shape[:1] == (512,))


_AT_224 = {"imagenet": (224, IMAGENET)}
_SOLO_LEARN = {"padding2": (32, CIFAR10), **_AT_224}
_HEADS = ("projection", "projector.", "predictor.")
_SOLO_PARTS = ("projector.", "momentum_projector.", "predictor.", "momentum_predictor.", "classifier.")
_SOLO_PARTS += ("momentum_classifier.", "prototypes.", "queue")
_LIGHTLY_PARTS = ("projection_head.", "prediction_head.", "backbone_momentum.", "projection_head_momentum.")
# Momentum networks; in older versions the trained network also stands under a second name.
_MM_NETWORKS = ("target_net.", "online_net.", "encoder_q.", "encoder_k.", "momentum_encoder.")
_STAGES = ("layer1", "layer2", "layer3", "layer4")
_TORCHVISION = r"layer\d\..*\.downsample\."

# Its keys are exactly those of an architecture here.
OWN = Layout(
    "this project or the 2022 code",
    prefix="backbone.",
    mark=r"backbone\.",
    inputs=dict.fromkeys(STEMS, (None, None)),
    head=True,
    shortcut="shortcut",
)

# Tried in this order, after OWN.
LAYOUTS = (
    Layout(
        "solo-learn, older",
        prefix="encoder.",
        mark=r"encoder\.layer",
        inputs=_SOLO_LEARN,
        ignored=("momentum_encoder.", *_SOLO_PARTS),
        only=lambda tensors: "classifier.weight" in tensors.state,
    ),
    Layout(
        "2022 code, symmetrized",
        prefix="encoder.",
        mark=r"encoder\.layer",
        inputs={"imagenet": (None, None)},
        ignored=("encoder.fc.", "predictor."),
        only=_symmetrized,
    ),
    Layout(
        "SupContrast",
        prefix="encoder.",
        mark=r"encoder\.layer",
        inputs={"cifar": (32, CIFAR10_BY_IMAGE), **_AT_224},
        ignored=("head.", "fc."),
        only=_has("head.", "fc."),
    ),
    Layout(
        "Spijkervet/SimCLR",
        prefix="encoder.",
        mark=r"encoder\.layer",
        inputs={"imagenet": (224, None)},
        ignored=("encoder.fc.", "projector."),
        only=_has("projector."),
    ),
    Layout("SimSiam", "encoder.", r"encoder\.layer", _AT_224, ignored=("encoder.fc.", "predictor.")),
    Layout("MoCo v1/v2", "encoder_q.", r"encoder_q\.layer", _AT_224, ignored=("encoder_q.fc.", "encoder_k.", "queue")),
    Layout(
        "MoCo v3",
        prefix="base_encoder.",
        mark=r"base_encoder\.layer",
        inputs=_AT_224,
        ignored=("base_encoder.fc.", "momentum_encoder.", "predictor."),
    ),
    Layout(
        "lightly, its own ResNet",
        prefix="backbone.",
        mark=r"backbone\.\d\..*\.shortcut\.",
        inputs={"norelu": (32, IMAGENET)},
        ignored=_LIGHTLY_PARTS,
        shortcut="shortcut",
        parts=dict(zip("012345", ("conv1", "bn1", *_STAGES), strict=True)),
    ),
    Layout(
        "lightly, torchvision's ResNet",
        prefix="backbone.",
        mark=r"backbone\.\d\..*\.downsample\.",
        inputs=_AT_224,
        ignored=_LIGHTLY_PARTS,
        parts=dict(zip("014567", ("conv1", "bn1", *_STAGES), strict=True)),
    ),
    Layout(
        "2022 code, ImageNet scale",
        prefix="backbone.",
        mark=r"backbone\.layer.*\.downsample\.",
        inputs=_AT_224,
        ignored=("backbone.fc.",),  # never trained: such copies are headless
        only=_of_2022,
    ),
    Layout(
        "sthalles/SimCLR",
        prefix="backbone.",
        mark=r"backbone\.layer.*\.downsample\.",
        inputs={"imagenet": (None, None)},
        head=True,
        only=lambda tensors: "backbone.fc.2.weight" in tensors.state,
    ),
    Layout(
        "Barlow Twins, VICReg or DINO",
        prefix="backbone.",
        mark=r"backbone\.layer.*\.downsample\.",
        inputs=_AT_224,
        ignored=("projector.", "bn.", "head."),
        only=lambda tensors: tensors.entry in ("model", "teacher", "student"),
    ),
    Layout(
        "mmselfsup",
        prefix="backbone.",
        mark=r"backbone\.layer.*\.downsample\.",
        inputs=_AT_224,
        ignored=("neck.", "head.", "data_preprocessor.", *_MM_NETWORKS, "queue"),
        only=_has("neck.", "head."),
    ),
    Layout(
        "solo-learn",
        prefix="backbone.",
        mark=r"backbone\.layer.*\.downsample\.",
        inputs=_SOLO_LEARN,
        ignored=("momentum_backbone.", *_SOLO_PARTS),
    ),
    Layout("vissl", "_feature_blocks.", r"_feature_blocks\.layer", _AT_224),
    *(
        Layout(
            f"a ResNet called {name}",
            prefix=f"{name}.",
            mark=rf"{name}\.layer",
            inputs={"cifar": (None, None), **_AT_224},
            ignored=(f"{name}.fc.", f"{name}.linear.", "fc.", "classifier.", "head.", *_HEADS),
        )
        for name in ("net", "model")
    ),
    Layout(
        "SwAV",
        prefix="",
        mark=_TORCHVISION,
        inputs={"imagenet": (224, IMAGENET_SWAV)},
        ignored=("projection_head.", "prototypes"),
        only=_has("projection_head.", "prototypes"),
    ),
    Layout(
        "pytorch-cifar",
        prefix="",
        mark=r"layer\d\..*\.shortcut\.",
        inputs={"cifar": (32, CIFAR10_BY_IMAGE)},
        ignored=("linear.",),
        only=_has("linear."),
    ),
    Layout(
        "2022 code, network of a probe",
        prefix="",
        mark=r"layer\d\..*\.shortcut\.",
        inputs={"cifar": (None, None)},
        ignored=("fc.",),
    ),
    Layout(
        "torchvision",
        prefix="",
        mark=_TORCHVISION,
        inputs=_AT_224,
        ignored=("fc.",),
        only=lambda tensors: "fc.weight" in tensors.state,
    ),
    Layout("Barlow Twins, VICReg or DINO, backbone alone", "", _TORCHVISION, _AT_224),
)


def describe(kind: str, encoder: SimCLREncoder, used: int, ignored: Mapping[str, int]) -> str:
    """How a file was read, in one line."""
    stem = getattr(encoder.backbone, "stem", None)
    left_out = f" ({', '.join(ignored)})" if ignored else ""
    size = f"resized to {encoder.input_size} x {encoder.input_size}" if encoder.input_size else "taken as sent"
    if encoder.normalize:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in encoder.normalize)
        normalised = f"normalised by mean ({mean}) and deviation ({std})"
    else:
        normalised = "not normalised"
    network = f"{encoder.arch}{f' with the {stem} stem' if stem else ''}, h of {encoder.dim} numbers"
    head = ", with its head" if encoder.has_head else ""
    keys = f"{used} keys used, {sum(ignored.values())} ignored{left_out}"
    return f"layout of {kind}: {network}{head}; {keys}; images {size}, {normalised}"
