"""Files and folders that may hold a checkpoint: what each of them is, and what is in it. No code in them is run."""

import argparse
import json
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from files.reading import (
    checked,
    dense,
    normalisation,
    number,
    optional,
    read_json,
    reading,
    record,
    table,
    tensor,
    text,
)
from utils import UserError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder; the first that exists is read
# The key of config.json by which a library is recognised; its value names the network.
MARKS = {"timm": "architecture", "huggingface": "model_type"}
LARGEST_SIDE = 4096  # of images
LARGEST_SETTING = 10**6  # in another library's configuration


def _digests(value: Any) -> str | None:
    """The check of digests, uint8 (N, 16) or flattened."""
    fits = dense(value) and value.dtype == torch.uint8 and value.numel() % 16 == 0
    return None if fits else "digests of 16 bytes"


def _account(value: Any) -> str | None:
    """The check of an account in a ledger, which has the perceptual hashes of its images from late 2026 on."""
    wrong = record(queries=_COUNT, calls=_COUNT, images=_digests)(value)
    if wrong or "near" not in value:
        return wrong
    near = value["near"]
    fits = dense(near) and near.dtype == torch.uint8 and near.numel() % 3 == 0
    return None if fits else "a mapping with near as hashes of 3 bytes"


def _query_set(value: Any) -> str | None:
    """The check of what was queried: a split has its data set's name beside it."""
    if not isinstance(value, dict):
        return table()(value)
    named = {"dataset": text(), "split": text()} if "split" in value else {}
    more = {name: check for name, check in {"available": _COUNT, "size": _SIDE}.items() if name in value}
    return record(**named, **more)(value)


def _seen(value: Any) -> str | None:
    """The check of an epoch's losses and spreads so far."""
    lists = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, list) for part in value)
    fits = lists and len(value[0]) == len(value[1]) and not any(number()(entry) for part in value for entry in part)
    return None if fits else "two lists of as many numbers"


def _mark(value: Any) -> str | None:
    """The check of SSLGuard's watermark: what its other shapes follow from."""
    image = tensor(torch.float32, (3, None, None))
    return record(mask=image, trigger=image, **{"decoder.0.weight": tensor(torch.float32, (None, None))})(value)


_COUNT = number(whole=True, at_least=0)
_SIDE = number(whole=True, at_least=1, at_most=LARGEST_SIDE)
# What a checkpoint may say of where the model comes from (training/record.py).
RECORDED = {
    "images": _COUNT,
    "query_set": _query_set,
    "query_indices": tensor(torch.int64, (None,)),
    "stolen_from": text(),
    "victim_version": text(),
    "drawn_for": text(),
    "ledger": table(_account),
    "query_digests": tensor(torch.uint8, (None, 16)),
    "defence_report": table(number(finite=False)),
    "met": table(number(finite=False)),
}
# What a checkpoint may have besides its tensors.
FIELDS = {
    **RECORDED,
    "epoch": _COUNT,
    "arch": optional(text()),
    "normalize": optional(normalisation),
    "input_size": optional(_SIDE),
    "kind": text(),
    "settings": table(),
    "row": table(),
    "begun": record(step=_COUNT, seen=_seen),
    "sslguard": _mark,
}

# What export.py says of weights: in the metadata of safetensors under this key, or in a folder's config.json.
DESCRIPTION = "encoder.json"
DESCRIBED = {name: FIELDS[name] for name in ("arch", "normalize", "input_size")}

_UNPACK = "unpack it, and give the file inside"
_ELSEWHERE = "give a checkpoint of PyTorch"
# The first bytes of files that are no checkpoints: what they are, and what to do.
_OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file: run git lfs pull where it was cloned",
    b"\x1f\x8b": f"packed by gzip: {_UNPACK}",
    b"BZh": f"packed by bzip2: {_UNPACK}",
    b"\xfd7zXZ": f"packed by xz: {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"packed by zstd: {_UNPACK}",
    b"7z\xbc\xaf": f"a 7z archive: {_UNPACK}",
    b"Rar!": f"a rar archive: {_UNPACK}",
    b"\x89HDF": f"of HDF5, as Keras writes: {_ELSEWHERE}",
    b"\x93NUMPY": f"an array of NumPy: {_ELSEWHERE}",
    b"GGUF": f"of GGUF: {_ELSEWHERE}",
    b"\x89PNG": f"a picture: {_ELSEWHERE}",
    b"\xff\xd8\xff": f"a picture: {_ELSEWHERE}",
    b"%PDF": f"a PDF document: {_ELSEWHERE}",
}
_BY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began its files until 2020
_SAVE_STATE = "where it was made, save its weights alone: torch.save(model.state_dict(), NEW)"


def read_checkpoint(path: str | Path) -> dict:
    """The dictionary stored at `path`, tensors on the CPU, read without running any code in the file.

    For a folder of timm or Hugging Face: its library, configurations and weights. UserError when the file is missing,
    damaged or no checkpoint, needs more than tensors and plain types, or has an entry of another type than it should.
    """
    path = Path(path)
    with reading(path, "a checkpoint"):
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            raise UserError(f"no checkpoint at {path}: train it first, or give the path of an existing checkpoint")
        if not path.is_file():
            raise UserError(f"{path} is neither a file nor a folder: give the path of a checkpoint")
        content = _read_file(path)
        if not isinstance(content, dict):
            kind = "a list" if isinstance(content, list) else f"a {type(content).__name__}"
            raise UserError(f"{path} holds {kind}, not a dictionary of weights: {_SAVE_STATE}")
        checked(content, FIELDS, str(path))
        return content


def _read_file(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(512)
    if _is_safetensors(path, start):
        return _read_safetensors(path)
    if start.startswith(b"PK\x03\x04"):
        try:
            _check_zip(path)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path} is damaged or cut short ({error}): copy or download it again") from None
    else:
        found = _name_of(path, start)
        if found:
            raise UserError(f"{path} is {found}")
    try:
        # A plain container of settings, which runs nothing: SupContrast, DINO and MAE save one beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} {_why_not(str(error))}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
        reason = "" if "weights_only" in reason else f" ({reason})"  # torch's advice would run the file's code
        raise UserError(f"{path} is damaged or cut short{reason}: copy or download it again") from None


def _why_not(error: str) -> str:
    """What a pickle has besides tensors, by torch's words."""
    needed = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.[\w.]+)", error)
    if not needed:
        return "is damaged, or no checkpoint of PyTorch: copy or download it again"
    if needed[1].startswith(("torch.nn.modules", "torchvision.models", "timm.models", "__main__")):
        return f"is a pickled module (it needs {needed[1]}), and code in files is never run: {_SAVE_STATE}"
    return f"is not a file of weights only (it needs {needed[1]}), and code in files is never run: {_SAVE_STATE}"


def _name_of(path: Path, start: bytes) -> str | None:
    """What a file is by its first bytes, with what to do, where it is no checkpoint."""
    if not start:
        return "an empty file: copy or download it again"
    known = next((said for mark, said in _OTHERS.items() if start.startswith(mark)), None)
    if known:
        return known
    if re.match(rb"(?i)(\xef\xbb\xbf)?\s*(<!doctype|<html|<head|<\?xml)", start):
        return "a web page, not the file: download it again, past the page that asks to confirm or to log in"
    if start[:1] == b"\x08" and (path.suffix == ".onnx" or b"pytorch" in start or b"onnx" in start):
        return "of ONNX, a graph: give the weights that it was exported from"
    if start[4:8] == b"TFL3":
        return f"of TensorFlow Lite: {_ELSEWHERE}"
    if start[257:262] == b"ustar":
        return f"a tar archive: {_UNPACK}"
    if start[:1] == b"\x80" and not start.startswith(_BY_TORCH):
        return f"a pickle that torch.save did not write: {_SAVE_STATE}"
    if not re.search(rb"[^\t\n\r\x20-\x7e\x80-\xff]", start) and start[:1] != b"\x80":  # no control character
        return "a text, not a checkpoint: give the file of the weights"
    return None


def _check_zip(path: Path) -> None:
    """UserError where a zip archive is none of torch.save, or damaged, or swells when it is read."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise UserError(
                f"{path} is a TorchScript program, and code in files is never run: where it was made, save its weights "
                f"alone: torch.save(torch.jit.load(OLD).state_dict(), NEW)"
            )
        if any(name.endswith("archive_format") for name in names):
            raise UserError(f"{path} is a program by torch.export, not weights alone: {_SAVE_STATE}")
        if names and all(name.endswith(".npy") for name in names):
            raise UserError(f"{path} has arrays of NumPy: {_ELSEWHERE}")
        if not any(name.endswith("data.pkl") and name.count("/") <= 1 for name in names):
            raise UserError(f"{path} is a zip archive of {', '.join(names[:3]) or 'nothing'}: {_UNPACK}")
        if any(entry.flag_bits & 1 for entry in entries):
            raise UserError(f"{path} is encrypted: decrypt it first")
        size = sum(entry.file_size for entry in entries)
        if size > path.stat().st_size:  # torch.save doesn't compress
            raise UserError(f"{path} swells to {size / 2**20:,.0f} MiB: save it by torch.save")
        for entry in entries:
            if entry.CRC:  # torch can be told to leave the checksums out
                with archive.open(entry) as file:
                    while file.read(2**20):  # to the end, where zipfile compares the checksum
                        pass


def _is_safetensors(path: Path, start: bytes) -> bool:
    return path.suffix == ".safetensors" or (
        len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size
    )


def _read_safetensors(path: Path) -> dict:
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"reading {path} needs the package safetensors: pip install safetensors") from None
    try:
        with safe_open(path, "pt") as file:
            described = (file.metadata() or {}).get(DESCRIPTION)
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}): copy or download it again") from None
    return weights if described is None else _described(json.loads(described), weights, path)


def _described(description: Any, weights: dict, path: Path) -> dict:
    """The weights that export.py wrote, and what it says of them, as the entries of a checkpoint."""
    return {**checked(description, DESCRIBED, str(path)), "state_dict": weights}


# ---- folders ---------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> dict:
    """The contents of a folder of timm or Hugging Face: library, config, preprocessor and state_dict.

    Of a folder by export.py, whose config.json has `arch`, the entries of a checkpoint.
    """
    files = [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not files or not (folder / "config.json").exists():
        inside = sorted(file.name for file in folder.iterdir() if file.name.endswith((".pth", ".tar", ".pt", ".ckpt")))
        raise UserError(
            f"{folder} is not a folder of timm or Hugging Face: it needs config.json and {' or '.join(WEIGHTS)}"
            + (f"; or give a file in it: {', '.join(inside[:5])}" if inside else "")
        )
    config = _read_config(folder / "config.json")
    preprocessor = folder / "preprocessor_config.json"
    library = next((library for library, key in MARKS.items() if key in config), None)
    if library is None and "arch" not in config:
        raise UserError(f"{folder}/config.json names no network: it has none of {', '.join(MARKS.values())}, arch")
    state = read_checkpoint(files[0])
    if not state or not all(isinstance(key, str) and dense(value) for key, value in state.items()):
        raise UserError(f"{files[0]} holds no tensors, or more than tensors: save the network's state_dict alone")
    if library is None:
        return _described(config, state, folder)
    content = {"library": library, "config": config, "state_dict": state}
    return {**content, "preprocessor": _read_config(preprocessor) if preprocessor.exists() else {}}


def _read_config(path: Path) -> dict:
    """Another library's configuration. UserError where it has a number that no network has."""
    content = read_json(path, "an object of settings")
    fields = {**dict.fromkeys(MARKS.values(), text()), "model_args": table(), "pretrained_cfg": table()}
    checked(content, fields, str(path))
    left: list[tuple[str, Any]] = [("", content)]
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += ((name, entry) for entry in value)
        elif isinstance(value, int) and abs(value) > LARGEST_SETTING:
            raise UserError(f"{path}: {name} is beyond {LARGEST_SETTING:,}, which no network has")
    return content
