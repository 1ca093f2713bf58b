"""The command that runs experiments: tables from tiny runs, nothing twice, and what is wrong in a line."""

import json
import sys

import pytest
import yaml

import reproduce

VICTIM = "--dataset shapes --arch resnet10w32 --num-train 64 --epochs 1 -b 32"
TINY = {
    "axes": {"loss": ["mse", "cosine"], "seed": [0]},
    "scales": {"demo": {"copy_flags": "--num_queries 24 --epochs 1 -b 8", "judge_flags": "-n 40 --num-test 30"}},
    "steps": {
        "victim": f"run.py {VICTIM}",
        "copy": "steal.py --victim {victim} --datasetsteal shapes --archstolen resnet10w32 --losstype {loss} "
        "{copy_flags} --seed {seed}",
        "judged": "linear_eval.py --modeltype stolen --stolen {copy} --dataset-test shapes {judge_flags} "
        "--probe-epochs 1",
    },
    "table": {
        "of": "judged",
        "lines": ["loss"],
        "columns": {"accuracy": "judged.top1_converged", "queries": "judged.queries", "images": "copy.images_trained"},
    },
}


@pytest.fixture
def write(tmp_path):
    def file(name="tiny", **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
        return path

    return file


@pytest.fixture
def reproduced(tmp_path, monkeypatch, capfd):
    """Runs the command; its exit code, output and errors."""

    def call(*arguments):
        line = ["reproduce.py", *arguments, "--results", tmp_path / "results"]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        code = 0
        try:
            reproduce.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return call


def test_experiments_become_tables_share_their_runs_and_are_not_run_twice(write, reproduced, tmp_path):
    # The second has a victim and a copy of the first, and a copy of its own.
    second = write("second", axes={"loss": ["cosine", "softce"], "seed": [0]})
    code, out, _ = reproduced(write(), second)
    assert code == 0
    folder = tmp_path / "results" / "demo" / "tiny"
    table = (folder / "table.md").read_text().splitlines()
    assert table[0] == "| loss | accuracy | queries | images | n |"
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| mse", "| cosine"]
    assert all("| 24 | 24 | 1 |" in line for line in table[2:4])
    assert (folder / "report.html").exists()
    cells = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 1 + 2 + 2
    assert len([*(tmp_path / "results" / "runs").glob("*/config.yml")]) == 1 + 3 + 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "runs").glob("*/checkpoint.pth.tar")}
    code, again, _ = reproduced(write(), second)
    assert (code, "done:" in again) == (0, False)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "runs").glob("*/checkpoint.pth.tar")}
    assert after == before
    assert out.count("report.html") == again.count("report.html") == 2


def test_the_commands_can_be_seen_without_running_them(write, reproduced, tmp_path):
    code, out, _ = reproduced(write(), "--dry-run", "--only", "loss=mse")
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[1] for line in lines] == ["run.py", "steal.py", "linear_eval.py"]
    assert f"--victim {lines[0].split('--run-dir ')[1].split()[0]} " in lines[1]
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scale", "huge"], "has no scale 'huge': give --scale demo"),
        (["--only", "los=mse"], "'los' is unknown: did you mean 'loss'"),
        (["--jobs", "0"], "--jobs"),
        (["--price-per-hour", "-1"], "--price-per-hour"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_runs(write, reproduced, tmp_path, words, said):
    code, _, err = reproduced(write(), *words)
    assert code == 2
    assert err.count("\n") == 1
    assert said in err
    assert not [*tmp_path.glob("results/runs/*")]


def test_a_file_that_is_none_is_named_before_the_first_runs(write, reproduced, tmp_path):
    code, _, err = reproduced(write(), write("bad", table={"of": "judged", "lines": ["loss"]}))
    assert (code, "bad.yaml: table has no columns" in err) == (2, True)
    assert not (tmp_path / "results").exists()


def test_what_failed_is_listed_and_the_table_has_the_rest(write, reproduced, tmp_path):
    axes = {"loss": {"mse": "mse", "wrong": "nothing"}, "seed": [0]}
    code, out, err = reproduced(write(axes=axes))
    assert code == 2
    assert "tiny: 1 of 5 runs failed, 1 that need them were left out: see above" in err
    assert "failed: copy loss=wrong seed=0" in out
    table = (tmp_path / "results" / "demo" / "tiny" / "table.md").read_text()
    assert "| mse |" in table
    assert "| wrong |  |  |  | 0 |" in table


def test_slurm_is_asked_only_where_it_is(write, reproduced, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = reproduced(write(), "--slurm")
    assert (code, "there is no sbatch on this machine" in err) == (2, True)
