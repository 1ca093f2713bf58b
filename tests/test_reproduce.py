"""Experiments: what a YAML file asks for, one small run of everything, its table and its picture."""

import json
import sys
import time
from concurrent.futures import CancelledError

import pytest
import yaml

import reproduce
from experiments.experiment import Attacker, Experiment, Point
from experiments.runner import Runner, _curve, results_table
from tests.conftest import ROOT
from utils import UserError

TINY = {
    "victim": "--dataset shapes --arch resnet10w32 --num-train 64 --epochs 1 -b 32",
    "steal": "--dataset shapes --datasetsteal shapes --arch resnet10w32 --archstolen resnet10w32 --epochstrain 1 "
    "--num_queries 24 --epochs 1 -b 8",
    "judge": "--arch resnet10w32 --dataset-test shapes -n 40 --num-test 30 --probe-epochs 1",
    "user": "--dataset shapes --dataset-test shapes --arch resnet10w32 --epochstrain 1 --num_queries 24 --num-test 30 "
    "--epochs 1",
    "attacks": {"mse": "--losstype mse", "twice": {"flags": "--losstype mse --repeat 2", "against": ["noise"]}},
    "defences": {"noise": {"flags": "--defence noise", "vary": "--sigma", "values": [0.5]}},
}


@pytest.fixture
def write(tmp_path):
    def file(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**TINY, **changes}))
        return path

    return file


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_that_are_shipped_can_be_read(path):
    experiment = Experiment(path)
    assert experiment.pairs()
    assert any(point.defence == "none" for point in experiment.points)


def test_attacks_meet_all_defences_or_those_that_they_are_for(write):
    defences = {
        **TINY["defences"],
        "none": "",
        "topk": {"flags": "--defence topk", "vary": "--top-k", "values": [4, 8]},
    }
    pairs = [(attack.name, str(point)) for attack, point in Experiment(write(defences=defences)).pairs()]
    assert sorted(pairs) == sorted(
        [("mse", name) for name in ("noise 0.5", "none", "topk 4", "topk 8")] + [("twice", "noise 0.5")]
    )


def test_what_an_experiment_lacks_is_named(write, tmp_path):
    with pytest.raises(UserError, match="unknown \\['colour'\\]"):
        Experiment(write(colour="red"))
    with pytest.raises(UserError, match="'twice' is against"):
        Experiment(write(defences={"none": ""}))
    (tmp_path / "half.yaml").write_text("victim: x\n")
    with pytest.raises(UserError, match=r"missing .*'attacks'"):
        Experiment(tmp_path / "half.yaml")
    with pytest.raises(UserError, match="is not a file"):
        Experiment(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"victim": True}, "victim is not flags"),
        ({"victim": ["a"]}, "victim is not flags"),
        ({"steal": None}, "steal is not flags"),
        ({"judge": 5}, "judge is not flags"),
        ({"user": "--a 'open"}, "user is not flags"),
        ({"common": {"a": "b"}}, "common is not flags"),
        ({"about": 3}, "about is not a text"),
        ({"seeds": 1}, "seeds is not a list of at least 1 values"),
        ({"seeds": []}, "seeds is not a list of at least 1 values"),
        ({"seeds": [0.5]}, "seeds is not a list of a whole number"),
        ({"independent": "--seed 1"}, "independent is not a list"),
        ({"independent": [1]}, "independent is not a list of flags"),
        ({"attacks": {}}, "no attacks or no defences"),
        ({"attacks": ["mse"]}, "attacks is not a mapping"),
        ({"attacks": {"mse": None}}, "attacks is not a mapping to flags"),
        ({"attacks": {"mse": {"against": ["noise"]}}}, "attacks is not a mapping to a mapping with flags"),
        ({"attacks": {"mse": {"flags": "", "against": "noise"}}}, "attacks is not .* against as a list"),
        ({"attacks": {"mse": {"flags": "", "colour": "red"}}}, "attacks is not .* only"),
        ({"defences": {"noise": {"flags": "", "vary": "--sigma"}}}, "'noise' lacks vary or values"),
        ({"defences": {"noise": {"flags": "", "vary": "--sigma", "values": ["x"]}}}, "defences is not .* values as"),
        ({"defences": {1: ""}}, "defences is not a mapping with texts as keys"),
    ],
)
def test_parts_of_another_type_are_named(write, changes, said):
    with pytest.raises(UserError, match=f"tiny.yaml.*{said}"):
        Experiment(write(**changes))


def test_what_is_done_is_read_back_and_broken_lines_run_again(tmp_path, capsys):
    good = {"command": "run.py", "path": "x.pth.tar", "rows": []}
    lines = ["{", "5", json.dumps({"command": 1, "path": None, "rows": []}), '{"command": "a"}', json.dumps(good)]
    (tmp_path / "done.jsonl").write_text("\n".join(lines))
    assert Runner(tmp_path, 1).done == {"run.py": good}
    assert "2 broken lines are skipped (1, 2)" in capsys.readouterr().err


def test_a_runner_that_is_told_to_stop_stops_its_scripts_and_starts_no_others(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import sys, time, pathlib\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)")
    monkeypatch.setattr("experiments.runner.HERE", tmp_path)
    started = time.monotonic()
    with Runner(tmp_path, 2) as runner:
        futures = [runner.pool.submit(runner, f"slow.py {tmp_path / str(number)}") for number in range(6)]
        while not (tmp_path / "1").exists() or not (tmp_path / "0").exists():
            time.sleep(0.02)
    assert time.monotonic() - started < 30
    assert all(future.cancelled() or isinstance(future.exception(), CancelledError) for future in futures)
    assert not [number for number in range(2, 6) if (tmp_path / str(number)).exists()]
    assert not runner.running
    with pytest.raises(CancelledError):
        runner("slow.py x")


def test_paths_may_have_spaces(tmp_path, monkeypatch):
    (tmp_path / "say.py").write_text("import sys; print('copy: ' + sys.argv[1])")
    monkeypatch.setattr("experiments.runner.HERE", tmp_path)
    with Runner(tmp_path / "a b", 1) as runner:
        (tmp_path / "a b").mkdir()
        assert runner("say.py 'a b/c d.pth.tar'")["path"] == str(tmp_path / "a b" / "c d.pth.tar")
    assert [*Runner(tmp_path / "a b", 1).done] == ["say.py 'a b/c d.pth.tar'"]


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
    reproduce.main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_an_experiment_runs_to_its_table_and_is_not_run_twice(write, tmp_path, monkeypatch, capsys):
    line = (write(), "--results", tmp_path / "results")
    out = call(monkeypatch, capsys, *line)
    folder = tmp_path / "results" / "tiny"
    rows = (folder / "table.md").read_text().splitlines()
    assert rows[2].startswith("| noise 0.5 | mse | ")
    assert "| 24 (24) |" in rows[2]
    assert "| 24 (12) |" in rows[3]
    assert out.count("$ python") == 6  # the victim, a user, two copies, and each of these judged
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    done = [json.loads(line) for line in (folder / "done.jsonl").read_text().splitlines()]
    assert all(entry["path"] or entry["rows"] for entry in done)
    assert "$ python" not in call(monkeypatch, capsys, *line)


def test_a_script_that_fails_ends_the_experiment_in_one_line(write, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, capsys, write(victim="--arch resnet99"), "--results", tmp_path / "results")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: `python run.py --arch resnet99 --resume` failed: error: run.py: argument")
    assert err.count("\n") == 1


def row(accuracy, seed, strength=None, user=50.0, **more):
    copy = {"top1_converged": accuracy, "knn": accuracy - 1, "queries": 100, "distinct": 50}
    return {
        **{"attack": Attacker("mse", "", stream="s"), "point": Point("noise", strength, ""), "seed": seed},
        **{"copy": copy, "user": {"top1_converged": user}, **more},
    }


def test_a_mean_has_an_interval_from_three_seeds_on():
    lines = results_table([row(40, 0), row(42, 1), row(44, 2), row(30, 0, 0.5), row(32, 1, 0.5)]).splitlines()
    assert "| noise | mse | 42.0 ± 2.0 | 41.0 ± 2.0 | 50.0 | 100 (50) |" in lines[2]
    assert "| noise 0.5 | mse | 31.0 | 30.0 | 50.0 |" in lines[3]


def test_detection_and_ownership_are_shown_where_they_are_known():
    verified = {"accuracy": 61.23, "p_t": 0.0123, "p_binomial": 1e-9, "p_encoders": 0.04}
    line = results_table([row(40, 0, detection={"auc_s": 0.876}, verified=verified)]).splitlines()[-1]
    assert line.endswith("| 0.88 | 61.2 | 1e-09 | 0.012 | 0.04 |")
    assert results_table([row(40, 0)]).splitlines()[-1].endswith("|  |  |  |  |  |")


def test_a_curve_goes_through_the_strengths_in_their_order():
    points = _curve([row(40, 0, 2.0, 48.0), row(44, 1, 2.0, 48.0), row(30, 0, 1.0, 49.0)])
    assert points == [(42, 48.0, 2.0), (30, 49.0, 1.0)]
