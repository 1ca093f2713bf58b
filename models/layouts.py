"""Other people's checkpoints: the keys of each layout, their names here, and the images that such an encoder expects.

A new layout is a row of LAYOUTS; docs/checkpoints.md lists them for readers.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.resnet import STEMS
from models.simclr import Normalize, SimCLREncoder
from utils import UserError

State = dict[str, Tensor]
Inputs = tuple[int | None, Normalize | None]  # the size of images and their normalisation; None: as they are sent

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

# Entries that may hold the tensors; the first that exists counts, so of DINO's two networks the teacher is read.
ENTRIES = ("state_dict", "teacher", "model", "student")
# Entries that may say how images are prepared.
ASSUMED = ("normalize", "input_size")
# Prefixes that wrappers put before every key.
WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Tensors:
    """A file's tensors by their keys without wrappers' prefixes, and the entry they are in ("" for the top level)."""

    state: State
    entry: str = "state_dict"
    wrapped: bool = False

    @classmethod
    def of(cls, checkpoint: Mapping, source: str) -> "Tensors":
        """The tensors of a checkpoint dictionary. UserError when there are none."""
        bare = {key: value for key, value in checkpoint.items() if key not in ASSUMED}
        for entry, content in [*((name, checkpoint.get(name)) for name in ENTRIES), ("", bare)]:
            if isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values()):
                state = unwrap(content)
                return cls(state, entry, len(content) > 0 and state.keys() != content.keys())
        entries = ", ".join(map(str, list(checkpoint)[:8]))
        raise UserError(f"{source} has no state_dict of tensors, nor {', '.join(ENTRIES[1:])}: it holds {entries}")


def unwrap(state: Mapping[str, Tensor]) -> State:
    """The same tensors, without the prefixes that data parallelism and compilation put before every key."""
    state = dict(state)
    while state and (prefix := next((text for text in WRAPPERS if all(key.startswith(text) for key in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


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


def _of_2022(tensors: Tensors) -> bool:
    """Whether the head is the untrained head of a copy of 2022, which came from several GPUs or has 512 outputs."""
    last = tensors.state.get("backbone.fc.2.weight")
    return last is not None and (tensors.wrapped or len(last) == 512)


_AT_224 = {"imagenet": (224, IMAGENET)}
_SOLO_LEARN = {"padding2": (32, CIFAR10), **_AT_224}
_SOLO_PARTS = ("projector.", "momentum_projector.", "predictor.", "momentum_predictor.", "classifier.")
_SOLO_PARTS += ("momentum_classifier.", "prototypes.", "queue")
_LIGHTLY_PARTS = ("projection_head.", "prediction_head.", "backbone_momentum.", "projection_head_momentum.")
_STAGES = ("layer1", "layer2", "layer3", "layer4")

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
        "solo-learn",
        prefix="backbone.",
        mark=r"backbone\.layer.*\.downsample\.",
        inputs=_SOLO_LEARN,
        ignored=("momentum_backbone.", *_SOLO_PARTS),
    ),
    Layout(
        "torchvision",
        prefix="",
        mark=r"layer\d\..*\.downsample\.",
        inputs=_AT_224,
        ignored=("fc.",),
        only=lambda tensors: "fc.weight" in tensors.state,
    ),
    Layout("Barlow Twins, VICReg or DINO, backbone alone", "", r"layer\d\..*\.downsample\.", _AT_224),
)


# ---- comparing and reporting ----


def compare_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Why `state` does not load in place of `expected`: a phrase each for missing, unexpected and misshapen keys."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} {tuple(state[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    return in_words(missing, unexpected, misshapen)


def in_words(*groups: Sequence[str]) -> list[str]:
    """A phrase for each group (missing, unexpected, misshapen keys) that is not empty."""
    phrases = []
    for kind, keys in zip(("missing", "unexpected", "misshapen"), groups, strict=True):
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        if keys:
            phrases.append(f"{len(keys)} {kind}: {', '.join(keys[:6])}{more}")
    return phrases


def load_checked(module: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` strictly; UserError naming the keys that are missing, unexpected or misshapen, loading nothing."""
    problems = compare_keys(state, module.state_dict())
    if problems:
        raise UserError(f"{source} does not fit {getattr(module, 'arch', 'the model')}: {'; '.join(problems)}")
    module.load_state_dict(state)


def with_counters(state: State) -> State:
    """Adds BatchNorm's batch counters, which files from before 2018 lack and nothing here reads."""
    if any(key.endswith(".num_batches_tracked") for key in state):
        return state
    norms = [key.removesuffix("running_mean") for key in state if key.endswith(".running_mean")]
    return {**state, **{f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}}


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
