"""SSLGuard's watermark as a run and as evidence: it is put into a trained victim, and its readings become figures."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attacks import victims
from data_aug.datasets import load_dataset, load_training
from data_aug.images import Stored
from defenses.sslguard import READ, RECIPE, Mark, SSLGuard, check_fits, mark_cosines, mark_line, read_mark
from defenses.watermark import EARLIER_KEY, WatermarkMLP
from evaluation.candidates import (
    Candidate,
    Figures,
    Measured,
    OwnershipTest,
    dataset_of,
    in_victims_coordinates,
    unseen_images,
)
from evaluation.statistics import cohens_d, further_draw, paired_t, sign_test
from files.reading import checked, number, optional
from loss import TRAIN_LOSSES
from models import ARCHITECTURES, SimCLREncoder, build_copy
from settings import Command
from simclr import SimCLR
from training.finding import home_of
from training.recipe import Recipe
from training.run import Run, open_run, relative
from utils import Precision, UserError, seeded
from victim import version_of


def use_marking(command: Command) -> Command:
    """Put into force what `mark_victim` reads. UserError for a flag that has no effect on a trained victim."""
    command.use(SSLGuard)
    command.use(Recipe, RECIPE, seed=command.seed)
    idle = [name for name in command.given if name == "recipe" or command.why_idle(name)]
    command.refuse_idle(**dict.fromkeys(idle, "with --sslguard"))
    return command


def mark_victim(command: Command, precision: Precision) -> None:
    """Put SSLGuard's watermark into the victim that --sslguard names: a victim of its own, in a run below it."""
    opened = victims.open_victim(command)
    path, checkpoint, clean = opened.source, opened.checkpoint, opened.encoder
    known = checked(
        checkpoint.get("settings", {}),
        {"num_train": optional(number(whole=True, at_least=1)), "seed": number(whole=True)},
        f"{path}: settings",
    )
    if "dataset" not in command.settled:
        raise UserError(f"{path} does not say which data set it was trained on: give --dataset NAME")
    if command.optimizer != "sgd":
        raise UserError(f"SSLGuard's learning rates are SGD's: leave out --optimizer {command.optimizer}")
    command.set(
        losstype=command.lossvictim or victims.OTHER,
        num_train=command.given.get("num_train", known.get("num_train")),
    )
    if command.num_train and known.get("seed", command.seed) != command.seed:
        raise UserError(f"{path} was trained on images chosen by seed {known['seed']}: give --seed {known['seed']}")
    loss = TRAIN_LOSSES.get(command.losstype)
    labelled = loss is not None and loss.needs_labels
    chosen = {"number": command.num_train, "seed": command.seed, "size": command.size}
    images, _, split = load_training(command.dataset, command.data, labelled, **chosen)
    run, mark = _open(command, path, clean, images, precision)
    run.record.images = len(images)
    amount = f"{len(images)} images of {command.dataset} ({split})"
    print(f"victim: {clean.arch} with SSLGuard's watermark, {amount}, {precision}")
    print(command.line())
    model = copy.deepcopy(clean)
    trainer = SimCLR(model, loss, command[Recipe], run, mark)
    # A rotation watermark is read by the clean victim's MLP.
    trainer.kept = {name: checkpoint[name] for name in (WatermarkMLP.checkpoint_key, EARLIER_KEY) if name in checkpoint}
    trainer.mark(Stored(images), clean)
    test, _ = load_dataset(command.dataset, command.data, "test", command.size)
    print(mark_line(model, mark.eval(), test, precision))
    print(f"victim: {relative(run.checkpoint)}")
    victims.say_steal(command, run.folder, clean, command.dataset)


def _open(command: Command, path: Path, clean: SimCLREncoder, images: Tensor, precision: Precision) -> tuple[Run, Mark]:
    """The run, and a new mark for images (N, 3, H, W) with an untrained shadow."""
    with seeded(command.seed, "sslguard"):
        arch = clean.arch if clean.arch in ARCHITECTURES else "resnet50"
        shadow = build_copy(arch, clean.dim, clean.normalize, input_size=clean.input_size)
        mark = Mark(clean.dim, images.shape[2:], shadow, command[SSLGuard])
    command.suffix = "sslguard"
    more = {"victim": str(path), "weights": version_of(clean), "arch": clean.arch, "losstype": command.losstype}
    return open_run(command, home_of(path, command.checkpoint_dir), precision, **more), mark


# ---- evidence --------------------------------------------------------------------------------------------------------


def measure_mark(
    test: OwnershipTest, root: Path, candidates: Sequence[Candidate], precision: Precision, seed: int
) -> tuple[Callable[[Candidate], Measured], dict[str, int]]:
    """Measures the key's cosines on test images with the trigger (N,), and on the same images without it (N,)."""
    victim = candidates[0]
    mark = read_mark(victim.checkpoint, str(victim.path))
    for candidate in candidates[:1] if test.align else candidates:
        check_fits(mark, candidate.encoder, str(candidate.path))
    images = unseen_images(test, dataset_of(test, victim), root, candidates)
    images, encoder_of, counts = in_victims_coordinates(test, images, candidates, precision, seed)

    def measure(candidate: Candidate) -> Measured:
        return mark_cosines(encoder_of(candidate), mark, images, precision)

    return measure, {"test_images": len(images), **counts}


def judge_mark(measured: Measured, others: Sequence[Measured]) -> Figures:
    """Share in percent, mean cosine, effect size and p-values of the key's cosines; `others`: independent encoders'.

    share: of images with the trigger, those whose cosine is above 0.5, the published figure. p_binomial: images above
    0.5 with the trigger only, against those without it only. p_t: the paired t-test of the cosines with the trigger
    against each image's mean over `others`. p_encoders: `further_draw` of their mean; shares of innocent encoders are
    often all 0. effect: Cohen's d of the cosines against those of `others`, or else those of the images without it.
    """
    triggered, plain = measured
    read, also = triggered > READ, plain > READ
    figures = {"share": 100 * read.double().mean().item(), "key_cosine": triggered.double().mean().item()}
    figures["effect"] = cohens_d(triggered, torch.cat([rows for rows, _ in others]) if others else plain)
    figures["p_binomial"] = sign_test((read & ~also).sum().item(), (also & ~read).sum().item())
    if others:
        figures["p_t"] = paired_t(triggered, sum(rows for rows, _ in others) / len(others))
    if len(others) > 1:
        figures["p_encoders"] = further_draw(figures["key_cosine"], [rows.double().mean().item() for rows, _ in others])
    return figures
