"""Stealing by re-creating the projection head."""

import pytest
import torch

import stealhead
from data_aug.datasets import load_dataset
from models import load_encoder, projection_head, read_checkpoint
from tests.conftest import COPY, VICTIM, made
from training.run import Run
from utils import Precision

ARCHES = ("--archvic", "resnet10w32", "--archstolen", "resnet10w32", "--device", "cpu")
STEAL = (*ARCHES, *VICTIM, *COPY, "-b", "6", "--epochshead", "2")
VARIED = ("--datasetsteal", "textures")  # to a victim trained on noise, images of noise are all alike
TRUE_HEAD = ("--victimhead", "True", "--losshead", "msewithhead")

FP32 = Precision("fp32", torch.device("cpu"))


@pytest.fixture
def stolen(call, trained, tmp_path):
    """What the script prints, the copy's checkpoint and the head's."""

    def run(*arguments):
        code, out, err = call(stealhead, *STEAL, *arguments)
        assert code == 0, err
        path = made(out)
        head = next(line for line in out.splitlines() if line.startswith("head: ")).removeprefix("head: ")
        return out, read_checkpoint(path), read_checkpoint(head)

    return run


@pytest.mark.parametrize(("share", "trains"), [((), 12), (("--head-queries", "8"), 8), (("--head-queries", "24"), 24)])
def test_both_phases_spend_one_budget_and_the_split_is_printed(share, trains, stolen):
    out, copy, _ = stolen(*share)
    assert copy["ledger"]["default"]["queries"] == 24
    assert f"of these queries {trains} train the head, all 24 train the copy" in out


def test_the_head_is_trained_on_its_share_of_the_answers_only(tmp_path):
    command = stealhead.parse(STEAL)
    answers = torch.rand(2 * 12, 256, generator=torch.Generator().manual_seed(0))
    others = answers.clone().view(2, 12, 256)
    others[:, 4:] = 7  # of the eight images after the first four, in both views
    heads = [
        stealhead.recreate_head(command, rows, 4, Run(tmp_path / name, FP32)).state_dict()
        for name, rows in (("a", answers), ("b", others.view(24, 256)), ("c", answers.flip(0)))
    ]
    assert all(torch.equal(value, heads[1][key]) for key, value in heads[0].items())
    assert not torch.equal(heads[0]["0.weight"], heads[2]["0.weight"])


def test_the_copy_matches_the_recreated_head_through_one_of_its_own(stolen):
    _, copy, head = stolen("--out_dim", "32")
    assert copy["state_dict"]["backbone.fc.2.weight"].shape == (32, 256)
    recreated = projection_head(256, 32)
    recreated.load_state_dict(head["state_dict"])


def test_true_projections_give_the_head_its_width_and_bring_it_closer(stolen, tmp_path):
    images = load_dataset("textures", split="test")[0][:50] / 255
    distances = []
    for epochs in ("1", "60"):
        _, _, head = stolen(*TRUE_HEAD, *VARIED, "--epochshead", epochs, "--head-queries", "24")
        victim = load_encoder(next(tmp_path.rglob("victim-*-infonce-*seed0*/checkpoint.pth.tar")))
        ours = projection_head(256, victim.out_dim)
        ours.load_state_dict(head["state_dict"])
        with torch.no_grad():
            distances.append((ours(victim(images)) - victim.project(images)).square().mean().item())
    assert distances[1] < 0.2 * distances[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--n-views", "1"), "--losshead infonce compares views: --n-views 1 is too few, give 2 or more"),
        (("--victimhead", "True"), "go together"),
        (("--losshead", "msewithhead"), "go together"),
        (("--head-queries", "25"), "--head-queries 25 must be from --n-views 2 to 24"),
        (("--head-queries", "1"), "--head-queries 1 must be from --n-views 2 to 24"),
        (("--losstype", "stolenencoder"), "invalid choice"),
        (("--num_queries", "200"), "takes 100 images, the train split of svhn has 48"),
    ],
)
def test_refusals(arguments, text, refused, trained, tmp_path):
    before = set(tmp_path.rglob("*"))
    assert text in refused(stealhead, *STEAL, *arguments)
    assert set(tmp_path.rglob("*")) == before


def test_one_view_is_enough_where_the_victim_answers_projections(stolen):
    _, copy, _ = stolen(*TRUE_HEAD, *VARIED, "--n-views", "1")
    assert copy["query_set"]["images"] == 24


def test_a_supervised_victim_is_an_encoder_like_others(stolen):
    _, copy, _ = stolen("--lossvictim", "supervised")
    assert copy["settings"]["lossvictim"] == "supervised"
    _, _, head = stolen("--lossvictim", "supervised", *TRUE_HEAD, *VARIED)
    assert head["state_dict"]["2.weight"].shape == (10, 256)  # its projections are its logits


@pytest.mark.parametrize(
    ("defence", "width"), [("truncate", 128), ("transform", 256), ("transform --transform quarter-pad-shuffle", 320)]
)
def test_the_head_is_as_wide_as_a_defended_answer(defence, width, stolen):
    _, copy, head = stolen("--defence", *defence.split())
    assert head["state_dict"]["0.weight"].shape == (width, width)
    assert copy["settings"]["defence"] == defence.split()[0]


def test_true_projections_that_a_defence_mixes_are_refused(refused, trained):
    assert "leave out --victimhead" in refused(stealhead, *STEAL, *TRUE_HEAD, "--defence", "noise,transform")
