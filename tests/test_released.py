"""Checkpoints of the 2022 code: what their names say, and how flags find them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import linear_eval
import steal
from attacks.victims import VictimChoice
from models import build_encoder
from settings import Parser
from tests.networks import torch_resnet, with_fc
from training import finding
from training.released import released_below, released_settings
from utils import UserError, seeded

# Files of a folder of 2022: what their names say.
VICTIMS = {
    "200resnet34infonceTRAIN/cifar10_checkpoint_200_infonce.pth.tar": ("cifar10", "resnet34", 200, "infonce", False),
    "200resnet34infonceTRAIN/svhn_checkpoint_200_infonce.pth.tar": ("svhn", "resnet34", 200, "infonce", False),
    "200resnet18infonceTRAIN/cifar10_checkpoint_200_infonceWATERMARK.pth.tar": (
        *("cifar10", "resnet18", 200, "infonce", True),
    ),
    "50resnet50softnnTRAIN/stl10_checkpoint_50_softnn.pth.tar": ("stl10", "resnet50", 50, "softnn", False),
}
COPIES = {
    "100resnet34mseSTEAL/stolen_checkpoint_9000_mse_svhn.pth.tar": ("direct", "resnet34", 100, "mse", False, None),
    "100resnet18mseSTEALWVICH/stolen_checkpoint_9000_mse_svhn.pth.tar": ("direct", "resnet18", 100, "mse", True, None),
    "100resnet34mseDEFENCE/stolen_checkpoint_50_mse_svhn.pth.tar": ("direct", "resnet34", 100, "mse", False, "noise"),
    "10resnet34infonceDEFENCE/stolen_checkpoint_50_infonce_stl10.pth.tar": (
        *("direct", "resnet34", 10, "infonce", False, "poisoning"),
    ),
    "10resnet34STEALHEAD/stolen_checkpoint_10_infonce.pth.tar": ("stealhead", "resnet34", 10, "infonce", False, None),
    "10resnet34STEALHEADDEF/stolen_checkpoint_10_softnn.pth.tar": (
        *("stealhead", "resnet34", 10, "softnn", False, "poisoning"),
    ),
    "10resnet34symmetrizedSTEAL/stolen_checkpoint_9_symmetrized_cifar10.pth.tar": (
        *("direct", "resnet34", 10, "symmetrized", False, None),
    ),
}
LARGE = {"logs/checkpoint_imagenet_infonce_100000.pth.tar": ("imagenet", "infonce", 100000)}
OTHERS = (
    "200resnet34infonceTRAIN/training.log",
    "10resnet34STEALHEAD/cifar10_checkpoint_10_infonce_head.pth.tar",
    "downstream/victim_linear_cifar10.pth.tar",
    "run/checkpoint.pth.tar",
)
NAMES = {
    "victim": ("dataset", "arch", "epochs", "losstype", "watermark"),
    "stolen": ("attack", "archstolen", "epochs", "losstype", "victimhead", "defence"),
    "stolen-simsiam": ("datasetsteal", "losstype", "num_queries"),
}


@pytest.mark.parametrize(
    ("kind", "path", "values"),
    [(kind, *row) for kind, rows in zip(NAMES, (VICTIMS, COPIES, LARGE), strict=True) for row in rows.items()],
)
def test_a_name_says_how_the_file_was_made(kind, path, values):
    settings = released_settings(Path(path), kind)
    assert {name: settings[name] for name in NAMES[kind]} == dict(zip(NAMES[kind], values, strict=True))
    assert not any(released_settings(Path(path), other) for other in NAMES if other != kind)


def test_names_of_copies_say_what_was_queried():
    settings = released_settings(Path(next(iter(COPIES))), "stolen")
    assert (settings["num_queries"], settings["datasetsteal"]) == (9000, "svhn")


@pytest.fixture
def folder(tmp_path):
    """A folder with empty files of all these names."""
    for name in (*VICTIMS, *COPIES, *LARGE, *OTHERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_a_folder_has_the_files_of_each_kind(folder):
    for kind, rows in zip(NAMES, (VICTIMS, COPIES, LARGE), strict=True):
        assert {str(path.relative_to(folder)) for path in released_below(folder, kind)} == set(rows)


def find(folder, *line, **wanted):
    command = Parser("test", [VictimChoice], kind="x").parse(line)
    kind = "stolen" if "archstolen" in wanted or "defence" in wanted or "attack" in wanted else "victim"
    return str(finding.find(command, "victim", kind, wanted, folder).relative_to(folder))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"dataset": "svhn"}, "200resnet34infonceTRAIN/svhn_checkpoint_200_infonce.pth.tar"),
        ({"arch": "resnet50", "epochs": 50}, "50resnet50softnnTRAIN/stl10_checkpoint_50_softnn.pth.tar"),
        ({"watermark": True}, "200resnet18infonceTRAIN/cifar10_checkpoint_200_infonceWATERMARK.pth.tar"),
        ({"losstype": "softnn"}, "50resnet50softnnTRAIN/stl10_checkpoint_50_softnn.pth.tar"),
        # The name says nothing of the batch size, so any fits.
        ({"defence": "noise", "batch_size": 64}, "100resnet34mseDEFENCE/stolen_checkpoint_50_mse_svhn.pth.tar"),
        ({"attack": "stealhead", "defence": None}, "10resnet34STEALHEAD/stolen_checkpoint_10_infonce.pth.tar"),
        (
            {"archstolen": "resnet18", "victimhead": True, "losstype": "mse"},
            "100resnet18mseSTEALWVICH/stolen_checkpoint_9000_mse_svhn.pth.tar",
        ),
    ],
)
def test_flags_find_the_file(wanted, found, folder):
    assert find(folder, **wanted) == found


def test_several_are_listed_with_numbers_and_none_are_named(folder):
    with pytest.raises(UserError) as caught:
        find(folder, dataset="cifar10")
    text = str(caught.value)
    assert "2 victim encoders fit dataset cifar10, choose by --victim NUMBER: 1) " in text
    assert "cifar10_checkpoint_200_infonce.pth.tar" in text
    assert "2) " in text
    assert find(folder, "--victim", "2", dataset="cifar10") in VICTIMS
    with pytest.raises(UserError, match=r"no victim encoder with dataset mnist .*svhn_checkpoint_200_infonce.pth.tar"):
        find(folder, dataset="mnist")


# ---- the scripts -----------------------------------------------------------------------------------------------------


def save(path, state, epochs, arch="resnet18"):
    """A file as the 2022 code writes it."""
    path.parent.mkdir(parents=True)
    torch.save({"epoch": epochs, "arch": arch, "state_dict": state, "optimizer": {}}, path)


@pytest.fixture
def released(tmp_path):
    """A root of runs with a victim and two copies of 2022, one of them by SimSiam's loss."""
    root = tmp_path / "checkpoints"
    with seeded(0):
        network = build_encoder("resnet18", 16)
    save(root / "200resnet18infonceTRAIN/svhn_checkpoint_200_infonce.pth.tar", network.state_dict(), 200)
    name = "stolen_checkpoint_9000_mse_svhn.pth.tar"
    save(root / "100resnet18mseSTEAL" / name, network.state_dict(), 100, "resnet34")
    whole = nn.ModuleDict(
        {
            "encoder": with_fc(torch_resnet(), nn.Sequential(nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512))),
            "predictor": nn.Sequential(nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512)),
        }
    )
    name = "stolen_checkpoint_9000_symmetrized_svhn.pth.tar"
    save(root / "50resnet18symmetrizedSTEAL" / name, whole.state_dict(), 50, "resnet34")
    return root


def test_a_victim_of_2022_is_found_by_the_flags_of_2022_and_stolen(released, call, refused):
    attack = ("--datasetsteal", "svhn", "--losstype", "mse", "--epochs", "1", "--num_queries", "16", "-b", "8")
    attack += ("--device", "cpu", "--archstolen", "resnet10w32")
    flags = ("--dataset", "svhn", "--arch", "resnet18", "--epochstrain", "200", "--lossvictim", "infonce")
    code, out, err = call(steal, *flags, *attack)
    assert code == 0, err
    assert "victim: " in out
    assert "svhn_checkpoint_200_infonce.pth.tar: layout of this project or the 2022 code: resnet18" in out
    assert "16 images of svhn (test)" in out
    # Without flags it is the only victim, and its name still says on what it was trained.
    assert "16 images of svhn (test)" in call(steal, *attack, "--seed", "1")[1]
    path = released / "200resnet18infonceTRAIN/svhn_checkpoint_200_infonce.pth.tar"
    said = refused(steal, *attack, "--victim", path, "--dataset", "cifar10")
    assert "was trained with dataset svhn, not cifar10: give --dataset svhn" in said
    assert "no victim encoder with arch resnet34" in refused(steal, *attack, "--arch", "resnet34")


@pytest.mark.parametrize(
    ("losstype", "layout"),
    [("mse", "this project or the 2022 code: resnet18"), ("symmetrized", "2022 code, symmetrized: resnet18-imagenet")],
)
def test_a_copy_of_2022_is_found_by_the_flags_of_2022_and_judged(losstype, layout, released, call):
    flags = ("--dataset", "svhn", "--datasetsteal", "svhn", "--num_queries", "9000", "--losstype", losstype)
    flags += ("--arch", "resnet18", "--dataset-test", "mnist", "-n", "40", "--probe", "knn", "--device", "cpu")
    code, out, err = call(linear_eval, *flags)
    assert code == 0, err
    assert f"layout of {layout}" in out
    row = json.loads((released / "results.jsonl").read_text())
    assert (row["losstype"], row["attack"], row["defence"]) == (losstype, "direct", None)
