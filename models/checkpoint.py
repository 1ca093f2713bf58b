"""Encoders from checkpoints: this project's, those of the 2022 code, and other people's (layouts.py, folders.py)."""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from files.reading import checked, reading
from models.files import FIELDS, read_checkpoint
from models.folders import encoder_from_folder
from models.layouts import LAYOUTS, OWN, Layout, describe
from models.simclr import ARCHITECTURES, SimCLREncoder, build_encoder
from models.tensors import State, Tensors, compare_keys, load_checked, with_counters
from utils import UserError, seeded

__all__ = ["compare_keys", "encoder_from_checkpoint", "load_checked", "load_encoder", "read_checkpoint"]

# ---- which layout, which architecture ----


@functools.cache
def _outline(factory: Callable[[], nn.Module]) -> tuple[str | None, State]:
    """Stem and state_dict, on the meta device, of the backbone that a row of ARCHITECTURES builds."""
    with torch.device("meta"):
        backbone = factory()
    return getattr(backbone, "stem", None), {f"backbone.{key}": value for key, value in backbone.state_dict().items()}


def _outlines(layout: Layout, named: Collection[str], size: int | None) -> dict[str, State]:
    """The architectures that are possible in a layout, with their keys; for OWN all, also of timm if they are named."""
    named = [arch for arch in named if layout is OWN and arch in ARCHITECTURES]
    outlines = {arch: _outline(ARCHITECTURES.at(arch, size)) for arch in dict.fromkeys((*ARCHITECTURES, *named))}
    return {arch: keys for arch, (stem, keys) in outlines.items() if layout is OWN or stem in layout.inputs}


def _backbone(state: State, layout: Layout) -> State:
    """The tensors without the head, where the layout keeps a head."""
    return {key: value for key, value in state.items() if not (layout.head and key.startswith("backbone.fc."))}


def _recognise(
    tensors: Tensors, named: Collection[str], size: int | None
) -> tuple[Layout | None, State, Counter, list[str]]:
    """A file's layout, its tensors by our keys, the parts left out, and the architectures with exactly these keys.

    Keys and shapes decide, not the name in the entry `arch`: for stolen encoders the 2022 code stored the victim's
    there.
    """
    for layout in (OWN, *LAYOUTS):
        if not layout.fits(tensors):
            continue
        state, ignored = layout.take(tensors.state)
        backbone = with_counters(_backbone(state, layout))
        fitting = [arch for arch, keys in _outlines(layout, named, size).items() if not compare_keys(backbone, keys)]
        if fitting or layout is not OWN:
            return layout, state, ignored, fitting
    return None, tensors.state, Counter(), []


def _misfit(state: State, keys: State) -> int:
    return sum(key not in keys or key not in state or keys[key].shape != state[key].shape for key in {*keys, *state})


def _refuse(
    layout: Layout | None, state: State, arch: str | None, named: Collection[str], size: int | None, source: str
) -> None:
    """Raise the UserError that says why a file does not fit the architecture requested, or else the nearest."""
    if layout is None:
        first = ", ".join(list(state)[:4])
        raise UserError(f"{source} is in no layout of docs/checkpoints.md: its keys are {first}, ...")
    backbone, possible = _backbone(with_counters(state), layout), _outlines(layout, named, size)
    nearest = arch if arch in possible else min(possible, key=lambda arch: _misfit(backbone, possible[arch]))
    problems = "; ".join(compare_keys(backbone, possible[nearest]))
    taken_for = "" if layout is OWN else f", taken for the layout of {layout.name},"
    raise UserError(f"{source}{taken_for} does not fit {nearest}: {problems}")


def encoder_from_checkpoint(checkpoint: Mapping, source: str = "checkpoint", arch: str | None = None) -> SimCLREncoder:
    """The encoder in a checkpoint dictionary, in eval mode, with the file's head if it has any.

    `arch` is the architecture required; None accepts the file's. The encoder's `report` says how the file was read.
    Entries `normalize` and `input_size` of the file take precedence over the layout's assumptions. UserError says which
    architecture was found, or which keys are missing, unexpected or misshapen.
    """
    with reading(source, "a checkpoint"):
        checked(checkpoint, FIELDS, source)
        return _encoder_from(checkpoint, source, arch)


def _encoder_from(checkpoint: Mapping, source: str, arch: str | None) -> SimCLREncoder:
    if "library" in checkpoint:
        encoder = encoder_from_folder(checkpoint, source)
        _insist(arch, encoder.arch, source)
        return encoder
    tensors = Tensors.of(checkpoint, source)
    named = {name for name in (checkpoint.get("arch"), arch) if name}
    said = checkpoint.get("input_size")
    layout, state, ignored, fitting = _recognise(tensors, named, said)
    if not fitting:
        if layout is None and (arch or checkpoint.get("arch")) in ARCHITECTURES:
            layout = OWN
        _refuse(layout, state, arch, named, said, source)
    # Stems may differ in ways that no tensor shows: then the file's `arch` decides, else the caller's.
    found = next((name for name in (checkpoint.get("arch"), arch) if name in fitting), fitting[0])
    _insist(arch, found, source)
    size, normalize = layout.inputs.get(_outline(ARCHITECTURES.at(found, said))[0], (None, None))
    size, normalize = checkpoint.get("input_size", size), checkpoint.get("normalize", normalize)
    # The head's kind follows from the key of its last layer.
    last_layers = {"linear": "backbone.fc.weight", "mlp-bn": "backbone.fc.3.weight", "mlp": "backbone.fc.2.weight"}
    head, last = next(((kind, state[key]) for kind, key in last_layers.items() if key in state), ("mlp", None))
    with seeded(0):  # so that reading a file does not advance the global generator
        encoder = build_encoder(found, None if last is None else len(last), normalize, head, size)
    load_checked(encoder, with_counters(state), source)
    kind = layout.name if tensors.entry in ("", "state_dict") else f"{layout.name} ({tensors.entry})"
    encoder.report = describe(kind, encoder, len(state), ignored)
    return encoder.eval()


def _insist(arch: str | None, found: str, source: str) -> None:
    if arch not in (None, found):
        raise UserError(
            f"{source} holds a {found}, not a {arch}: leave out the architecture, or give another checkpoint"
        )


def load_encoder(path: str | Path, device: str | torch.device = "cpu", arch: str | None = None) -> SimCLREncoder:
    """The encoder stored at `path`, in eval mode on `device`: `encoder(images)` -> h, `encoder.project(images)` -> z.

    Takes this project's checkpoints, the 2022 code's and other people's (docs/checkpoints.md). UserError: see
    `read_checkpoint`, `encoder_from_checkpoint`.
    """
    return encoder_from_checkpoint(read_checkpoint(path), str(path), arch).to(device)
