"""Encoders in other formats: a graph (ONNX, TorchScript) or the weights alone, each read back and compared.

network = ExportedEncoder(load_encoder("checkpoint.pth.tar"), "representation", size=32)
difference = write_export(network, "onnx", Path("representation.onnx"), input_name="x")
"""

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files.writing import atomic_path
from models.checkpoint import load_encoder
from models.files import DESCRIBED, DESCRIPTION
from models.simclr import ARCHITECTURES, SimCLREncoder
from utils import UserError, generator

OUTPUTS = ("representation", "answers")
TOLERANCE = 1e-4  # between the file and the encoder, of the largest number; float32 in another order differs by 1e-6
OPSET = 18  # of ONNX: the oldest that torch writes, so that older runtimes read the file


class ExportedEncoder(nn.Module):
    """An encoder as it is handed over: float images (B, 3, size, size) in [0, 1] -> (B, width), float32 on the CPU.

    `output` is the `representation` h, or the `answers`: a copy's output, in the width of its victim's answers.
    Normalisation is part of the network, and so is the resizing of images, as a product with a matrix: not every format
    knows the interpolation. The encoder itself is copied.
    """

    def __init__(self, encoder: SimCLREncoder, output: str = "representation", size: int = 32):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).to("cpu", torch.float32).eval().requires_grad_(False)
        if output == "representation":
            self.encoder.backbone.fc = nn.Identity()
        self.output, self.size = output, size
        side = encoder.input_size or size
        matrix = None if side == size else _resizing(size, side)
        self.register_buffer("down", matrix, persistent=False)
        self.register_buffer("across", None if matrix is None else matrix.T.contiguous(), persistent=False)

    @property
    def width(self) -> int:
        return self.encoder.output_dim

    def forward(self, images: Tensor) -> Tensor:
        if self.down is not None:
            images = self.down @ images @ self.across
        return self.encoder.output(images)

    def samples(self, count: int) -> Tensor:
        """Images (count, 3, size, size) to compare by, the same each time."""
        return torch.rand(count, 3, self.size, self.size, generator=generator(0, "export"))


def _resizing(size: int, side: int) -> Tensor:
    """The matrix (side, size) by which an encoder resizes rows and columns: see `SimCLREncoder.forward`."""
    return F.interpolate(torch.eye(size)[None, None], (side, size), mode="bilinear", antialias=True)[0, 0]


# ---- formats ---------------------------------------------------------------------------------------------------------


Answer = Callable[[Tensor], Tensor]  # images (B, 3, size, size) -> (B, width)


def _write_onnx(network: ExportedEncoder, path: Path, input_name: str) -> None:
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (network.samples(2),), dynamic_shapes=batch, strict=False)
    names = {"input_names": [input_name], "output_names": [network.output], "dynamic_shapes": ({0: "batch"},)}
    graph = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET, **names)
    graph.save(path, external_data=False)


def _read_onnx(path: Path, input_name: str) -> Answer:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {input_name: images.numpy()})[0])


def _write_torchscript(network: ExportedEncoder, path: Path, input_name: str) -> None:
    torch.jit.trace(network, network.samples(2), check_trace=False).save(str(path))


def _read_torchscript(path: Path, input_name: str) -> Answer:
    return torch.jit.load(str(path))


def _write_safetensors(network: ExportedEncoder, path: Path, input_name: str) -> None:
    _save_weights(network, path, {DESCRIPTION: json.dumps(_described(network.encoder))})


def _write_folder(network: ExportedEncoder, path: Path, input_name: str) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(_described(network.encoder), indent=2) + "\n")
    _save_weights(network, path / "model.safetensors", {})


def _read_weights(path: Path, input_name: str) -> Answer:
    return load_encoder(path).output


def _described(encoder: SimCLREncoder) -> dict:
    """What the weights do not say. UserError for a network that cannot be built by its name."""
    if encoder.arch not in ARCHITECTURES:
        raise UserError(
            f"the weights of {encoder.arch} are in its library's own form already: give --format onnx or torchscript"
        )
    return {name: getattr(encoder, name) for name in DESCRIBED}


def _save_weights(network: ExportedEncoder, path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    weights = {key: value.contiguous() for key, value in network.encoder.state_dict().items()}
    save_file(weights, path, {"format": "pt", **metadata})


@dataclass(frozen=True)
class ExportFormat:
    """How a format is written, and read back as a function of images; `graph`: for images of one size."""

    suffix: str
    write: Callable[[ExportedEncoder, Path, str], None]
    read: Callable[[Path, str], Answer]
    packages: tuple[str, ...] = ()
    graph: bool = False


# A new format is a row here.
EXPORT_FORMATS = {
    "onnx": ExportFormat(".onnx", _write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime"), graph=True),
    "safetensors": ExportFormat(".safetensors", _write_safetensors, _read_weights, ("safetensors",)),
    "torchscript": ExportFormat(".pt", _write_torchscript, _read_torchscript, graph=True),
    "hf": ExportFormat("-hf", _write_folder, _read_weights, ("safetensors",)),
}


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_export(network: ExportedEncoder, name: str, path: Path, input_name: str = "x") -> float:
    """Write the network in a format of EXPORT_FORMATS, whole or not at all, and only if the file gives the same.

    Returns the largest difference between what the file and the encoder give, as a part of the largest number.
    UserError where a package is absent, `path` exists, the format cannot hold the network, or the file differs.
    """
    form = EXPORT_FORMATS[name]
    if input_name == network.output:
        raise UserError(f"--input-name {input_name} is the name of the output: give another")
    absent = [package for package in form.packages if importlib.util.find_spec(package) is None]
    if absent:
        raise UserError(f"--format {name} needs {', '.join(absent)}: pip install -r requirements-export.txt")
    if path.exists():
        raise UserError(f"{path} is there already: remove it, or give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        try:
            with warnings.catch_warnings():  # of both exporters, about their own future
                warnings.simplefilter("ignore")
                form.write(network, temporary, input_name)
                read = form.read(temporary, input_name)
                differences = [_difference(network, read, count) for count in (1, 5)]
        except (UserError, OSError):
            raise
        except Exception as error:  # whatever a library raises of a network that it cannot write
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{network.encoder.arch} cannot be written as {name}: {said}") from None
        if not max(differences) <= TOLERANCE:
            raise UserError(f"the {name} file differs from the encoder by {max(differences):.1e}: it is not kept")
    return max(differences)


@torch.no_grad()
def _difference(network: ExportedEncoder, read: Answer, count: int) -> float:
    """The largest difference to the encoder on so many images, as a part of the largest number; infinite for NaN."""
    images = network.samples(count)
    expected, found = network.encoder.output(images), read(images)
    if found.shape != expected.shape:
        raise UserError(f"the file gives {tuple(found.shape)} for {count} images, the encoder {tuple(expected.shape)}")
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return float(difference.nan_to_num(torch.inf))
