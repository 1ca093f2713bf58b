"""The rotation watermark: how images are turned, that it is learnt, and that it leaves everything else as it was."""

import copy
import re

import pytest
import torch
from torchvision.transforms.functional import rotate as slow_rotate

import linear_eval
import run
import steal
from data_aug.augment import rotate
from data_aug.images import Stored
from data_aug.shapes import make_shapes
from defenses.watermark import WatermarkMLP, draw_turns, half_turns, read_watermark, watermark_scores
from loss import TRAIN_LOSSES
from models import build_encoder, read_checkpoint
from simclr import SimCLR
from tests.conftest import JUDGE, SMALL, STEAL, VICTIM, made
from tests.networks import FP32, same, small_encoder
from training.recipe import Recipe
from training.run import Run
from utils import UserError, generator, seeded


def lit(split, number, seed=0):
    """Embedded images lit from above. As drawn they point anywhere: nobody could tell how they were turned."""
    images, labels = make_shapes(split, number, seed)
    return (images * torch.linspace(1, 0.2, 32).view(1, 1, 32, 1)).byte(), labels


def trainer(folder, arch=None, marked=True, resume=False, **values):
    """A trainer of a small encoder, or of one of this architecture, and of an MLP where it is to be marked."""
    with seeded(0):
        model = build_encoder(arch, 16) if arch else small_encoder(16)
        mlp = WatermarkMLP(model.dim) if marked else None
    recipe = Recipe(**{"epochs": 1, "batch_size": 4, "lr": 2e-3, **values})
    return SimCLR(model, TRAIN_LOSSES["infonce"], recipe, Run(folder, FP32, resume=resume), mlp)


# ---- turning ----


def test_images_are_turned_as_torchvision_turns_each(images):
    degrees = 360 * torch.rand(len(images), generator=generator(0, "test"))
    for image, turned, angle in zip(images, rotate(images, degrees), degrees.tolist(), strict=True):
        expected = slow_rotate(image, angle).float() / 255
        # Where a sample falls between two pixels, rounding picks either.
        assert (turned != expected).float().mean() < 0.01


def test_half_turns_are_of_the_halves_that_the_labels_say():
    """Measured on a spot to the right of the centre: counter-clockwise, it goes up first."""
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 14:18, 26:30] = 255
    turned, half = half_turns(images, draw_turns(200, generator(0, "test")))
    y, x = torch.meshgrid(15.5 - torch.arange(32), torch.arange(32) - 15.5, indexing="ij")
    mass = turned.mean(dim=1)
    angle = torch.atan2((mass * y).sum(dim=(1, 2)), (mass * x).sum(dim=(1, 2))).rad2deg() % 360
    clear = ((angle % 180) - 90).abs() < 85  # 5 degrees from the border: the spot is of whole pixels
    assert half.tolist() == [0] * 200 + [1] * 200
    assert torch.equal((angle >= 180).long()[clear], half[clear])
    for part in (angle[:200], angle[200:] - 180):
        assert torch.histc(part, 6, 0, 180).min() > 15  # all angles come up


def test_turned_images_follow_from_the_generator(images):
    first, second, other = (half_turns(images, draw_turns(12, generator(seed, "test")))[0] for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_each_image_has_an_angle_in_each_half():
    """An epoch's table: a row for each image and half, every row a draw of its own."""
    degrees = draw_turns(1000, generator(0, "test"))
    assert degrees.shape == (2000,)
    first, second = degrees.view(2, -1)
    assert ((first >= 0) & (first < 180)).all()
    assert ((second >= 180) & (second < 360)).all()
    for angles in (first, second - 180):
        assert angles.mean().item() == pytest.approx(90, abs=4 * 52 / 1000**0.5)
        assert len(angles.unique()) > 990
    assert not torch.equal(first, second - 180)


def test_the_angles_of_an_epoch_are_those_of_its_images(tmp_path, images, monkeypatch):
    """What each image is turned by follows from the seed, the epoch and the image, not from its place in a batch."""
    turned = {}

    def spy(batch, degrees):
        turned.update({image.numpy().tobytes(): pair for image, pair in zip(batch, degrees.view(2, -1).T, strict=True)})
        return half_turns(batch, degrees)

    monkeypatch.setattr("defenses.watermark.half_turns", spy)
    seen = []
    for size, epochs in ((4, 1), (6, 1), (4, 2)):
        trainer(tmp_path / f"{size}-{epochs}", epochs=epochs, batch_size=size).train(Stored(images))
        seen.append(torch.stack([turned[image.numpy().tobytes()] for image in images]))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], draw_turns(12, generator(0, "turns", 0)).view(2, -1).T)
    assert torch.equal(seen[2], draw_turns(12, generator(0, "turns", 1)).view(2, -1).T)


# ---- training ----


def test_run_trains_the_mlp_and_keeps_it(call, tmp_path):
    """In the 2022 code its parameters never changed."""
    arguments = ("--dataset", "cifar10", "--epochs", "1", "-b", "32", "--arch", "resnet10w32", "--device", "cpu")
    code, out, err = call(run, *arguments, "--watermark", "True")
    assert code == 0, err
    assert "Watermark accuracy is" in out
    path = next(tmp_path.rglob("checkpoint.pth.tar"))
    with seeded(0):
        untrained = WatermarkMLP(build_encoder("resnet10w32", 128).dim).state_dict()
    trained = read_watermark(read_checkpoint(path), str(path)).state_dict()
    for name in untrained:
        assert (trained[name] - untrained[name]).abs().max() > 1e-4, name


def test_the_mlp_learns_to_read_images_that_it_never_saw(tmp_path):
    job = trainer(tmp_path, epochs=8, batch_size=16)
    job.train(Stored(lit("train", 128)[0]))
    test = lit("test", 200)[0]
    right, probability = watermark_scores(job.model, job.companion, test, FP32)
    assert right.float().mean() > 0.75
    by_chance, _ = watermark_scores(small_encoder(seed=7), job.companion, test, FP32)
    assert by_chance.float().mean() < 0.65
    assert right.shape == probability.shape == (400,)
    assert torch.equal(right, probability > 0.5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_any_resnet_takes_a_watermark(arch, tmp_path, images):
    job = trainer(tmp_path, arch, batch_size=2)
    before = copy.deepcopy(job.companion.state_dict())
    job.train(Stored(images[:2]))
    assert all(not torch.equal(before[name], value) for name, value in job.companion.state_dict().items())
    right, _ = watermark_scores(job.model, job.companion, images[:2], FP32)
    assert right.shape == (4,)


def test_the_mark_is_in_the_encoder_too(tmp_path, images):
    """The encoder itself is trained by the MLP's loss, not only read by it."""
    jobs = [trainer(tmp_path / str(marked), marked=marked) for marked in (True, False)]
    for job in jobs:
        job.train(Stored(images))
    assert not same(*(job.model.state_dict() for job in jobs))


def test_a_watermark_leaves_the_views_as_they_were(tmp_path, images):
    shown = []
    for marked in (True, False):
        job = trainer(tmp_path / str(marked), marked=marked, epochs=2)
        project, seen = job.model.project, []
        job.model.project = lambda views, project=project, seen=seen: (seen.append(views.clone()), project(views))[1]
        job.train(Stored(images))
        shown.append(torch.stack(seen))
    assert shown[0].shape == (6, 8, 3, 32, 32)
    assert torch.equal(*shown)


class Killed(Exception):
    pass


def test_a_resumed_watermark_is_bit_identical(tmp_path, images):
    whole = trainer(tmp_path / "whole", epochs=3)
    whole.train(Stored(images))
    cut = trainer(tmp_path / "cut", epochs=3)
    project, calls = cut.model.project, []

    def dies(views):
        if len(calls) == 4:  # the second batch of the second epoch
            raise Killed
        calls.append(views)
        return project(views)

    cut.model.project = dies
    with pytest.raises(Killed):
        cut.train(Stored(images))
    assert read_checkpoint(tmp_path / "cut" / "checkpoint.pth.tar")["epoch"] == 1
    trainer(tmp_path / "cut", epochs=3, resume=True).train(Stored(images))
    ends = [read_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("whole", "cut")]
    for key in ("state_dict", WatermarkMLP.checkpoint_key):
        assert same(*(end[key] for end in ends)), key


# ---- reading ----


def test_mlps_of_the_2022_code_are_read_and_other_files_refused():
    mlp = WatermarkMLP(8)
    read = read_watermark({"mlp_state_dict": mlp.state_dict()}, "old.pth.tar")
    assert same(read.state_dict(), mlp.state_dict())
    assert not read.training
    for content, message in (
        ({"state_dict": {}}, "old.pth.tar holds no watermark MLP"),
        ({WatermarkMLP.checkpoint_key: {"weight": torch.ones(2)}}, "something other than a watermark MLP: weight"),
    ):
        with pytest.raises(UserError, match=message):
            read_watermark(content, "old.pth.tar")


def test_scores_are_of_the_same_turned_images_for_every_encoder(images):
    """By the formula, in two batches, and refused for another width."""
    encoder = small_encoder(16)
    with seeded(3):
        mlp = WatermarkMLP(encoder.dim)
    many = images.repeat(50, 1, 1, 1)
    right, probability = watermark_scores(encoder, mlp, many, FP32, seed=5)
    draws, expected = generator(5, "watermark test"), []
    for part in (many[:500], many[500:]):
        turned, half = half_turns(part, draw_turns(len(part), draws))
        with torch.no_grad():
            odds = mlp(encoder.eval()(turned)).softmax(dim=1)
        expected.append(odds[torch.arange(len(half)), half].view(2, -1))
    torch.testing.assert_close(probability, torch.cat(expected, dim=1).flatten(), rtol=1e-3, atol=1e-4)
    assert right.dtype == torch.bool
    with pytest.raises(UserError, match="gives representations of 32 numbers, the victim's watermark reads 7:"):
        watermark_scores(encoder, WatermarkMLP(7), images, FP32)


def test_a_watermarked_victim_is_stolen_and_its_copy_read(call, refused, trained, tmp_path):
    """--watermark names the victim, and the MLP is tried on the copy; with no such victim, or no MLP, it is refused."""
    assert "watermark True" in refused(steal, *STEAL, "--watermark", "True")
    plain = next(tmp_path.rglob("victim-cifar10-*infonce*seed0*/checkpoint.pth.tar"))
    assert "holds no watermark MLP" in refused(steal, *STEAL, "--watermark", "True", "--victim", plain)
    train = ("--dataset", "cifar10", "--epochs", "1", "-b", "32", *SMALL)
    assert call(run, *train, "--watermark", "True")[0] == 0
    code, out, err = call(steal, *STEAL, "--watermark", "True", "--defence", "noise")
    assert code == 0, err
    lines = out.splitlines()
    victims, watermark = ([line for line in lines if line.startswith(word)] for word in ("victim: ", "Water"))
    assert ["watermark=True" in line for line in victims] == [True]
    assert [line.startswith("Watermark accuracy is") for line in watermark] == [True]
    assert WatermarkMLP.checkpoint_key not in read_checkpoint(made(out))
    other = refused(steal, *STEAL, "--watermark", "True", "--archstolen", "resnet18")
    assert "this encoder gives representations of 512 numbers, the victim's watermark reads 256" in other
    # Without the flag both victims fit.
    assert "2 victim encoders fit" in (listed := refused(steal, *STEAL))
    assert re.search(r"1\) .*2\) .*watermark", listed)
    code, out, err = call(steal, *STEAL, "--victim", "1")
    assert code == 0, err
    assert "watermark=True" not in out
    judged = call(
        linear_eval, *JUDGE, *VICTIM, "--modeltype", "victim", "--watermark", "True", "--dataset-test", "mnist"
    )
    assert judged[0] == 0
    assert "watermark=True" in judged[1]
