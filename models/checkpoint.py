"""Reading checkpoints: this project's, those of the 2022 code, and other people's (layouts.py, folders.py)."""

import functools
import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.folders import MARKS, encoder_from_folder
from models.layouts import LAYOUTS, OWN, Layout, State, Tensors, compare_keys, describe, load_checked, with_counters
from models.simclr import ARCHITECTURES, SimCLREncoder, build_encoder
from utils import UserError, seeded

__all__ = ["compare_keys", "encoder_from_checkpoint", "load_checked", "load_encoder", "read_checkpoint"]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder; the first that exists is read


def read_checkpoint(path: str | Path) -> dict:
    """The dictionary stored at `path`, tensors on the CPU, read without running any code in the file.

    For a folder of timm or Hugging Face: its library, configurations and weights. UserError when the file is missing,
    truncated or not a checkpoint, or needs more than tensors and plain types.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: train it first, or give the path of an existing checkpoint")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint dictionary")
    return content


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it needs {needed[1]}" if needed else _brief(error)
        raise UserError(
            f"{path} is not a file of weights only ({reason}), and code in files is never run: on a machine where you "
            "trust it, save its tensors alone: torch.save(torch.load(OLD, weights_only=False)['state_dict'], NEW)"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read, is it truncated? {_brief(error)}") from None


def _read_safetensors(path: Path) -> dict:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"reading {path} needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read, is it truncated? {_brief(error)}") from None


def _read_folder(folder: Path) -> dict:
    """The contents of a folder of timm or Hugging Face: library, config, preprocessor and state_dict."""
    files = [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not files or not (folder / "config.json").exists():
        raise UserError(
            f"{folder} is not a folder of timm or Hugging Face: it needs config.json and {' or '.join(WEIGHTS)}"
        )
    config, preprocessor = (_read_json(folder / f"{name}config.json") for name in ("", "preprocessor_"))
    library = next((library for library, key in MARKS.items() if key in config), None)
    if library is None:
        raise UserError(f"{folder}/config.json names no network: it has none of {', '.join(MARKS.values())}")
    state = read_checkpoint(files[0])
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{files[0]} holds more than tensors: save the network's state_dict alone")
    return {"library": library, "config": config, "preprocessor": preprocessor, "state_dict": state}


def _read_json(path: Path) -> dict:
    """The JSON object in a file; empty when there is no file."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object of settings")
    return content


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160] or type(error).__name__


# ---- which layout, which architecture ----


@functools.cache
def _outline(factory: Callable[[], nn.Module]) -> tuple[str | None, State]:
    """Stem and state_dict, on the meta device, of the backbone that a row of ARCHITECTURES builds."""
    with torch.device("meta"):
        backbone = factory()
    return getattr(backbone, "stem", None), {f"backbone.{key}": value for key, value in backbone.state_dict().items()}


def _outlines(layout: Layout) -> dict[str, State]:
    """The architectures that are possible in a layout, with their keys; all of them for OWN."""
    outlines = {arch: _outline(factory) for arch, factory in ARCHITECTURES.items()}
    return {arch: keys for arch, (stem, keys) in outlines.items() if layout is OWN or stem in layout.inputs}


def _backbone(state: State, layout: Layout) -> State:
    """The tensors without the head, where the layout keeps a head."""
    return {key: value for key, value in state.items() if not (layout.head and key.startswith("backbone.fc."))}


def _recognise(tensors: Tensors) -> tuple[Layout | None, State, Counter, list[str]]:
    """A file's layout, its tensors by our keys, the parts left out, and the architectures with exactly these keys.

    Keys and shapes decide, not the entry `arch`: for stolen encoders the 2022 code stored the victim's there.
    """
    for layout in (OWN, *LAYOUTS):
        if not layout.fits(tensors):
            continue
        state, ignored = layout.take(tensors.state)
        backbone = with_counters(_backbone(state, layout))
        fitting = [arch for arch, keys in _outlines(layout).items() if not compare_keys(backbone, keys)]
        if fitting or layout is not OWN:
            return layout, state, ignored, fitting
    return None, tensors.state, Counter(), []


def _misfit(state: State, arch: str) -> int:
    keys = _outline(ARCHITECTURES[arch])[1]
    return sum(key not in keys or key not in state or keys[key].shape != state[key].shape for key in {*keys, *state})


def _refuse(layout: Layout | None, state: State, arch: str | None, source: str) -> None:
    """Raise the UserError that says why a file does not fit the architecture requested, or else the nearest."""
    if layout is None:
        first = ", ".join(list(state)[:4])
        raise UserError(f"{source} is in no layout of docs/checkpoints.md: its keys are {first}, ...")
    backbone, possible = _backbone(with_counters(state), layout), _outlines(layout)
    nearest = arch if arch in possible else min(possible, key=lambda arch: _misfit(backbone, arch))
    problems = "; ".join(compare_keys(backbone, possible[nearest]))
    taken_for = "" if layout is OWN else f", taken for the layout of {layout.name},"
    raise UserError(f"{source}{taken_for} does not fit {nearest}: {problems}")


def encoder_from_checkpoint(checkpoint: Mapping, source: str = "checkpoint", arch: str | None = None) -> SimCLREncoder:
    """The encoder in a checkpoint dictionary, in eval mode, with the file's head if it has any.

    `arch` is the architecture required; None accepts the file's. The encoder's `report` says how the file was read.
    Entries `normalize` and `input_size` of the file take precedence over the layout's assumptions. UserError says which
    architecture was found, or which keys are missing, unexpected or misshapen.
    """
    if "library" in checkpoint:
        encoder = encoder_from_folder(checkpoint, source)
        _insist(arch, encoder.arch, source)
        return encoder
    tensors = Tensors.of(checkpoint, source)
    layout, state, ignored, fitting = _recognise(tensors)
    if not fitting:
        if layout is None and (arch or checkpoint.get("arch")) in [*ARCHITECTURES]:
            layout = OWN
        _refuse(layout, state, arch, source)
    # Stems may differ in ways that no tensor shows: then the file's `arch` decides, else the caller's.
    found = next((name for name in (checkpoint.get("arch"), arch) if name in fitting), fitting[0])
    _insist(arch, found, source)
    size, normalize = layout.inputs.get(_outline(ARCHITECTURES[found])[0], (None, None))
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
        raise UserError(f"{source} holds a {found}, not a {arch}: give --arch {found} or another checkpoint")


def load_encoder(path: str | Path, device: str | torch.device = "cpu", arch: str | None = None) -> SimCLREncoder:
    """The encoder stored at `path`, in eval mode on `device`: `encoder(images)` -> h, `encoder.project(images)` -> z.

    Takes this project's checkpoints, the 2022 code's and other people's (docs/checkpoints.md). UserError: see
    `read_checkpoint`, `encoder_from_checkpoint`.
    """
    return encoder_from_checkpoint(read_checkpoint(path), str(path), arch).to(device)
