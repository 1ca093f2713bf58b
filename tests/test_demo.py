"""The demo's parts: its commands parse and fit together, its table and picture are made from what was measured."""

import torch

import demo
import linear_eval
import run
import steal
from evaluation.figures import nearest_images, neighbour_picture
from evaluation.rows import packed
from evaluation.statistics import mcnemar
from files.writing import save_checkpoint
from models import load_encoder


def row(name, right, queries, made_in):
    """A row of an encoder that is right on the first so many of 200 test images."""
    figures = {"top1_converged": right / 2, "right": packed(torch.arange(200) < right), "knn": 20.0}
    figures |= {"test_images": 200, "test_digest": "same"}
    return {"name": name, **figures, "queries": queries, "made_in": made_in}


ROWS = [row("victim", 100, 0, 61.2), row("copy, mse", 80, 1500, 12.0), row("random encoder", 40, 0, 0.0)]


def test_commands_find_what_the_ones_before_made():
    victim = run.parse(demo.TRAIN.split())
    copy = steal.parse(demo.STEAL.split())
    judge = linear_eval.parse(f"{demo.JUDGE} --modeltype stolen --dataset shapes {demo.COPY} --losstype mse".split())
    assert copy.dataset == victim.dataset
    assert (judge.epochs, judge.num_queries, judge.datasetsteal) == (copy.epochs, copy.num_queries, copy.datasetsteal)
    assert copy.num_queries == demo.QUERIES


def test_table_shows_the_rows():
    lines = demo.demo_table(ROWS).splitlines()
    assert lines[2] == "| victim | 50.0 [42.9, 57.1] |  | 20.0 [14.7, 26.2] | 0 | 61 |"
    assert lines[3].startswith("| copy, mse | 40.0 [33.2, 47.1] | -10.0 [")
    assert lines[3].endswith(f", p {mcnemar([1] * 20, [0] * 20)[0]:.2g} | 20.0 [14.7, 26.2] | 1,500 | 12 |")


def test_a_copy_above_its_victim_has_its_reason_beside_it():
    below, above = demo.lesson(ROWS), demo.lesson([ROWS[0], row("copy", 110, 1500, 12.0), ROWS[2]])
    assert "20 points above an untrained encoder, 10 below its victim." in below
    assert demo.REASON not in below
    assert "35 points above an untrained encoder, and 5 above its victim:" in above
    assert above.endswith(demo.REASON)


def test_picture_is_a_png_and_neighbours_begin_with_the_image_itself(encoder, images, tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint({"arch": encoder.arch, "state_dict": encoder.state_dict()}, path)
    nearest = nearest_images(load_encoder(path), images, queries=3, shown=4)
    assert nearest.shape == (3, 4)
    assert nearest[:, 0].tolist() == [0, 1, 2]
    rows = [{**ROWS[0], "checkpoint": str(path)}, {**ROWS[2], "checkpoint": None}]
    neighbour_picture(rows, "resnet10w32", tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
