"""Reading checkpoints: this project's and those of the 2022 code, with an exact report of what doesn't match."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.simclr import ARCHITECTURES, SimCLREncoder, build_encoder
from utils import UserError, seeded


def read_checkpoint(path: str | Path) -> dict:
    """The dictionary stored at `path`, tensors on the CPU, read without running code that the file may hold.

    UserError when the file is missing, truncated, not a checkpoint or in need of more than tensors and plain types.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: train it first or give the path of one that exists")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a checkpoint of weights only, and nothing else is read: {_brief(error)}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read, is it truncated? {_brief(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint dictionary")
    return content


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160] or type(error).__name__


def compare_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from loading where `expected` is wanted: a phrase for missing, unexpected, misshapen keys."""

    def listing(kind: str, keys: list[str]) -> str:
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        return f"{len(keys)} {kind}: {', '.join(keys[:6])}{more}"

    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} {tuple(state[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    return [listing(kind, keys) for kind, keys in found.items() if keys]


def load_checked(module: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` strictly; UserError naming the keys that are missing, unexpected or misshapen, loading nothing."""
    problems = compare_keys(state, module.state_dict())
    if problems:
        raise UserError(f"{source} does not fit {getattr(module, 'arch', 'the model')}: {'; '.join(problems)}")
    module.load_state_dict(state)


def _is_head(key: str) -> bool:
    return key.startswith("backbone.fc.")


def _recognise(state: Mapping[str, Tensor]) -> str | None:
    """The architecture whose backbone has exactly the keys and shapes of `state`, whatever its head.

    The keys decide, not the file's `arch` entry: the 2022 code stored the victim's there for stolen encoders.
    """
    backbone = {key: value for key, value in state.items() if not _is_head(key)}
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            expected = build_encoder(arch).state_dict()
        if not compare_keys(backbone, expected):
            return arch
    return None


def encoder_from_checkpoint(checkpoint: Mapping, source: str = "checkpoint", arch: str | None = None) -> SimCLREncoder:
    """The encoder that a checkpoint dictionary holds, in eval mode, with the head that the file has.

    `arch` names the architecture that the caller insists on; None takes the file's. UserError says which
    architecture was found, or which keys are missing, unexpected or misshapen.
    """
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{source} has no state_dict of tensors: it holds {', '.join(map(str, list(checkpoint)[:8]))}")
    found = _recognise(state)
    if found is None:
        wanted = arch or checkpoint.get("arch")
        if wanted not in ARCHITECTURES:
            raise UserError(f"{source}: unknown architecture {wanted!r}: choose from {', '.join(ARCHITECTURES)}")
    elif arch is not None and arch != found:
        raise UserError(f"{source} holds a {found}, not a {arch}: give --arch {found} or another checkpoint")
    else:
        wanted = found
    # The head's kind is read off the file: by its last layer.
    last_layers = {"linear": "backbone.fc.weight", "mlp-bn": "backbone.fc.3.weight", "mlp": "backbone.fc.2.weight"}
    head, last = next(((kind, state[key]) for kind, key in last_layers.items() if key in state), ("mlp", None))
    with seeded(0):  # only so that reading a file leaves the global generator alone
        encoder = build_encoder(wanted, None if last is None else len(last), checkpoint.get("normalize"), head)
    load_checked(encoder, state, source)
    return encoder.eval()


def load_encoder(path: str | Path, device: str | torch.device = "cpu", arch: str | None = None) -> SimCLREncoder:
    """The encoder stored at `path`, in eval mode on `device`: `encoder(images)` -> h, `encoder.project(images)` -> z.

    Takes this project's checkpoints and the 2022 code's. UserError: see `read_checkpoint`, `encoder_from_checkpoint`.
    """
    return encoder_from_checkpoint(read_checkpoint(path), str(path), arch).to(device)
