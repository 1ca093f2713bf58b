"""Checkpoints of the 2022 code, whose folders and files have names that say how they were made.

200resnet34infonceTRAIN/cifar10_checkpoint_200_infonce.pth.tar      a victim
100resnet34mseSTEAL/stolen_checkpoint_9000_mse_svhn.pth.tar         a copy (DEFENCE: of a defended victim; STEALWVICH:
                                                                    through the victim's head)
100resnet34STEALHEAD/stolen_checkpoint_100_infonce.pth.tar          a copy by stealhead.py
logs/checkpoint_imagenet_infonce_100000.pth.tar                     a copy by stealsimsiam.py
"""

import re
from pathlib import Path
from typing import Any

_LOSS = r"_(?P<losstype>[a-z0-9]+)"
# For each kind of run, the names of its files.
_FILES = {
    "victim": rf"(?P<dataset>(?!stolen_)[a-z0-9]+)_checkpoint_(?P<epochs>\d+){_LOSS}(?P<watermark>WATERMARK)?",
    "stolen": rf"stolen_checkpoint_(?P<num_queries>\d+){_LOSS}_(?P<datasetsteal>[a-z0-9]+)",
    "stolen by stealhead": rf"stolen_checkpoint_(?P<epochs>\d+){_LOSS}",
    "stolen-simsiam": rf"checkpoint_(?P<datasetsteal>[a-z0-9]+){_LOSS}_(?P<num_queries>\d+)",
}
_PARTS = "TRAIN|STEAL|STEALWVICH|DEFENCE|STEALHEAD|STEALHEADDEF"
_FOLDER = re.compile(rf"(?P<epochs>\d+)(?P<arch>resnet\d\d)[a-z0-9]*?(?P<part>{_PARTS})")
_POISONED = ("infonce", "softnn")  # losses against which that code poisoned; it added noise against the others


def released_settings(path: Path, kind: str) -> dict[str, Any]:
    """The settings of a run of that kind which the names of its file and folder tell; empty for other files."""
    kinds = [name for name in _FILES if name.split()[0] == kind]
    found = next((name for name in kinds if re.fullmatch(rf"{_FILES[name]}\.pth\.tar", path.name)), None)
    if found is None:
        return {}
    said = re.fullmatch(rf"{_FILES[found]}\.pth\.tar", path.name).groupdict()
    settings = {name: int(value) if value.isdigit() else value for name, value in said.items() if value}
    folder = _FOLDER.fullmatch(path.parent.name)
    if kind == "victim":
        settings["watermark"] = "watermark" in settings
        return settings | ({"arch": folder["arch"]} if folder else {})
    if kind == "stolen":
        settings["attack"] = "stealhead" if found.endswith("stealhead") else "direct"
        if folder:
            defence = "poisoning" if settings["losstype"] in _POISONED else "noise"
            settings |= {"archstolen": folder["arch"], "epochs": int(folder["epochs"])}
            settings["victimhead"] = folder["part"] == "STEALWVICH"
            settings["defence"] = defence if "DEF" in folder["part"] else None
    return settings


def released_below(root: Path, kind: str) -> dict[Path, dict[str, Any]]:
    """The checkpoints of the 2022 code below `root` that are of this kind, with the settings known; oldest first."""
    files = sorted(root.rglob("*.pth.tar"), key=lambda path: (path.stat().st_mtime, path))
    found = {path: released_settings(path, kind) for path in files}
    return {path: settings for path, settings in found.items() if settings}
