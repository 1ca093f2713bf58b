"""Experiments: what a YAML file asks for, one small run of everything, its table and its picture."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch
import yaml
from scipy import stats

import reproduce
from evaluation.rows import packed
from evaluation.statistics import mcnemar, paired_interval
from experiments.experiment import Attacker, Experiment, Point
from experiments.runner import Runner, run_all
from experiments.table import _curve, picture, results_table
from jobs.ending import SAVED, Stopped
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
        ({"attacks": {"mse": None}}, "attack 'mse' is None, not its flags as a text"),
        (
            {"attacks": {"mse": {"against": ["noise"]}}},
            "attack 'mse' has no flags: give flags, against, stream, detect, judge",
        ),
        ({"attacks": {"mse": {"flags": "", "against": "noise"}}}, "attack 'mse': against is not a list"),
        (
            {"attacks": {"mse": {"flags": "", "colour": "red"}}},
            "attack 'mse' has colour, which is unknown",
        ),
        (
            {"defences": {"noise": {"flags": "", "vary": "--sigma"}}},
            "defence 'noise' has no values: give flags",
        ),
        (
            {"defences": {"noise": {"flags": "", "vary": "--sigma", "values": ["x"]}}},
            "defence 'noise': values is not a list of",
        ),
        ({"seeds": [0, 1, 0]}, "a number stands twice in seeds or in values"),
        ({"defences": {"noise": {"flags": "", "vary": "--sigma", "values": [1, 1.0]}}}, "stands twice"),
        ({"defences": {1: ""}}, "defences is not a mapping with texts as keys"),
    ],
)
def test_parts_of_another_type_are_named(write, changes, said):
    with pytest.raises(UserError, match=f"tiny.yaml.*{said}"):
        Experiment(write(**changes))


def test_what_is_done_is_read_back_and_other_scripts_run_again(tmp_path, capsys):
    (tmp_path / "x.pth.tar").touch()
    good = {"command": "run.py", "path": "x.pth.tar", "rows": []}
    others = [{**good, "command": 1}, {**good, "command": "a", "path": "gone.pth.tar"}, {"command": "b"}]
    lines = ["{", "5", *map(json.dumps, [*others, good])]
    (tmp_path / "done.jsonl").write_text("\n".join(lines))
    assert Runner(tmp_path, 1).done == {"run.py": good}
    assert "2 broken lines are skipped (1, 2)" in capsys.readouterr().err


# ---- scripts, of which stand-ins are started -------------------------------------------------------------------------


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """A runner in a folder with a space, which finds its scripts in `tmp_path`."""
    monkeypatch.setattr("experiments.runner.HERE", tmp_path)
    (tmp_path / "my results").mkdir()
    with Runner(tmp_path / "my results", 2) as made:
        yield made


def stand_in(folder, code):
    (folder / "script.py").write_text(f"import json, os, pathlib, sys, time\n{code}\n")


def test_a_runner_that_is_told_to_stop_stops_its_scripts_and_starts_no_others(tmp_path, runner):
    stand_in(tmp_path, "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)")
    started = time.monotonic()
    futures = [runner.pool.submit(runner.checkpoint, "script.py", str(tmp_path / str(n))) for n in range(6)]
    while not (tmp_path / "1").exists() or not (tmp_path / "0").exists():
        time.sleep(0.02)
    with pytest.raises(Stopped, match="told: the same command goes on from there"), runner:
        raise Stopped("told")
    assert time.monotonic() - started < 30
    assert all(future.cancelled() or isinstance(future.exception(), CancelledError) for future in futures)
    assert not [number for number in range(2, 6) if (tmp_path / str(number)).exists()]
    assert not runner.running
    with pytest.raises(CancelledError):
        runner.checkpoint("script.py", "x")
    runner.folder_lock = None  # it is closed


def test_paths_may_have_spaces(tmp_path, runner):
    stand_in(tmp_path, "print('copy: ' + sys.argv[1]); pathlib.Path(sys.argv[1]).touch()")
    path = tmp_path / "my results" / "c d.pth.tar"
    assert runner.checkpoint("script.py", "my results/c d.pth.tar") == str(path)
    assert [*Runner(tmp_path / "my results", 1).done] == ["script.py 'my results/c d.pth.tar' --resume"]


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("sys.exit(75)", Stopped, "`python script.py --resume` was stopped"),
        ("os.kill(os.getpid(), 9)", UserError, "was ended by SIGKILL"),
        ("sys.exit('error: bees')", UserError, "--resume` failed: bees"),
        ("sys.exit(3)", UserError, "failed: exit code 3"),
        ("print('nothing')", UserError, "--resume` wrote no row"),
    ],
)
def test_how_a_script_ended_is_said(tmp_path, runner, code, kind, said):
    stand_in(tmp_path, code)
    with pytest.raises(kind, match=said):
        runner.rows("script.py")
    assert not (tmp_path / "my results" / "done.jsonl").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_rows_are_those_of_the_command_or_of_the_run_that_is_finished(tmp_path, runner, finished):
    """A run that is finished has the row of the command that it was begun with."""
    stand_in(
        tmp_path,
        "root = pathlib.Path(sys.argv[sys.argv.index('--checkpoint-dir') + 1]); root.mkdir()\n"
        f"command = 'another' if {finished} else ' '.join(sys.argv)\n"
        "rows = [{'run': 'a/b', 'command': command, 'top1': 1}, {'run': 'a/c', 'command': 'others', 'top1': 2}]\n"
        "(root / 'results.jsonl').write_text(''.join(json.dumps(row) + chr(10) for row in rows))\n"
        f"print(f'{{root}}/a/b has its results already') if {finished} else None",
    )
    assert [row["top1"] for row in runner.rows("script.py", "--flag", "a b")] == [1]


def test_a_command_that_is_asked_for_twice_runs_once(tmp_path, runner):
    code = "pathlib.Path(f'{os.getpid()}.started').touch(); time.sleep(0.2); open('x.pth.tar', 'w'); "
    stand_in(tmp_path, code + "print('copy: x.pth.tar')")
    both = [runner.pool.submit(runner.checkpoint, "script.py") for _ in range(2)]
    assert {future.result() for future in both} == {str(tmp_path / "x.pth.tar")}
    assert len([*tmp_path.glob("*.started")]) == 1


def test_a_second_process_in_the_folder_gets_a_line(tmp_path):
    code = (
        "import sys; from files.writing import lock; lock(__import__('pathlib').Path(sys.argv[1])); print(flush=True)"
    )
    line = [sys.executable, "-c", f"{code}; sys.stdin.read()", tmp_path]
    with subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process writes in"), Runner(tmp_path, 1):
            pass
        other.stdin.close()


@pytest.mark.parametrize(
    ("number", "group"), [(signal.SIGTERM, False), pytest.param(signal.SIGINT, True, marks=pytest.mark.slow)]
)
def test_reproduce_stops_its_scripts_when_it_is_told(write, tmp_path, number, group):
    """A real process, and stand-ins for its scripts, which say when they are told to stop."""
    for name in ("run.py", "steal.py", "legitimate.py"):
        (tmp_path / name).write_text(
            "import os, pathlib, signal, sys, time\n"
            "def stop(*signals): print(file=open('told', 'a')); sys.exit(75)\n"
            "for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, stop)\n"
            "if sys.argv[0] == 'run.py': open('v.pth.tar', 'w'); print('victim: v.pth.tar'); sys.exit()\n"
            "print(file=open('started', 'a')); time.sleep(60)\n"
        )
    code = "import sys, pathlib, experiments.runner, reproduce; "
    code += "experiments.runner.HERE = pathlib.Path.cwd(); reproduce.main()"
    line = [sys.executable, "-c", code, str(write()), "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(line, cwd=tmp_path, env=environment, **pipes) as started:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() or (tmp_path / "started").read_text() != "\n\n":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (os.killpg if group else os.kill)(started.pid, number)
        _, err = started.communicate(timeout=30)
    assert (started.returncode, err) == (SAVED, f"stopped by {number.name}: the same command goes on from there\n")
    assert (tmp_path / "started").read_text() == "\n\n"  # no others
    assert len((tmp_path / "told").read_text()) >= 2
    assert len((tmp_path / "results/tiny/done.jsonl").read_text().splitlines()) == 1


# ---- all of it -------------------------------------------------------------------------------------------------------


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
    assert rows[2].startswith("| noise 0.5 | mse | 1 | 30 | ")
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
    assert err.startswith("error: `python run.py --arch resnet99 --resume` failed: run.py: argument")
    assert err.count("\n") == 1


def row(accuracy, seed, strength=None, user=50.0, attack="mse", defence="noise", right=None, **more):
    """A row of an experiment, of a copy that is right on so many percent of 1,000 test images, or on those given."""
    copy = {"top1_converged": accuracy, "knn": accuracy / 2, "queries": 100, "distinct": 50, "test_images": 1000}
    if right is not None:
        copy |= {"top1_converged": 100 * right.float().mean().item(), "right": packed(right)}
        copy |= {"test_images": len(right), "test_digest": "same"}
    return {
        **{"attack": Attacker(attack, "", stream="s"), "point": Point(defence, strength, ""), "seed": seed},
        **{"copy": copy, "user": {"top1_converged": user, "test_images": 400}, **more},
    }


def lines_of(rows):
    """The lines of the table, each as a mapping from the names of the columns."""
    table = results_table(rows).split("\n\n")[0].splitlines()
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_every_mean_has_its_number_and_its_interval():
    """Student's t over the seeds; of a single seed Clopper and Pearson's for its images."""
    noise, half = lines_of([row(40, 0), row(42, 1), row(44, 2), row(30, 0, 0.5)])
    low, high = stats.t.interval(0.95, 2, 42, 2 / 3**0.5)
    assert (noise["defence"], noise["seeds"], noise["test images"]) == ("noise", "3", "1,000")
    assert noise["copy"] == f"42.0 [{low:.1f}, {high:.1f}]"
    low, high = stats.binomtest(300, 1000).proportion_ci(method="exact")
    assert (half["defence"], half["seeds"]) == ("noise 0.5", "1")
    assert half["copy"] == f"30.0 [{100 * low:.1f}, {100 * high:.1f}]"
    low, high = stats.binomtest(200, 400).proportion_ci(method="exact")
    assert noise["user"] == half["user"] == f"50.0 [{100 * low:.1f}, {100 * high:.1f}]"
    assert noise["queries (distinct)"] == "100 (50)"


def right_of(count, shift=0):
    """Of 400 test images `count`, starting at `shift`."""
    return (torch.arange(400) >= shift) & (torch.arange(400) < shift + count)


def test_copies_are_compared_on_the_same_test_images():
    """Against the same attack without a defence, which is compared with the best attack without a defence."""
    first, second = right_of(200), right_of(240)
    rows = [
        row(0, 0, defence="none", attack="mse", right=first),
        row(0, 0, defence="none", attack="infonce", right=second),
        row(0, 0, attack="mse", right=right_of(190, 5)),
    ]
    mse, infonce, noise = lines_of(rows)
    # 40 images are right for the one only.
    p, (low, high) = stats.binomtest(0, 40).pvalue, paired_interval(first, second)
    assert mse["difference"] == f"-10.0 [{low:+.1f}, {high:+.1f}], p {p:.2g} to infonce, none"
    assert infonce["difference"] == ""
    assert noise["difference"].startswith("-2.5 [")
    assert noise["difference"].endswith(f"p {stats.binomtest(0, 10).pvalue:.2g} to mse, none")


def test_a_difference_over_seeds_is_of_the_pairs_of_a_seed():
    free = [row(0, seed, defence="none", right=right_of(200)) for seed in (0, 1)]
    noise = [row(0, 0, right=right_of(190)), row(0, 1, right=right_of(180)), row(0, 2, right=right_of(0))]
    *_, line = lines_of([*free, *noise])
    ends = [paired_interval(right_of(count), right_of(200)) for count in (190, 180)]
    low, high = (sum(end) / 2 for end in zip(*ends, strict=True))
    p, _ = mcnemar(right_of(190), right_of(200))
    assert line["difference"] == f"-3.8 [{low:+.1f}, {high:+.1f}], p {p:.2g} to mse, none"


def test_other_test_images_are_not_paired():
    other = row(0, 0, right=right_of(180))
    other["copy"]["test_digest"] = "another"
    *_, line = lines_of([row(0, 0, defence="none", right=right_of(200)), other])
    assert line["difference"] == "-5.0 to mse, none"


def test_detection_and_ownership_are_shown_where_they_are_known():
    verified = {"accuracy": 61.23, "p_t": 0.0123, "p_encoders": 0.01, "p_holm": 0.04, "found": True}
    detection = {"auc_s": 0.876, "auc_s_low": 0.7, "auc_s_high": 0.95}
    (line,) = lines_of([row(40, 0, detection=detection, verified=verified)])
    assert (line["AUC, such a stream"], line["watermark"], line["p (Holm)"]) == ("0.88 [0.70, 0.95]", "61.2", "0.04")
    assert line["found"] == "1 of 1"
    (line,) = lines_of([row(40, 0)])
    assert {line[name] for name in ("AUC, such a stream", "watermark", "p (Holm)", "found")} == {""}


def test_what_a_defence_costs_the_user_is_of_the_same_test_images():
    defended, clean = right_of(180, 5), right_of(200)
    noise, none = row(40, 0), row(40, 0, defence="none", attack="infonce")
    noise["user"] |= {"defence": "noise", "right": packed(defended), "clean_right": packed(clean)}
    none["user"] |= {"defence": None, "right": packed(clean), "clean_right": packed(clean)}
    low, high = paired_interval(clean, defended)
    p, _ = mcnemar(clean, defended)
    found, free = lines_of([noise, none])
    assert found["user's loss"] == f"+5.0 [{low:+.1f}, {high:+.1f}], p {p:.2g}"
    assert free["user's loss"] == ""


def test_found_copies_of_several_seeds_are_counted():
    def of(*found):
        verified = [{"accuracy": 60, "p_holm": 0.01 * (1 + n), "found": one} for n, one in enumerate(found)]
        (line,) = lines_of([row(40, seed, verified=one) for seed, one in enumerate(verified)])
        return line["p (Holm)"], line["found"]

    assert of(True, False, True) == ("0.03", "2 of 3")
    assert of(None, None) == ("0.02", "undecided")


def test_a_row_shows_the_figure_of_its_own_kind_of_stream_or_none(write):
    """The cell of an attack whose stream is not named is empty; an attack's own flags of detect.py make its stream."""
    attacks = {
        "mse": {"flags": "--losstype mse", "stream": "task_plain_coverage"},
        "four times": {"flags": "--repeat 4", "stream": "task_repeat_nearest", "detect": "--repeat 4"},
        "restored": "--restore",
    }
    asked = []

    class Scripts:
        pool = ThreadPoolExecutor(1)

        def checkpoint(self, script, *words):
            return f"{script} {' '.join(words)}"

        def rows(self, script, *words):
            asked.append((script, *words))
            auc = {"auc_task_plain_coverage": 0.25, "auc_task_repeat_nearest": 0.75 if "4" in words else 0.5}
            return [{"top1_converged": 40, "queries": 24, "distinct": 12, **(auc if script == "detect.py" else {})}]

    experiment = Experiment(write(attacks=attacks, detect="--dataset shapes --streams 3", defences={"none": ""}))
    found = {line["attack"]: line["AUC, such a stream"] for line in lines_of(run_all(experiment, Scripts()))}
    assert found == {"mse": "0.25", "four times": "0.75", "restored": ""}
    watched = [words for words in asked if words[0] == "detect.py"]
    assert sorted("--repeat" in words for words in watched) == [False, True]


def test_an_attack_may_have_another_victim(write):
    """As the control that steals an untrained victim; the others keep theirs."""
    attacks = {"mse": "--losstype mse", "untrained": {"flags": "--epochstrain 0", "victim": "--epochs 0"}}
    stolen = {}

    class Scripts:
        pool = ThreadPoolExecutor(1)

        def checkpoint(self, script, *words):
            if script == "steal.py":
                stolen["--epochstrain 0" in " ".join(words)] = words[words.index("--victim") + 1]
            return f"{script} {' '.join(words)}"

        def rows(self, script, *words):
            return [{"top1_converged": 40, "queries": 24, "distinct": 12}]

    run_all(Experiment(write(attacks=attacks, defences={"none": ""})), Scripts())
    assert stolen == {False: f"run.py {TINY['victim']}", True: f"run.py {TINY['victim']} --epochs 0"}


def test_controls_are_no_suspects(write):
    """Neither an attacker who asked nothing nor one who stole from another victim."""
    attacks = {
        "mse": "--losstype mse",
        "own": "--attack own-simclr",
        "untrained": {"flags": "--epochstrain 0", "victim": "--epochs 0"},
    }
    suspects = []

    class Scripts:
        pool = ThreadPoolExecutor(1)

        def checkpoint(self, script, *words):
            return f"{script} {' '.join(words)}"

        def rows(self, script, *words):
            if script == "verify.py":
                suspects.extend(words[words.index("--suspect") + 1 :])
                return [{"checkpoint": suspect, "found": True, "p_holm": 0.01} for suspect in suspects]
            queries = 0 if "own-simclr" in " ".join(words) else 24
            return [{"top1_converged": 40, "queries": queries, "distinct": queries}]

    rows = run_all(Experiment(write(attacks=attacks, defences={"none": ""}, verify="--method watermark")), Scripts())
    assert len(suspects) == 1
    assert "--losstype mse" in suspects[0]
    assert {line["attack"]: line["found"] for line in lines_of(rows)} == {"mse": "1 of 1", "own": "", "untrained": ""}


def test_figures_that_a_probe_does_not_give_are_left_out(tmp_path):
    """As with `judge: --probe knn`."""
    rows = [{**row(40, seed), "copy": {"knn": 30.0 + seed, "top1_converged": None}, "user": {}} for seed in range(3)]
    (line,) = lines_of(rows)
    assert line["copy, kNN"].startswith("31.0 [")
    assert {line[name] for name in ("copy", "difference", "user", "test images")} == {""}
    picture(rows, tmp_path / "curves.png")
    assert not [*tmp_path.iterdir()]


def test_a_curve_goes_through_the_strengths_in_their_order():
    points = _curve([row(40, 0, 2.0, 48.0), row(44, 1, 2.0, 48.0), row(30, 0, 1.0, 49.0)])
    assert points == [(42, 48.0, 2.0), (30, 49.0, 1.0)]
