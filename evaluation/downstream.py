"""An encoder's scores on a downstream data set, by a probe, the protocol of the 2022 code or fine-tuning."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data_aug.datasets import DATASET_NAMES, canonical_name, check_apart, check_name, load_labelled, take_balanced
from data_aug.images import Stored
from evaluation.encoders import independent_of, victim_of
from evaluation.fidelity import compare, untrained_like
from evaluation.maps import plane_map
from evaluation.probes import Labelled, Probe, Space, classes_of, represent_both, scores_by, top1_top5
from evaluation.released import TEST_BATCH, released_probe
from evaluation.test_images import load_test
from loss import TRAIN_LOSSES
from models import SimCLREncoder
from settings import Command, Settings, setting
from simclr import SimCLR
from training.recipe import Recipe
from training.record import Record
from training.represent import represent
from training.run import Run
from utils import Precision, UserError, seeded

Others = dict[str, tuple[str, SimCLREncoder]]  # a copy's victim and an independent encoder, each with its name


# ---- settings --------------------------------------------------------------------------------------------------------


def _released(command: Command) -> str | None:
    return "with --recipe released" if command.recipe == "released" else None


def instead_of_probe(command: Command) -> str | None:
    """Why no probe of frozen representations is trained; None where it is."""
    return _released(command) or ("with --finetune" if command.finetune else None)


def _without_layer(command: Command) -> str | None:
    return instead_of_probe(command) or (f"with --probe {command.probe}" if command.probe != "linear" else None)


def _without_copy(command: Command) -> str | None:
    if command.modeltype != "stolen":
        return f"with --modeltype {command.modeltype}: only a copy has a victim"
    return instead_of_probe(command)


@dataclass(frozen=True)
class Downstream(Settings):
    """The images on which an encoder is judged, and what else is done."""

    dataset_test: str = setting(
        "cifar10",
        f"downstream data set: {DATASET_NAMES}",
        read=check_name,
        flags=("-dataset-test", "--dataset-test"),
        title="data",
    )
    num_labeled: int = setting(
        50000,
        "number of labelled images, class-balanced (released: the first)",
        at_least=2,
        flags=("-n", "--num-labeled"),
        title="data",
    )
    num_test: int | None = setting(
        None, "use the last N test images", at_least=1, otherwise="all that the copy cannot have queried", title="data"
    )
    finetune: bool = setting(False, "fine-tune the whole encoder on the labelled images instead", acts=_released)
    save: bool = setting(False, "save the classifier, encoder and linear layer, in a checkpoint", acts=_without_layer)
    map_images: int = setting(
        0,
        "keep a plane map (t-SNE) of the representations of the first N test images in the row, with --fidelity the "
        "victim's too",
        at_least=0,
        acts=instead_of_probe,
    )
    fidelity: bool = setting(False, "compare the copy with its victim", acts=_without_copy, title="fidelity")
    independent: str | None = setting(
        None,
        "independent encoder to compare the copy with: `random` (untrained), or its checkpoint, run folder or run name",
        otherwise="another victim of the same data set and architecture, for example of another seed",
        named=False,
        acts=lambda command: None if command.fidelity else "without --fidelity",
        title="fidelity",
    )
    title = "probe"


# ---- opening ---------------------------------------------------------------------------------------------------------


def load_images(command: Command, root: Path, checkpoint: Mapping) -> tuple[Labelled, Labelled, int]:
    """Labelled training and test images, and how many of the latter were left out, because the copy queried them.

    A copy whose file does not say what it queried is tested on the images that the 2022 code never queries, unless
    --dataset says that its victim is of another data set. UserError as by `check_apart`.
    """
    chosen: Downstream = command[Downstream]
    name = chosen.dataset_test
    check_apart(name, str(checkpoint.get("settings", {}).get("dataset", name)), root)
    images, labels = load_labelled(name, root, "train", command.size)
    if command.recipe == "released":
        images, labels = images[: chosen.num_labeled], labels[: chosen.num_labeled]
    elif chosen.num_labeled < len(labels):
        index = take_balanced(labels, chosen.num_labeled, command.seed)
        images, labels = images[index], labels[index]
    if len(labels.unique()) < 2:
        raise UserError(f"the labelled images of {name} are all of one class: choose another data set")
    record = Record.of(checkpoint)
    silent = command.modeltype == "stolen" and record.query_set is None
    silent &= canonical_name(command.given.get("dataset", name), root) == canonical_name(name, root)
    last_thousand = silent or (command.recipe == "released" and name != "stl10")
    tested = {"number": chosen.num_test, "last_thousand": last_thousand, "size": command.size}
    *test, left_out = load_test(name, root, record, **tested)
    if silent and chosen.num_test is None:
        print(f"the file does not say what was queried: tested on the last {len(test[1])} test images (--num-test)")
    return (images, labels), tuple(test), left_out


def open_others(command: Command, path: Path, checkpoint: Mapping, precision: Precision) -> Others:
    """The victim of a copy and an independent encoder, on the device; empty without --fidelity."""
    if not command.fidelity:
        return {}
    victim_path, victim = victim_of(command, path, checkpoint)
    name, independent = independent_of(command, victim_path, victim)
    device = precision.device
    return {"victim": (str(victim_path), victim.to(device)), "independent": (name, independent.to(device))}


# ---- judging ---------------------------------------------------------------------------------------------------------


def judge_encoder(
    command: Command, encoder: SimCLREncoder, train: Labelled, test: Labelled, others: Others, run: Run
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Scores on labelled images, compared with `others` where there are any, and the state_dict to save."""
    probe: Probe = command[Probe]
    precision, seed = run.precision, command.seed

    def each_epoch(epoch: int, scores: dict[str, float]) -> None:
        run.log(epoch + 1, {"epoch": epoch, **scores})

    if _released(command):
        settings = {"epochs": probe.probe_epochs, "batch_size": probe.batch_size, "each_epoch": each_epoch}
        settings["test_batch_size"] = 2 * probe.batch_size if command.dataset_test == "stl10" else TEST_BATCH
        return released_probe(encoder, train, test, probe.lr, precision, seed=seed, **settings), {}
    if command.finetune:
        return finetuned_scores(encoder, train, test, probe, run, seed), {}
    space = represent_both(encoder, train, test, precision)
    scores, state = scores_by(probe, *space, seed, each_epoch)
    if command.save:  # the weights without the head, by the keys of the 2022 code
        weights = {key.removeprefix("backbone."): value.cpu() for key, value in encoder.state_dict().items()}
        state |= {key: value for key, value in weights.items() if not key.startswith("fc.")}
    spaces: dict[str, Space] = {}
    if others:
        spaces = {name: represent_both(other, train, test, precision) for name, (_, other) in others.items()}
        # A head of another width maps to no victim: that of an encoder of the attacker's own.
        to_victim = encoder.has_head and encoder.out_dim == others["victim"][1].dim
        head = encoder.backbone.fc if to_victim else None
        untrained = untrained_like(others["victim"][1], seed)
        random = None if untrained is None else represent(untrained.to(precision.device), test[0], precision)
        scores |= compare({"copy": space, **spaces}, seed, head, random)
        scores["independent"] = others["independent"][0]
    if command.map_images:
        scores["map"] = _maps({"encoder": space, **spaces}, command.map_images, seed)
    return scores, state


def _maps(spaces: Mapping[str, Space], count: int, seed: int) -> dict[str, list]:
    """Maps of the first test images by the encoder and, where it is known, by its victim; and their labels."""
    maps = {name: plane_map(spaces[name][1][0][:count], seed) for name in ("encoder", "victim") if name in spaces}
    return {**maps, "labels": spaces["encoder"][1][1][:count].tolist()}


def finetuned_scores(
    encoder: SimCLREncoder, train: Labelled, test: Labelled, probe: Probe, run: Run, seed: int
) -> dict[str, float]:
    """Scores after fine-tuning a copy of the encoder with a linear layer on the labelled images."""
    model = copy.deepcopy(encoder).requires_grad_(True)
    with seeded(seed, "probe"):
        model.backbone.fc = nn.Linear(model.dim, classes_of(train, test))
    batch_size = min(probe.batch_size, len(train[1]))
    recipe = Recipe(probe.probe_epochs, batch_size, probe.lr, weight_decay=8e-4, seed=seed)
    trainer = SimCLR(model, TRAIN_LOSSES["supervised"], recipe, run.below("finetuned", "finetuned"))
    trainer.train(Stored(train[0]), train[1], views=1)
    logits = represent(model, test[0], run.precision, output=model.project)
    return top1_top5(logits, test[1].to(run.precision.device))
