"""The demo's parts: its commands parse and fit together, its table and picture are made from what was measured."""

import demo
import linear_eval
import run
import steal
from evaluation.figures import nearest_images, neighbour_picture
from files.writing import save_checkpoint
from models import load_encoder

ROWS = [
    {"name": "victim", "top1_converged": 50.04, "top1": 30.0, "knn": 20.0, "queries": 0, "made_in": 61.2},
    {"name": "random encoder", "top1_converged": 20.0, "top1": 9.0, "knn": 10.0, "queries": 1500, "made_in": 0.0},
]


def test_commands_find_what_the_ones_before_made():
    victim = run.parse(demo.TRAIN.split())
    copy = steal.parse(demo.STEAL.split())
    judge = linear_eval.parse(f"{demo.JUDGE} --modeltype stolen --dataset shapes {demo.COPY} --losstype mse".split())
    assert copy.dataset == victim.dataset
    assert (judge.epochs, judge.num_queries, judge.datasetsteal) == (copy.epochs, copy.num_queries, copy.datasetsteal)
    assert copy.num_queries == demo.QUERIES


def test_table_shows_the_rows():
    lines = demo.demo_table(ROWS).splitlines()
    assert lines[2] == "| victim | 50.0 % | 30.0 % | 20.0 % | 0 | 61 |"
    assert lines[3] == "| random encoder | 20.0 % | 9.0 % | 10.0 % | 1,500 | 0 |"


def test_picture_is_a_png_and_neighbours_begin_with_the_image_itself(encoder, images, tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint({"arch": encoder.arch, "state_dict": encoder.state_dict()}, path)
    nearest = nearest_images(load_encoder(path), images, queries=3, shown=4)
    assert nearest.shape == (3, 4)
    assert nearest[:, 0].tolist() == [0, 1, 2]
    rows = [{**ROWS[0], "checkpoint": str(path)}, {**ROWS[1], "checkpoint": None}]
    neighbour_picture(rows, "resnet10w32", tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
