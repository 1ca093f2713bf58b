"""Where data sets are, and the size in which their images are read."""

from dataclasses import dataclass
from pathlib import Path

from settings import Command, Settings, setting

SIZE = 32  # images are SIZE x SIZE pixels unless another size is asked for
SMALLEST, LARGEST = 8, 4096  # sides that can be asked for


@dataclass(frozen=True)
class Data(Settings):
    """Where data sets are stored, and the size in which their images are read; see `settle_size`."""

    data: Path = setting(Path("datasets"), "data root", flags=("-data", "--data"), named=False)
    size: int | None = setting(
        None,
        "side of the images in pixels: all are resized to it",
        at_least=SMALLEST,
        at_most=LARGEST,
        otherwise=f"as the victim's or encoder's file says, else {SIZE}",
        earlier=SIZE,
    )
    title = "data"


def settle_size(command: Command, said: int | None = None) -> int:
    """Settle --size where it is not given: `said` by the encoder's file (`input_size`), the script's own, or SIZE."""
    if "size" not in command.given:
        command.expected["size"] = said or command.size or SIZE
        command.set(size=command.expected["size"])
    return command.size


def source_size(name: str, size: int, wide: bool) -> int | None:
    """The size in which images are loaded: `size` or, where random views are cut from them as in 2022, STL-10's own."""
    return None if wide and name == "stl10" else size
