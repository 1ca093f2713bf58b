"""The paying user: what is bought, in one account, and what a defence takes away."""

import json

import pytest
import torch

import legitimate
from data_aug.datasets import load_dataset
from defenses import DEFENCES
from evaluation.rows import packed
from evaluation.statistics import paired_interval
from evaluation.user import UserHead, load_user, lost_words, user_scores
from models import build_encoder, read_checkpoint
from tests.conftest import SMALL, VICTIM
from utils import Precision, seeded
from victim import Account, Victim, image_digests

LINE = (*SMALL, *VICTIM, "--num_queries", "40", "--num-test", "20", "--epochs", "2")


@pytest.fixture
def row(call, trained, tmp_path):
    """The row of a user's run."""

    def of(*arguments):
        code, _, err = call(legitimate, *LINE, *arguments)
        assert code == 0, err
        return json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])

    return of


def test_every_answer_is_paid_for_in_training_and_in_use(row):
    found = row("--defence", "noise")
    assert (found["queries"], found["distinct"], found["train_images"], found["test_images"]) == (60, 60, 40, 20)
    assert (found["model"], found["defence"], found["downstream"]) == ("user", "noise", "cifar10")
    assert {"command", "commit", "torch", "device", "seconds", "seed"} <= found.keys()


def test_without_a_defence_there_is_nothing_to_lose(row):
    found = row()
    assert found["defence"] is None
    assert all(found[name] == found[f"clean_{name}"] for name in ("top1", "top5", "top1_converged", "loss"))


def test_what_a_user_loses_is_compared_on_the_same_test_images():
    """40 images are right without the defence only."""
    right = [torch.arange(200) < count for count in (120, 80)]
    clean, scores = ({"top1": 50.0, "top1_converged": one.sum().item() / 2, "right": packed(one)} for one in right)
    low, high = paired_interval(*right)
    said = f"the user loses 0.00 and 20.00 points ({low:.2f} to {high:.2f}, McNemar's p {2 * 0.5**40:.2g})"
    assert lost_words(scores, clean, 200) == said


def test_a_finished_run_is_not_paid_for_again(row, call, tmp_path, monkeypatch):
    found = row("--defence", "noise")
    results = (tmp_path / "checkpoints" / "results.jsonl").read_text()
    monkeypatch.setattr(Victim, "query", lambda *arguments: pytest.fail("asked again"))
    code, out, err = call(legitimate, *LINE, "--defence", "noise", "--resume")
    assert code == 0, err
    assert "has its results already" in out
    assert f"{found['top1_converged']:.4g}" in out
    assert (tmp_path / "checkpoints" / "results.jsonl").read_text() == results


def test_the_undefended_figures_do_not_depend_on_the_defence(row):
    assert row("--defence", "rounding")["clean_loss"] == row("--defence", "noise")["clean_loss"] == row()["loss"]


def test_the_task_may_be_another_data_set(row):
    found = row("--dataset-test", "mnist")
    assert (found["downstream"], found["train_images"], found["queries"]) == ("mnist", 40, 60)


def test_of_the_victims_own_data_the_user_has_the_test_split(data, call, trained, tmp_path):
    """Without its last 1,000 images, on which it is tested; the training images are the victim's."""
    assert "lower --num_queries" in call(legitimate, *LINE, "--num_queries", "41")[2]  # 1,040 test images
    images, _ = load_dataset("cifar10", data, "test")
    assert not set(image_digests(images[:40])) & set(image_digests(images[-20:]))


def test_a_user_may_have_a_narrow_task(row, data):
    """All images are of the classes that the seed draws, in training and in use; a label counts them from 0."""
    found = row("--num_queries", "8", "--user-classes", "2", "--num-test", "7")
    assert (found["train_images"], found["test_images"], found["queries"], found["user_classes"]) == (8, 7, 15, 2)
    tasks = set()
    for seed in range(4):
        train, test, _ = load_user("cifar10", "cifar10", data, 8, 7, classes=2, seed=seed)
        images, labels = load_dataset("cifar10", data, "test")
        known = dict(zip(image_digests(images), labels.tolist(), strict=True))
        for part, numbered in (train, test):
            classes = torch.tensor([known[digest] for digest in image_digests(part)])
            assert len(classes.unique()) == 2
            assert torch.equal(torch.searchsorted(classes.unique(), classes), numbered)
        assert set(image_digests(train[0])) <= set(image_digests(images[:40]))
        assert not set(image_digests(train[0])) & set(image_digests(test[0]))
        tasks.add(tuple(sorted({known[digest] for digest in image_digests(train[0])})))
    assert len(tasks) > 1


def test_a_user_may_ask_as_much_as_an_attacker(row):
    """--num_queries and --num-test add up to it, and the row says what the account's buckets could hold."""
    found = row("--num_queries", "24", "--num-test", "16", "--defence", "buckets")
    assert found["queries"] == 40
    assert found["buckets_even_coverage"] == pytest.approx(100 * (1 - (1 - 1 / 4096) ** 40))
    assert 0 < found["buckets_coverage"] <= found["buckets_even_coverage"] * 1.1


@pytest.fixture
def task():
    """An encoder and labelled images whose mean brightness is their class, which any representation shows."""
    with seeded(0):
        encoder = build_encoder("resnet10w32", out_dim=16).eval()
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 3
    noise = torch.randint(0, 30, (240, 3, 32, 32), generator=draws)
    images = (80 * labels[:, None, None, None] + noise).to(torch.uint8)
    return encoder, (images[:160], labels[:160]), (images[160:], labels[160:])


def test_a_defence_acts_in_training_and_in_use(task):
    """A strong defence costs the user the task; a turn of all answers costs nothing."""
    encoder, *images = task
    head = UserHead(epochs=20, batch_size=16, weight_decay=0.0, lrhead=1e-3)
    precision = Precision("fp32", torch.device("cpu"))
    scores = {}
    for name, settings in (("", {}), ("noise", {"mu": 0.0, "sigma": 50.0}), ("transform", {}), ("poisoning", {})):
        defences = [DEFENCES[name](**settings)] if name else []
        victim = Victim(encoder, defences=defences, precision=precision)
        scores[name], report = user_scores(victim, *images, head, precision)
        assert report == victim.report({"user": torch.arange(240)})
        assert victim.ledger.accounts["user"].queries == 240
        assert isinstance(victim.ledger.accounts["user"], Account)
    assert scores[""]["top1_converged"] > 95
    assert scores["noise"]["top1_converged"] < 60
    assert scores["transform"]["top1_converged"] == pytest.approx(scores[""]["top1_converged"], abs=3)
    assert scores["poisoning"]["top1_converged"] < 60  # all images of a brightness look alike


@pytest.mark.parametrize(
    ("flags", "task", "queries", "images"),
    [
        ((), "cifar10", "40", (40, 1000)),
        (("--dataset", "cifar10"), "npz:{data}/cifar10.npz", "40", (40, 1000)),  # the same data by another name
        ((), "mnist", "40", (40, 24)),
    ],
)
def test_the_user_of_the_victims_data_has_what_the_victim_was_not_trained_on(flags, task, queries, images, data):
    train, test, left_out = load_user(task.format(data=data), "cifar10", data, int(queries))
    assert (len(train[1]), len(test[1]), left_out) == (*images, 0)
    expected = load_dataset(task.format(data=data), data, "test" if "cifar10" in task else "train")[0][:40]
    assert torch.equal(train[0], expected)


def test_of_a_victim_of_other_data_the_user_has_the_training_split(call, trained, tmp_path):
    state = read_checkpoint(next(tmp_path.rglob("victim-cifar10-*seed0*/checkpoint.pth.tar")))["state_dict"]
    torch.save(state, tmp_path / "foreign.pth")
    line = ("--victim", tmp_path / "foreign.pth", "--dataset", "other", "--num_queries", "64", "--epochs", "2")
    code, _, err = call(legitimate, *line, "--device", "cpu")
    assert code == 0, err
    row = json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    assert (row["train_images"], row["test_images"]) == (64, 1040)


def test_refusals(refused, trained):
    assert "--losstype has no effect without --defence True" in refused(legitimate, *LINE, "--losstype", "mse")
    assert "--sigma has no effect without --defence" in refused(legitimate, *LINE, "--sigma", "1")
    assert "--sigma: '-1' is not a number of at least 0" in refused(
        legitimate, *LINE, "--defence", "noise", "--sigma", "-1"
    )
    assert "has 8 images of 2 classes for a user: lower --num_queries" in refused(
        legitimate, *LINE, "--user-classes", "2"
    )
    narrow = ("--num_queries", "8", "--user-classes")
    assert "has 10 classes" in refused(legitimate, *LINE, *narrow, "11")
    assert "--num-test 900: 200 test images are of the user's 2 classes" in refused(
        legitimate, *LINE, *narrow, "2", "--num-test", "900"
    )
    assert "unknown defence 'magic'" in refused(legitimate, *LINE, "--defence", "magic")
    assert "--top-k 300 is more than the 256" in refused(legitimate, *LINE, "--defence", "topk", "--top-k", "300")


def test_what_is_refused_leaves_nothing(refused, trained, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    refused(legitimate, *LINE, "--defence", "truncate", "--dimensions", "257")
    assert sorted(tmp_path.rglob("*")) == before
