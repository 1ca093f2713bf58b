"""Training and stealing by several processes, on the CPU: the weights and queries are those of a single process."""

import itertools
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import linear_eval
from attacks import Attack
from data_aug.images import Stored
from defenses import DEFENCES
from defenses.watermark import WatermarkMLP
from loss import STEAL_LOSSES, TRAIN_LOSSES
from models import SimSiamHeads, build_copy, build_encoder
from simclr import SimCLR
from tests.jobs import run_job
from tests.networks import few
from training.recipe import Recipe
from training.run import Run
from utils import Precision, seeded
from victim import Victim, image_digests

# ---- training --------------------------------------------------------------------------------------------------------

IMAGES = 20  # a batch of 8, another and half of one


def recipe_and_run(folder) -> tuple[Recipe, Run]:
    """What SimCLR takes after its loss, for an epoch."""
    recipe = Recipe(epochs=1, batch_size=8, lr=0.05, optimizer="sgd", flat_epochs=0)
    return recipe, Run(folder, Precision("fp32", torch.device("cpu")))


def at_half(loss):
    """The loss, at a temperature of 0.5 if it has one of contrastive losses."""
    return loss.bind({**loss.values, "temperature": 0.5}) if "temperature" in loss.settings else loss


def pictures() -> Tensor:
    return torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def new_encoder(head: str = "mlp-bn"):
    with seeded(3):
        return build_encoder("resnet10w32", 16, head=head)


class Counting(Victim):
    """A victim that counts the images that its encoder answers in this process."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.own = Counter()
        encoder = self._api.encoder
        encoder.register_forward_pre_hook(lambda module, inputs: self.own.update(image_digests(inputs[0])))


def train_all(folder) -> None:
    """Train by the trainer's jobs, with everything that draws or exchanges; weights go to the folder.

    In float64: the batch norms of so small batches magnify float32's rounding so that it would hide small errors.
    """
    torch.set_default_dtype(torch.float64)
    Tensor.float = Tensor.double
    train_victims(folder)
    steal_copies(folder)


def train_victims(folder) -> None:
    images, labels = pictures(), torch.arange(IMAGES) % 4
    for name in TRAIN_LOSSES:
        encoder, loss = new_encoder(), at_half(few(TRAIN_LOSSES[name]))
        with seeded(4):
            companion = WatermarkMLP(256) if name == "infonce" else loss.make_companion(encoder, IMAGES, 8)
        trainer = SimCLR(encoder, loss, *recipe_and_run(folder / f"victim-{name}"), companion)
        trainer.train(Stored(images), labels, loss.min_views)


def steal_copies(folder) -> None:
    images = pictures()
    ways = {
        "infonce": {},
        "contsteal": {"n_views": 1, "queryaug": True, "useaug": True},
        "symmetrized": {"n_views": 2},
        "rda": {"n_views": 3, "prototype": True, "useaug": True, "copy_views": 2},
    }
    for name, values in ways.items():
        with seeded(5):
            copy = build_copy("resnet10w32", 256)
            heads = SimSiamHeads(256, 32) if STEAL_LOSSES[name].predictor else None
        attack = Attack(**values)
        defences = [DEFENCES["buckets"](), DEFENCES["rounding"]()]
        victim = Counting(new_encoder("mlp"), attack.n_views * len(images), defences)
        trainer = SimCLR(copy, at_half(STEAL_LOSSES[name]), *recipe_and_run(folder / f"copy-{name}"), heads)
        trainer.steal(Stored(images), victim, attack)
        torch.save(
            {"own": [*victim.own], "times": [*victim.own.values()], "queries": victim.ledger.queries},
            folder / f"asked-{name}-{dist.get_rank() if dist.is_initialized() else 0}.pt",
        )


def overspend(folder) -> None:
    """Ask for one image more than the budget, some of it in batches that end unevenly."""
    victim = Victim(new_encoder("mlp"), budget=IMAGES - 1)
    trainer = SimCLR(build_copy("resnet10w32", 256), STEAL_LOSSES["mse"], *recipe_and_run(folder / "over"))
    trainer.steal(Stored(pictures()), victim)


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_a_script_that_works_alone_refuses_to_be_one_of_many(refused, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    line = ("--dataset", "shapes", "--dataset-test", "shapes")
    assert "linear_eval is one process, this is one of 2: start it without" in refused(linear_eval, *line)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    assert run_job(1, train_all, folder) == [0]
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def many_processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"of-{request.param}")
    assert run_job(request.param, train_all, folder) == [0] * request.param
    return folder, request.param


RUNS = [
    *(f"victim-{name}" for name in TRAIN_LOSSES),
    *(f"copy-{name}" for name in ("infonce", "contsteal", "symmetrized", "rda")),
]


@pytest.mark.parametrize("name", RUNS)
def test_weights_after_an_epoch_are_those_of_one_process(one_process, many_processes, name):
    folder, _ = many_processes
    expected, found = (torch.load(place / name / "checkpoint.pth.tar") for place in (one_process, folder))
    assert found.keys() == expected.keys()
    for part in ("state_dict", "companion", "watermark_state_dict"):
        for key, value in expected.get(part, {}).items():
            torch.testing.assert_close(found[part][key], value, rtol=1e-9, atol=1e-9, msg=f"{part} {key}")


@pytest.mark.parametrize("name", ["infonce", "contsteal", "symmetrized", "rda"])
def test_each_query_is_asked_by_one_process_and_entered_once(one_process, many_processes, name):
    folder, processes = many_processes
    (alone,) = (torch.load(one_process / f"asked-{name}-0.pt"),)
    asked = [torch.load(folder / f"asked-{name}-{rank}.pt") for rank in range(processes)]
    assert [one["queries"] for one in asked] == [alone["queries"]] * processes
    assert sum(len(one["own"]) for one in asked) == len(alone["own"])
    assert set(itertools.chain(*(one["own"] for one in asked))) == set(alone["own"])
    assert max(itertools.chain(*(one["times"] for one in asked))) == 1
    assert min(len(one["own"]) for one in asked) > 0
    ledgers = [torch.load(place / f"copy-{name}" / "checkpoint.pth.tar")["ledger"] for place in (one_process, folder)]
    for one, other in zip(*(ledger.values() for ledger in ledgers), strict=True):
        assert (one["queries"], one["calls"]) == (other["queries"], other["calls"])
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["near"], other["near"])


def test_together_they_never_exceed_the_budget(tmp_path, capfd):
    assert run_job(2, overspend, tmp_path) == [2, 2]
    err = capfd.readouterr().err
    assert "exceed the budget of 19" in err
    assert err.count("\n") == 1
