"""Write a copy or a victim in another format: ONNX, safetensors, TorchScript, or a folder as on Hugging Face.

python export.py COPY --format onnx --out answers.onnx --input-name x --size 32
python export.py VICTIM --format safetensors --output representation

The file is read back and compared with the encoder before it is kept. Images are float in [0, 1]: the normalisation is
part of the network. A copy's representation often has another width than its victim's answers; then the answers are the
linear map of it that was trained with the copy.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jobs.early  # noqa: F401

from attacks.victims import encoder_of
from jobs.ending import script
from models import read_checkpoint
from models.exporting import EXPORT_FORMATS, OUTPUTS, ExportedEncoder, write_export
from models.files import LARGEST_SIDE
from settings import Command, Parser, Settings, setting
from training import finding
from training.run import relative
from utils import UserError


def _graph_only(command: Command) -> str | None:
    return None if EXPORT_FORMATS[command.format].graph else f"with --format {command.format}, which has the weights"


def _read_input_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", text, re.ASCII):
        raise UserError(f"{text!r} is no name: give letters, digits and _")
    return text


@dataclass(frozen=True)
class Export(Settings):
    """The file to write."""

    format: str = setting("onnx", "format of the file", choices=EXPORT_FORMATS)
    output: str | None = setting(
        None,
        "what it gives for an image: the representation, or a copy's output in the width of its victim's answers",
        choices=OUTPUTS,
        otherwise="answers for a copy, else representation",
    )
    out: Path | None = setting(
        None, "file or folder to write", otherwise="in the run's folder, by the output and the format"
    )
    input_name: str = setting(
        "x",
        "name of the graph's input, for onnx",
        read=_read_input_name,
        acts=lambda command: None if command.format == "onnx" else f"with --format {command.format}",
    )
    size: int | None = setting(
        None,
        "side of the images that a graph takes",
        at_least=1,
        at_most=LARGEST_SIDE,
        otherwise="that in the encoder's file, else 32",
        acts=_graph_only,
    )
    checkpoint_dir: Path = setting(Path("checkpoints"), "root of all runs")
    title = "export"


def parse(line: Sequence[str] | None = None) -> Command:
    parser = Parser(__doc__, [Export])
    parser.add_argument("encoder", type=Path, metavar="ENCODER", help="checkpoint, run folder or run name")
    command = parser.parse(line)
    command.encoder = command.given.pop("encoder")
    command.use(Export)
    command.refuse_idle()
    return command


def choose_output(asked: str | None, checkpoint: dict, path: Path) -> str:
    """What the file gives. UserError where answers are asked of an encoder that was not trained to give them."""
    # stealhead.py's copies were trained to give what comes after the head.
    trained = "stolen_from" in checkpoint and checkpoint.get("settings", {}).get("attack") != "stealhead"
    if asked == "answers" and not trained:
        raise UserError(f"{path} was not trained to give a victim's answers: give --output representation")
    return asked or ("answers" if trained else "representation")


@script
def main() -> None:
    command = parse()
    export = command[Export]
    path = finding.locate(command.encoder, export.checkpoint_dir)
    checkpoint = read_checkpoint(path)
    finding.check_finished(checkpoint, path)
    encoder = encoder_of(checkpoint, path)
    output = choose_output(export.output, checkpoint, path)
    network = ExportedEncoder(encoder, output, export.size or encoder.input_size or 32)
    form = EXPORT_FORMATS[export.format]
    out = export.out or finding.home_of(path, export.checkpoint_dir) / f"{output}{form.suffix}"
    difference = write_export(network, export.format, out, export.input_name)
    side = f"{network.size} x {network.size}" if form.graph else "any size"
    mapped = "" if network.width == encoder.dim else f" (the representation has {encoder.dim}: --output representation)"
    print(f"{output} of {network.width} numbers{mapped} for images of {side}, float in [0, 1]")
    print(f"the file differs from the encoder by at most {difference:.1e} of the largest number")
    print(f"exported: {relative(out)}")


if __name__ == "__main__":
    main()
