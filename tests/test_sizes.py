"""The size of images: --size of every script, what follows from it, and what is recorded of it."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
import yaml

import detect
import legitimate
import linear_eval
import run
import steal
import stealhead
import steallabels
import verify
from data_aug import folders
from data_aug.datasets import DATASETS, SIZE, load_dataset
from data_aug.sizes import source_size
from evaluation.test_images import load_test
from models import SimCLREncoder, load_encoder, read_checkpoint
from tests.conftest import call_main, made
from tests.test_settings import SCRIPTS
from training.record import Record, named_size
from utils import UserError
from victim import digest_tensor

SIDE, OTHER = 48, 40
CPU = ("--device", "cpu")
TRAIN = ("--dataset", "shapes", "--arch", "resnet10w32", "--num-train", "64", "--epochs", "1", "-b", "32", *CPU)
QUERIES = ("--datasetsteal", "svhn", "--num_queries", "24", "--epochs", "1", "-b", "6", *CPU)
COPY = (*QUERIES, "--archstolen", "resnet10w32", "--losstype", "mse")
JUDGE = ("--dataset-test", "mnist", "-n", "40", "--probe-epochs", "2", *CPU)
FEW = ("--num-test", "30", "--num-train", "30", "--components", "1")


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """The embedded data set takes a second to draw: once is enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "shapes", functools.cache(DATASETS["shapes"]))
        yield


@pytest.fixture(scope="module")
def home(data, tmp_path_factory):
    """A victim of 48 pixels, and without a further --size a copy of it and its classifier: their folder and files."""
    folder = tmp_path_factory.mktemp("sizes")
    assert call_main(run, data, folder, *TRAIN, "--size", SIDE) == 0
    (victim,) = folder.rglob("victim-*/checkpoint.pth.tar")
    assert call_main(steal, data, folder, *COPY, "--victim", victim) == 0
    (copy,) = victim.parent.glob("stolen-*/checkpoint.pth.tar")
    assert call_main(linear_eval, data, folder, *JUDGE, "--modeltype", "victim", "--victim", victim, "--save") == 0
    return SimpleNamespace(folder=folder, victim=victim, copy=copy)


@pytest.fixture
def sides(monkeypatch):
    """The sizes of all batches that encoders are given, before they resize anything."""
    seen, forward = set(), SimCLREncoder.forward

    def recorded(self, images):
        seen.add(tuple(images.shape[-2:]))
        return forward(self, images)

    monkeypatch.setattr(SimCLREncoder, "forward", recorded)
    return seen


SCRIPTS_HERE = {
    "run": (run, TRAIN),
    "watermarked": (run, (*TRAIN, "--watermark", "True")),
    "marked": (run, ("--sslguard", "{victim}", "--epochs", "1", "--num-train", "4", *CPU)),
    "steal": (steal, (*COPY, "--victim", "{victim}", "--n-views", "2")),
    "of-few-buckets": (steal, (*COPY, "--victim", "{victim}", "--defence", "buckets", "--bucket-cells", "centred")),
    "own-simclr": (steal, ("--attack", "own-simclr", *COPY[:-2], "--victim", "{victim}")),
    "k-centre": (steal, (*COPY, "--victim", "{victim}", "--query-order", "k-centre", "--useaug")),
    "stealhead": (stealhead, (*COPY, "--victim", "{victim}", "--epochshead", "1")),
    "steallabels": (steallabels, (*COPY[:-2], "--victim", "{victim}", "--dataset-test", "mnist")),
    "linear_eval": (linear_eval, (*JUDGE, "--stolen", "{copy}", "--fidelity", "--independent", "random")),
    "random": (linear_eval, (*JUDGE, "--modeltype", "random", "--arch", "resnet10w32")),
    "finetune": (linear_eval, (*JUDGE, "--stolen", "{copy}", "--finetune", "-b", "8")),
    "legitimate": (
        legitimate,
        ("--victim", "{victim}", "--dataset-test", "mnist", "--num_queries", "40", "--epochs", "2", *CPU),
    ),
    "verify": (
        verify,
        ("--method", "dataset-inference", "--victim", "{victim}", "--suspect", "{copy}", *FEW, *CPU),
    ),
    "detect": (
        detect,
        (
            *("--victim", "{victim}", "--dataset", "mnist", "--dataset-users", "svhn", "--streams", "2"),
            *("--stream-length", "10", "--user-classes", "9", "--sybils", "2", "--classifier-images", "50", *CPU),
        ),
    ),
}


LONG = ("watermarked", "marked")  # these train with shapes' own test images too
ROWS = [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in SCRIPTS_HERE]


@pytest.mark.parametrize("name", ROWS)
def test_every_script_shows_images_of_the_size_asked_for(name, call, home, sides, tmp_path):
    """At the size of the victim's file, without a flag, and at another by --size."""
    module, line = SCRIPTS_HERE[name]
    words = [str(word).format(victim=home.victim, copy=home.copy) for word in line]
    known = SIZE if name in ("run", "watermarked", "random") else SIDE  # there no file says anything
    folder = tmp_path if module is run else home.folder
    for more, side in (((), known), (("--size", OTHER), OTHER)):
        sides.clear()
        code, _, err = call(module, *words, *more, folder=folder)
        assert (code, sides) == (0, {(side, side)}), err


def test_what_is_made_says_its_size(home):
    victim, copy = home.victim, home.copy
    for path in (victim, copy):
        checkpoint = read_checkpoint(path)
        assert (checkpoint["input_size"], checkpoint["settings"]["size"]) == (SIDE, SIDE)
        assert load_encoder(path).input_size == SIDE
        assert yaml.safe_load((path.parent / "config.yml").read_text())["settings"]["size"] == SIDE
    assert victim.parent.name.endswith("-numtrain=64-size=48")
    assert "-size" not in copy.parent.name  # the folder above says it
    assert Record.of(read_checkpoint(copy)).size == SIDE


def test_a_copy_of_another_size_than_its_victim(call, home):
    code, out, err = call(steal, *COPY, "--victim", home.victim, "--size", "32", folder=home.folder)
    assert code == 0, err
    copy = read_checkpoint(made(out))
    assert (copy["input_size"], Record.of(copy).size) == (32, 32)
    assert "-size=32" in made(out)
    code, _, err = call(linear_eval, *JUDGE, "--stolen", made(out), folder=home.folder)
    assert code == 0, err
    row = json.loads((home.folder / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    assert (row["size"], row["queries"]) == (32, 24)


def test_the_size_decides_between_victims_of_several(call, home, tmp_path):
    """Runs that differ by nothing else."""
    flags = ("--dataset", "shapes", "--arch", "resnet10w32", "--epochstrain", "1", "--lossvictim", "infonce")
    folder = tmp_path / "both"
    for size in ("16", "24"):
        assert call(run, *TRAIN, "--size", size, folder=folder)[0] == 0
    code, _, err = call(steal, *COPY, *flags, folder=folder)
    assert code == 2
    assert "2 victim encoders fit" in err
    assert "size=16" in err
    assert "size=24" in err
    code, out, err = call(steal, *COPY, *flags, "--size", "24", folder=folder)
    assert code == 0, err
    assert "size=24" in made(out)


def test_a_run_is_not_resumed_at_another_size(call, refused, tmp_path):
    line = (*TRAIN, "--run-dir", tmp_path / "here")
    assert call(run, *line, "--size", "16")[0] == 0
    assert "was begun with size 16, not 24: leave out --resume" in refused(run, *line, "--size", "24", "--resume")
    assert "was begun with size 16, not 32: leave out --resume" in refused(run, *line, "--resume")
    assert call(run, *line, "--size", "16", "--resume")[0] == 0


def test_runs_from_before_there_were_sizes_are_of_the_usual_one(call, refused, tmp_path):
    line = (*TRAIN, "--run-dir", tmp_path / "here")
    assert call(run, *line)[0] == 0
    config = tmp_path / "here" / "config.yml"
    content = yaml.safe_load(config.read_text())
    assert content["settings"].pop("size") == SIZE
    config.write_text(yaml.safe_dump(content))
    assert call(run, *line, "--resume")[0] == 0
    config.write_text(yaml.safe_dump(content))
    assert "was begun with size 32, not 24" in refused(run, *line, "--size", "24", "--resume")


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
@pytest.mark.parametrize("size", ["7", "4097", "native", "32.5", ""])
def test_a_size_that_cannot_be_is_a_line_and_exit_code_2(module, size, capsys):
    with pytest.raises(SystemExit) as stop:
        module.parse([*SCRIPTS[module].split(), f"--size={size}"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"--size: {size!r} is not a whole number of at least 8 and of at most 4096" in err
    assert err.count("\n") == 1


# ---- images ----


@pytest.mark.parametrize("name", ["shapes", "textures", "npz", "folder"])
@pytest.mark.parametrize("size", [16, 48])
def test_data_sets_are_read_at_any_size(name, size, write_npz, data):
    name = {"npz": f"npz:{write_npz()}", "folder": f"folder:{data / 'imagenet'}"}.get(name, name)
    images, labels = load_dataset(name, split="test", size=size)
    assert images.shape == (len(labels), 3, size, size)
    usual = load_dataset(name, split="test")[0]
    means = [part[:8].float().mean(dim=(2, 3)) for part in (images, usual)]
    torch.testing.assert_close(*means, rtol=0.05, atol=6)  # the same images


def test_views_of_2022_are_cut_from_stl10_s_own_size():
    assert source_size("stl10", 48, wide=True) is None
    assert source_size("stl10", 48, wide=False) == source_size("cifar10", 48, wide=True) == 48


def test_queried_images_are_known_again_at_another_size(write_npz):
    name = f"npz:{write_npz(test=20)}"
    sent = load_dataset(name, split="test", size=48)[0][:4]
    for size in (32, 48, 64):
        record = Record(query_set={"images": 4, **named_size(48)}, query_digests=digest_tensor(sent))
        images, _, left_out = load_test(name, ".", record, size=size)
        assert left_out == 4
        assert torch.equal(images, load_dataset(name, split="test", size=size)[0][4:])
    assert named_size(SIZE) == {}
    assert Record().size == SIZE


def test_more_images_than_half_of_the_memory_are_refused(write_npz, data, monkeypatch):
    monkeypatch.setattr(folders, "WORTH_ASKING", 0)
    path, pictures = f"npz:{write_npz(train=50)}", f"folder:{data / 'imagenet'}"
    for name, count in ((path, 50), (pictures, 24)):
        monkeypatch.setattr(folders, "free_memory", lambda count=count: 2 * 3 * count * 64**2)
        assert len(load_dataset(name, size=64)[0]) == count
        with pytest.raises(
            UserError, match=rf"^{count} images of 65 x 65 pixels take .* give a smaller --size"
        ) as said:
            load_dataset(name, size=65)
        assert "\n" not in str(said.value)
    monkeypatch.setattr(folders, "free_memory", lambda: None)  # where it is not known, nothing is refused
    assert len(load_dataset(path, size=65)[0]) == 50


def test_free_memory_is_that_of_the_machine():
    free = folders.free_memory()
    assert free is None or 2**20 < free < 2**50
