"""Strange checkpoints and configurations of timm and Hugging Face: cut, forged entry by entry, or of another kind."""

import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.campaign.texts import ANYTHING, Canary, Make, holding, remove

NAN = float("nan")
JUNK: list[Any] = [None, -1, 0, 10**30, -(10**30), NAN, float("inf"), 1.5, "text", "", "../../x", "x" * 100_000]
JUNK += [b"bytes", [], [1, [2]], {}, {"a": {"b": None}}, {1: 2}, True, (), complex(1, 2)]
TENSORS = {
    "no dimensions": lambda: torch.tensor(1.0),
    "empty": lambda: torch.zeros(0),
    "whole numbers": lambda: torch.zeros(3, dtype=torch.int64),
    "NaN": lambda: torch.full((3,), NAN),
    "huge by strides": lambda: torch.zeros(1).expand(10**13),
    "huge square": lambda: torch.zeros(1, 1).expand(10**6, 10**6),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "text": lambda: "text",
}


# ---- entries ---------------------------------------------------------------------------------------------------------


def _spot(content: dict, draws: random.Random) -> tuple[dict, Any, str]:
    """A mapping inside the content, one of its keys, and the path of both."""
    place, path = content, ""
    while True:
        key = draws.choice(list(place))
        path += f".{key}"
        if not isinstance(place[key], dict) or not place[key] or draws.random() < 0.2:
            return place, key, path
        place = place[key]


def changed(change: Callable[[dict, random.Random], str | None]) -> Make:
    """Makes a checkpoint with a change to its content."""

    def make(path: Path, draws: random.Random) -> str | None:
        content = torch.load(path, weights_only=True)
        said = change(content, draws)
        torch.save(content, path)
        return said

    return make


def _forge(content: dict, draws: random.Random) -> str:
    """Give an entry a value of another type, or one that is out of any range."""
    place, key, path = _spot(content, draws)
    junk = [value for value in JUNK if type(value) is not type(place[key]) or value in (-1, -(10**30), 10**30)]
    place[key] = draws.choice(junk)
    return f"{path} is {place[key]!r:.60}"


def _forge_tensor(content: dict, draws: random.Random) -> str:
    place, key, path = _spot(content, draws)
    name = draws.choice(list(TENSORS))
    place[key] = TENSORS[name]()
    return f"{path} is a tensor, {name}"


def _leave_out(content: dict, draws: random.Random) -> str:
    place, key, path = _spot(content, draws)
    del place[key]
    return f"without {path}"


def _rename(content: dict, draws: random.Random) -> str:
    place, key, path = _spot(content, draws)
    new = draws.choice((5, None, "", f"x.{key}", ("a", 1), 2.5))
    place[new] = place.pop(key)
    return f"{path} is called {new!r}"


def _weights(change: Callable[[torch.Tensor, random.Random], Any]) -> Make:
    """Changes a weight of several dimensions."""

    def make(content: dict, draws: random.Random) -> str:
        state = content["state_dict"]
        key = draws.choice([key for key, value in state.items() if value.ndim > 1 and "fc" not in key])
        state[key] = change(state[key].clone(), draws)
        return key

    return changed(make)


def _poke(value: float) -> Callable:
    def change(weight: torch.Tensor, draws: random.Random) -> torch.Tensor:
        flat = weight.flatten()
        flat[draws.randrange(len(flat))] = value
        return flat.view(weight.shape)

    return change


def _optimizer(content: dict, draws: random.Random) -> str:
    """Moments of a parameter that has another shape."""
    state = content["optimizer"]["state"]
    one, other = draws.sample([key for key, value in state.items() if value["exp_avg"].ndim > 1], 2)
    state[one] = (
        {**state[one], "exp_avg": state[one]["exp_avg"].flatten()[:1]} if draws.random() < 0.5 else state[other]
    )
    return f"state {one}"


# ---- files of another kind -------------------------------------------------------------------------------------------


def saved(content: Any, **options: Any) -> Make:
    """Makes a file with the content by torch.save."""

    def make(path: Path, draws: random.Random) -> None:
        torch.save(content, path, **options)

    return make


def _scripted(path: Path, draws: random.Random) -> None:
    torch.jit.save(torch.jit.trace(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)), str(path))


def _rewritten(change: Callable[[str, bytes], tuple[str, bytes] | None]) -> Make:
    """Makes a checkpoint's zip archive anew, with other entries."""

    def make(path: Path, draws: random.Random) -> None:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as before, zipfile.ZipFile(path, "w") as after:
            for name in before.namelist():
                entry = change(name, before.read(name))
                if entry:
                    after.writestr(*entry)

    return make


def _evil_pickle(name: str, data: bytes) -> tuple[str, bytes]:
    return name, pickle.dumps(Canary(), protocol=2) if name.endswith("data.pkl") else data


def _short_storage(name: str, data: bytes) -> tuple[str, bytes]:
    return name, data[: len(data) // 2] if "/data/" in name else data


def _no_storage(name: str, data: bytes) -> tuple[str, bytes] | None:
    return None if name.endswith("/data/3") else (name, data)


def _tar(path: Path, draws: random.Random) -> None:
    content = path.read_bytes()
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("checkpoint.pth.tar")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))


def _nested(depth: int) -> Make:
    def make(path: Path, draws: random.Random) -> None:
        # By hand: pickle itself cannot write so deep a dictionary.
        path.write_bytes(b"\x80\x02" + b"}X\x01\0\0\0a" * depth + b"N" + b"s" * depth + b".")

    return make


def _as_model_state_dict(path: Path, draws: random.Random) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({"epoch": 1, "model_state_dict": content["state_dict"]}, path)


_ONNX = b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\x80\x01\n\x10\n\x05input\x12\x06output"
KINDS: dict[str, tuple[str, Make]] = dict(ANYTHING)
KINDS |= {f"forged entry {number}": ("either", changed(_forge)) for number in range(1, 7)}
KINDS |= {f"forged tensor {number}": ("either", changed(_forge_tensor)) for number in range(1, 4)}
KINDS |= {
    "cut again": ANYTHING["cut"],
    "entry left out": ("either", changed(_leave_out)),
    "entry renamed": ("either", changed(_rename)),
    "a weight is NaN": ("refused", _weights(_poke(NAN))),
    "a weight is inf": ("refused", _weights(_poke(float("inf")))),
    "a weight of another shape": ("refused", _weights(lambda weight, draws: weight.transpose(0, 1)[:1])),
    "a weight of float64": ("either", _weights(lambda weight, draws: weight.double())),
    "a weight of complex numbers": ("refused", _weights(lambda weight, draws: weight + 1j)),
    "a weight in whole numbers": ("refused", _weights(lambda weight, draws: weight.long())),
    "a weight of huge shape": ("refused", _weights(lambda weight, draws: torch.zeros(1).expand(10**13))),
    "a weight that is a list": ("refused", _weights(lambda weight, draws: weight.tolist())),
    "optimizer of other shapes": ("either", changed(_optimizer)),
    "runs code: zip": ("refused", saved({"state_dict": Canary()})),
    "runs code: old format": ("refused", saved({"state_dict": Canary()}, _use_new_zipfile_serialization=False)),
    "runs code: other pickle in the zip": ("refused", _rewritten(_evil_pickle)),
    "pickled module": ("refused", saved(nn.Conv2d(3, 4, 3))),
    "TorchScript": ("refused", _scripted),
    "ONNX": ("refused", holding(_ONNX)),
    "safetensors": ("refused", holding(struct.pack("<Q", 2) + b"{}")),
    "tar of a checkpoint": ("refused", _tar),
    "short storages": ("refused", _rewritten(_short_storage)),
    "a storage is missing": ("refused", _rewritten(_no_storage)),
    "deep": ("refused", _nested(100_000)),
    "empty mapping": ("refused", saved({})),
    "a list": ("refused", saved([1, 2])),
    "a tensor": ("refused", saved(torch.zeros(3))),
    "weights of nothing": ("refused", saved({"state_dict": {}})),
    "weights of somebody": ("refused", saved({"state_dict": {"a.weight": torch.zeros(3, 3)}})),
    "model_state_dict": ("any", _as_model_state_dict),  # it is read; what it cost is not in it
}


# ---- folders of other libraries --------------------------------------------------------------------------------------


def write_timm(folder: Path) -> None:
    """A small network of timm with random weights, as timm saves it."""
    import timm
    from safetensors.torch import save_file

    folder.mkdir()
    model = timm.create_model("test_resnet", pretrained=False, num_classes=0).eval()
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "classifier": "fc"}
    config = {"architecture": "test_resnet", "num_classes": 0, "model_args": {}, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config))


def write_huggingface(folder: Path) -> None:
    """A small network of transformers with random weights."""
    import transformers

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    transformers.ResNetModel(transformers.ResNetConfig(**sizes)).save_pretrained(folder)
    size = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(size))


LIBRARIES = {"timm": write_timm, "huggingface": write_huggingface}


def configured(change: Callable[[dict, random.Random], str | None]) -> Make:
    """Makes a config.json with a change."""

    def make(path: Path, draws: random.Random) -> str | None:
        content = json.loads(path.read_text())
        said = change(content, draws)
        path.write_text(json.dumps(content))
        return said

    return make


def _forge_setting(content: dict, draws: random.Random) -> str:
    place, key, path = _spot(content, draws)
    values = (None, -1, 0, 10**6, 10**30, NAN, "text", "", [], [10**6], [1, [2]], {}, {"a": 1}, [-1, 8], [0])
    place[key] = draws.choice(values)
    return f"{path} is {place[key]!r}"


def _with(**settings: Any) -> Make:
    return configured(lambda content, draws: content.update(settings))


def _beside(name: str, content: bytes | None = None) -> Make:
    """Replaces another file of the folder; without content, by a pickle that runs code."""

    def make(path: Path, draws: random.Random) -> None:
        for weights in path.parent.glob("model.*"):
            weights.unlink()
        if content is None:
            torch.save({"conv.weight": Canary()}, path.parent / name)
        else:
            (path.parent / name).write_bytes(content)

    return make


def _cut_weights(path: Path, draws: random.Random) -> str | None:
    return ANYTHING["cut"][1](path.parent / "model.safetensors", draws)


def _no_weights(path: Path, draws: random.Random) -> None:
    remove(path.parent / "model.safetensors")


def _header(header: bytes, declared: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if declared is None else declared) + header


_OVERLAP = b'{"conv.weight":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}'
CONFIGURATIONS = {name: ("refused", make) for name, (_, make) in ANYTHING.items()}
CONFIGURATIONS["flipped bits"] = ("refused", holding('{"architecture": "test_resnet", "model_type": "resn\x00t"}'))
CONFIGURATIONS["overwritten"] = ("refused", holding('{"architecture": "test_resnet", "model_type": "resnet", "a'))
CONFIGURATIONS |= {f"forged setting {number}": ("any", configured(_forge_setting)) for number in range(1, 9)}
CONFIGURATIONS |= {
    "300,000 layers": ("refused", _with(model_type="vit", architecture="vit_tiny", num_hidden_layers=300_000)),
    "depth of a million": ("refused", _with(depths=[10**6, 1], model_args={"layers": [10**6, 1, 1, 1]})),
    "width of a billion": ("refused", _with(hidden_sizes=[10**9, 16], model_args={"channels": [10**9] * 4})),
    "images of a million pixels": (
        "refused",
        _with(model_type="vit", architecture="vit_tiny", image_size=10**6, model_args={"img_size": 10**6}),
    ),
    "unknown network": ("refused", _with(model_type="nonsense", architecture="nonsense")),
    "network on the internet": ("refused", _with(model_type="../x", architecture="hf-hub:somebody/model")),
    "code on the internet": ("any", _with(auto_map={"AutoModel": "somebody/model--code.Model"})),
    "a list": ("refused", holding("[1, 2]")),
    "deep": ("refused", holding("[" * 100_000)),
    "deep mapping": ("refused", holding('{"a":' * 100_000)),
    "a long number": ("refused", holding('{"model_type": ' + "9" * 5000 + "}")),
    "weights are cut": ("refused", _cut_weights),
    "no weights": ("refused", _no_weights),
    "weights run code": ("refused", _beside("pytorch_model.bin")),
    "weights with a header of 10^18 bytes": ("refused", _beside("model.safetensors", _header(b"{}", 10**18))),
    "weights of a shape without data": ("refused", _beside("model.safetensors", _header(_OVERLAP) + bytes(4))),
    "weights of nothing": ("refused", _beside("model.safetensors", _header(b"{}"))),
}
