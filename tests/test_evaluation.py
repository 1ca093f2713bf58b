"""Evaluation leaves the encoder as it was; which images are tested."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from data_aug.datasets import load_dataset
from data_aug.images import Stored, Streamed, Views, open_pictures
from data_aug.shapes import make_shapes
from defenses.watermark import WatermarkMLP, watermark_scores
from evaluation import (
    count_queried,
    evaluate,
    frozen,
    linear_probe,
    load_test,
    logistic_regression,
    released_probe,
    represent,
)
from evaluation.rows import encoder_row
from evaluation.test_images import unqueried_positions
from loss import TRAIN_LOSSES
from models import build_encoder
from simclr import SimCLR
from training.recipe import Recipe
from training.record import Record
from training.run import Run
from utils import Precision, UserError, seeded
from victim import digest_tensor

FP32 = Precision("fp32", torch.device("cpu"))


def test_representations_in_batches_are_those_of_single_images(encoder, images):
    h = represent(encoder.train(), images, batch_size=5)
    with torch.no_grad():
        expected = torch.cat([encoder.eval()(image[None] / 255) for image in images])
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_batch_statistics_of_plain_images_suit_a_victim_of_little_training(tmp_path):
    """The middle victim of docs/protocol.md: its statistics are of strong views, it is judged on plain images."""
    images, _ = make_shapes("train", 4000)
    known, test = make_shapes("train", 1500), make_shapes("test", 1000)
    precision = Precision.choose("auto", torch.device("cpu"))
    with seeded(1):
        victim = build_encoder("resnet10w32", 128)
    recipe = Recipe(epochs=4, batch_size=128, flat_epochs=1, lr=0.002, seed=1)
    SimCLR(victim, TRAIN_LOSSES["infonce"], recipe, Run(tmp_path, precision)).train(Stored(images))

    def accuracy():
        ready = ((represent(victim, images, precision), labels) for images, labels in (known, test))
        return logistic_regression(*ready).scores["top1"]

    of_views = accuracy()
    for module in victim.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches
    with torch.no_grad():
        for part in known[0][:1000].split(250):
            victim.train()(part / 255)
    assert accuracy() > of_views


def test_streamed_images_are_represented_as_those_in_memory(encoder, write_npz):
    pictures = open_pictures(f"npz:{write_npz(train=10)}", "datasets", "train")
    views = Views(pictures, "center", 32)
    images = torch.stack([views[position] for position in range(10)])
    streamed = Streamed(views, torch.arange(10), workers=0)
    expected = represent(encoder, images, FP32, batch_size=4)
    assert torch.equal(represent(encoder, Stored(images), FP32, batch_size=4), expected)
    assert torch.equal(represent(encoder, streamed, FP32, batch_size=4), expected)
    assert torch.equal(represent(encoder, images / 255, FP32, batch_size=4), expected)
    halved = represent(encoder, streamed, FP32, batch_size=4, dtype=torch.float16)
    assert torch.equal(halved, expected.half())
    assert represent(encoder, images[:0], FP32).shape == (0, 256)


def test_each_process_represents_its_share(encoder, images, monkeypatch):
    """Two processes in turn: together their rows are those of one, in its order."""
    from jobs import exchange

    module = sys.modules["training.represent"]
    expected = represent(encoder, images, FP32, batch_size=5)
    shares = {}
    for rank in (0, 1):
        seen = shares[rank] = []
        monkeypatch.setattr(exchange, "processes", lambda: 2)
        monkeypatch.setattr(module, "share", lambda total, rank=rank: exchange.share(total, rank))
        monkeypatch.setattr(module, "gather", lambda rows, total, seen=seen: seen.append((rows, total)) or rows)
        represent(encoder, images, FP32, batch_size=5)
    totals = [total for _, total in shares[0]]
    assert totals == [total for _, total in shares[1]] == [5, 5, 2]
    together = torch.cat([torch.cat([a, b]) for (a, _), (b, _) in zip(shares[0], shares[1], strict=True)])
    assert torch.allclose(together, expected, atol=1e-5)
    assert [len(rows) for rows, _ in shares[0]] == [3, 3, 1]


def test_the_function_fidelity_wins_over_the_module_of_that_name():
    import evaluation
    import evaluation.fidelity

    assert callable(evaluation.fidelity)


def test_representing_changes_nothing_and_restores_the_mode(encoder, images):
    encoder.train()
    before = copy.deepcopy(encoder.state_dict())
    represent(encoder, images)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert encoder.training


def test_a_changed_encoder_is_noticed(encoder, images):
    def change_it():
        with frozen(encoder):
            encoder.train()(images / 255)

    with pytest.raises(RuntimeError, match=r"changed the encoder: backbone\.bn1\.running_mean"):
        change_it()


@pytest.mark.parametrize("factor", [1e25, math.inf, math.nan])
@pytest.mark.parametrize(
    "judge",
    [
        lambda encoder, labelled: represent(encoder, labelled[0], FP32),
        lambda encoder, labelled: represent(encoder, labelled[0], FP32, dtype=torch.float16),
        lambda encoder, labelled: released_probe(encoder, labelled, labelled, 1e-3, FP32, epochs=1),
        lambda encoder, labelled: watermark_scores(encoder, WatermarkMLP(256), labelled[0], FP32),
    ],
    ids=["represent", "half", "released", "watermark"],
)
def test_an_encoder_whose_answers_are_no_numbers_is_named(judge, factor, encoder, images):
    with torch.no_grad():
        encoder.backbone.layer4[0].bn2.weight.fill_(factor)
    with pytest.raises(UserError, match=r"an encoder gives representations that are .* give another checkpoint$"):
        judge(encoder, (images, torch.arange(12) % 3))


def test_a_probe_that_diverges_is_a_line(encoder, images):
    space = represent(encoder, images), torch.arange(12) % 3
    with pytest.raises(UserError, match=r"loss is (nan|inf) in epoch \d+: lower the learning rate 1e\+30"):
        linear_probe(space, space, lr=1e30, epochs=9)


@pytest.mark.parametrize(
    ("settings", "report", "kept"),
    [
        (
            {},
            {"top1": 99.9, "queries": 1.0, "model": 2.0},
            {"defence_top1": 99.9, "defence_queries": 1.0, "defence_model": 2.0},
        ),
        ({"defence": "poisoning"}, {"poisoning_poisoned": 3.0}, {"poisoning_poisoned": 3.0}),
        ({"defence": "noise"}, {"test_images": 4.0, "": 1.0}, {"defence_test_images": 4.0, "defence_": 1.0}),
    ],
)
@pytest.mark.parametrize("key", ["met", "defence_report"])
def test_no_file_takes_the_place_of_a_rows_figures(settings, report, kept, key, encoder):
    scores, more = {"top1": 12.3456789}, {"test_images": 7}
    honest = {"settings": settings}
    for kind, queries in (("stolen", None), ("suspect", None), ("victim", 0)):
        row = encoder_row(kind, encoder, None, {**honest, key: report}, scores, {"probe": "linear"}, more)
        assert row == {**encoder_row(kind, encoder, None, honest, scores, {"probe": "linear"}, more), **kept}
        assert (row["model"], row["top1"], row["test_images"], row["losstype"]) == (kind, 12.345679, 7, None)
        assert row["queries"] is row["distinct"] is queries or row["queries"] == queries == 0


def test_evaluate_gives_every_figure_and_counts_all_test_images(encoder, images):
    labels = torch.arange(12) % 3
    before = copy.deepcopy(encoder.state_dict())
    h = represent(encoder, images)
    scores, probe = evaluate((h, labels), (h[:7], labels[:7]), 1e-3)
    converged = {"top1_converged", "top1_converged_sd", "strength", "right"}
    assert set(scores) == {"top1", "top5", *converged, "knn", "knn_k"}
    for name in ("top1", "top1_converged", "knn"):
        assert (scores[name] * 7 / 100) == pytest.approx(round(scores[name] * 7 / 100), abs=1e-4)
    assert probe.weight.shape == (3, 256)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_released_protocol_uses_batch_statistics_and_batch_means(encoder, images):
    """Written out for one epoch: backbone in train mode throughout, mean of the batches' percentages."""
    labels = torch.arange(12) % 3
    train, test = (images[:8], labels[:8]), (images[7:], labels[7:])
    before = copy.deepcopy(encoder.state_dict())
    scores = released_probe(encoder, train, test, 1e-2, FP32, epochs=1, batch_size=4, test_batch_size=3)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())

    network = copy.deepcopy(encoder).train()
    with seeded(0, "probe"):
        layer = nn.Linear(256, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2, weight_decay=8e-4)
    for start in (0, 4):
        h = network(train[0][start : start + 4] / 255).detach()
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(h), train[1][start : start + 4]).backward()
        optimizer.step()
    shares = []
    for batch in (slice(0, 3), slice(3, 5)):
        logits = layer(network(test[0][batch] / 255))
        shares.append(100 * (logits.argmax(dim=1) == test[1][batch]).float().mean().item())
    assert scores["top1"] == pytest.approx(sum(shares) / 2)
    assert scores["top5"] == 100


def test_count_queried(images):
    digests = digest_tensor(images[:8])
    assert count_queried(images[6:], digests) == 2
    assert count_queried(images[8:], digests) == 0


# ---- which images ----


def of_test(name, images, positions=None):
    """The record of a copy that queried these images of a data set's test split."""
    indices = None if positions is None else torch.as_tensor(positions)
    return Record(
        query_set={"dataset": name, "split": "test"}, query_digests=digest_tensor(images), query_indices=indices
    )


@pytest.fixture
def tests(write_npz):
    """A data root with 1,010 test images, of which the first two and the last two are equal, and 48 of another set."""
    path = write_npz("cifar10", test=1010)
    arrays = dict(np.load(path))
    arrays["x_test"][[0, 1, -2, -1]] = 0
    np.savez(path, **arrays)
    arrays = dict(np.load(write_npz("svhn", test=48)))
    np.savez(path.parent / "svhn.npz", **{key: array ^ 1 if key[0] == "x" else array for key, array in arrays.items()})
    return path.parent


@pytest.mark.parametrize(
    ("name", "asked", "number", "used", "left_out"),
    [
        ("cifar10", [], None, 1010, 0),
        ("cifar10", [("svhn", range(24))], None, 1010, 0),
        ("cifar10", [("cifar10", range(2, 10))], None, 1000, 0),
        ("cifar10", [("cifar10", range(10))], None, 998, 2),  # equal images at the end
        ("cifar10", [("cifar10", range(10))], 1000, 998, 2),
        ("cifar10", [("cifar10", range(2, 10))], 7, 7, 0),
        ("npz:{root}/cifar10.npz", [("cifar10", range(10))], None, 998, 2),  # the same data by another name
        ("npz:{root}/../{here}/cifar10.npz", [("npz:{root}/cifar10.npz", range(10))], None, 998, 2),
        ("svhn", [("svhn", range(20))], None, 24, 0),  # of few images, half
        ("svhn", [("cifar10", range(10))], None, 48, 0),
        ("svhn", [("svhn", range(3)), ("svhn", range(20))], None, 24, 0),
        ("svhn", [("cifar10", [700]), ("svhn", [5])], None, 24, 0),
    ],
)
def test_images_that_were_queried_are_left_out_and_counted(name, asked, number, used, left_out, tests):
    names = {"root": tests, "here": tests.name}
    records = []
    for source, positions in asked:
        images = load_dataset(source.format(**names), tests, "test")[0][list(positions)]
        records.append(of_test(source.format(**names), images, list(positions)))
    images, labels, count = load_test(name.format(**names), tests, *records, number=number)
    assert (len(images), len(labels), count) == (used, used, left_out)
    for record in records:
        assert count_queried(images, record.query_digests) == 0
    everything = load_dataset(name.format(**names), tests, "test")[0]
    if not left_out:
        assert torch.equal(images, everything[-used:])


@pytest.mark.parametrize(
    ("name", "positions", "number", "message"),
    [
        ("cifar10", range(2, 10), 1001, r"1 of the 1001 test images were queried: give --num-test 1000 or less$"),
        ("cifar10", [5, 1009], 1, r"1 of the 1 test images were queried: test on another data set$"),
        ("cifar10", [10**12], 1011, "has 1010 images"),
        ("svhn", range(48), None, "all 24 test images of svhn were queried: test on another data set"),
    ],
)
def test_where_too_few_images_are_left_a_line_says_what_to_do(name, positions, number, message, tests):
    images = load_dataset(name, tests, "test")[0]
    sent = images[[position for position in positions if position < len(images)]]
    with pytest.raises(UserError, match=message):
        load_test(name, tests, of_test(name, sent, list(positions)), number=number)


def test_load_test_takes_what_was_not_queried(write_npz):
    root = write_npz("cifar10", test=1010).parent
    everything, labels, queried = load_test("cifar10", root, Record())
    assert (len(everything), len(labels), queried) == (1010, 1010, 0)
    asked = Record(query_set={"dataset": "cifar10", "split": "test"}, query_digests=digest_tensor(everything[:10]))
    kept, _, queried = load_test("cifar10", root, asked)
    assert torch.equal(kept, everything[10:])
    assert queried == 0
    assert len(load_test("cifar10", root, asked, number=7)[0]) == 7
    assert len(load_test("cifar10", root, Record(), last_thousand=True)[0]) == 1000
    with pytest.raises(UserError, match="1 of the 1001 test images were queried"):
        load_test("cifar10", root, asked, number=1001)
    with pytest.raises(UserError, match="has 1010 images"):
        load_test("cifar10", root, Record(), number=1011)


def test_pictures_that_were_queried_are_left_out_by_position(write_npz):
    name = f"npz:{write_npz(test=6)}"
    test = open_pictures(name, "datasets", "test")
    assert unqueried_positions(test, Record()).tolist() == list(range(6))
    asked = Record(query_set={"dataset": name, "split": "test"}, query_indices=torch.tensor([4, 0]))
    assert unqueried_positions(test, asked).tolist() == [1, 2, 3, 5]
    of_train = Record(query_set={"dataset": name, "split": "train"}, query_indices=torch.tensor([4, 0]))
    assert len(unqueried_positions(test, of_train)) == 6
    asked.query_indices = torch.arange(6)
    with pytest.raises(UserError, match="all 6 test images"):
        unqueried_positions(test, asked)
