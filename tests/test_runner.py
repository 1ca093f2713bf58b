"""Grids of runs: their order, what has finished, what failed, signals and kills; real scripts on tiny data."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
import yaml

from experiments.batches import submit
from experiments.grid import Grid
from experiments.runner import Runner, read_cells, select
from experiments.workers import Workers
from jobs.ending import SAVED
from tests.conftest import ROOT
from utils import UserError

AXES = {"loss": ["mse", "infonce"], "seed": "{seeds}"}
MORE = "--device cpu --precision fp32"
STEPS = {
    "victim": f"run.py --dataset npz:{{root}}/tiny.npz --arch resnet10w32 --epochs {{epochs}} -b 16 {MORE}",
    "copy": "steal.py --victim {victim} --datasetsteal npz:{root}/tiny.npz --archstolen resnet10w32 --epochs 1 -b 8 "
    f"--num_queries 24 --losstype {{loss}} --seed {{seed}} {MORE}",
    "judged": "linear_eval.py --modeltype stolen --stolen {copy} --dataset-test npz:{root}/tiny.npz -n 16 "
    f"--num-test 16 --probe-epochs 1 {MORE}",
    "all": "verify.py --method similarity --victim {victim} --suspect {copy*}",
}
ENDS = {key: STEPS[key] for key in ("victim", "copy", "judged")}


def grid_of(folder, steps=ENDS, axes=AXES, **scale):
    """A grid in a folder, whose runs are below it."""
    file = folder / "tiny.yaml"
    scales = {"tiny": {"root": shlex.quote(str(folder)), "epochs": 1, "seeds": [0], **scale}}
    file.write_text(yaml.safe_dump({"axes": axes, "scales": scales, "steps": steps}, sort_keys=False))
    return Grid(file, "tiny", folder / "runs", {})


def lines_in(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def log_of(cell):
    return cell.folder.with_name(f"{cell.folder.name}.log")


def starts(grid):
    """How often the script of each cell was started."""
    return [log_of(cell).read_text().count("$ python") if log_of(cell).exists() else 0 for cell in grid.unique()]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


# ---- a grid that ran -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory, write):
    """A folder, with a space in its name, where a grid has finished: a victim, two copies, each judged."""
    folder = tmp_path_factory.mktemp("my grid")
    write(folder)
    grid = grid_of(folder)
    assert Runner(grid, folder, jobs=2).run(grid.unique()) == ""
    return folder


@pytest.fixture(scope="module")
def write():
    """Writes random images, 64 for training and 64 for tests, where the grids expect them."""

    def file(folder):
        draw = torch.Generator().manual_seed(0)
        arrays = {}
        for split in ("train", "test"):
            pixels = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=draw)
            arrays |= {f"x_{split}": pixels.numpy(), f"y_{split}": (torch.arange(64) % 4).numpy()}
        numpy.savez(folder / "tiny.npz", **arrays)

    return file


@pytest.fixture
def again(ran, tmp_path):
    """The grid that has finished, and a folder of results of the test's own."""
    shutil.copy(ran / "cells.jsonl", tmp_path)
    return grid_of(ran), tmp_path


def test_cells_run_after_what_they_need_and_have_a_line_each(ran):
    grid, lines = grid_of(ran), lines_in(ran)
    commands = [line["command"] for line in lines]
    assert sorted(commands) == sorted(cell.command for cell in grid.unique())
    for cell in grid.unique():
        assert all(commands.index(need.command) < commands.index(cell.command) for need in cell.needs)
    by_step = {step: [line for line in lines if line["step"] == step] for step in grid.steps}
    assert [len(by_step[step]) for step in grid.steps] == [1, 2, 2]
    (victim,) = by_step["victim"]
    assert (victim["at"], victim["seeds"], victim["queries"], victim["rows"]) == ({}, {}, None, [])
    assert victim["images_trained"] == 64
    for line in by_step["copy"]:
        assert (line["seeds"], line["queries"], line["images_trained"]) == ({"seed": "0"}, 24, 24)
    for line in by_step["judged"]:
        (row,) = line["rows"]
        assert (row["losstype"], row["queries"], line["queries"]) == (line["at"]["loss"], 24, 24)
        assert row["command"] == " ".join(shlex.split(line["command"])[1:])
        assert (row["commit"], row["device"], row["torch"]) == (
            line["commit"],
            line["device"],
            line["versions"]["torch"],
        )
        assert line["run_seconds"] >= row["seconds"] > 0
        assert os.path.basename(line["folder"]) == os.path.basename(row["run"])


def test_what_has_finished_does_not_run_again(again, capsys):
    grid, folder = again
    before = starts(grid)
    assert before == [1] * 5
    assert Runner(grid, folder).run(grid.unique()) == ""
    assert starts(grid) == before
    assert len(lines_in(folder)) == 5
    assert capsys.readouterr().out == ""


def test_a_damaged_line_is_named_and_its_run_is_read_again(again, capsys):
    """The run itself has finished: its script says so, and leaves the row as it was."""
    grid, folder = again
    lines = (folder / "cells.jsonl").read_text().splitlines()
    whole = read_cells(folder)
    command = grid.where("judged", {"loss": "mse", "seed": "0"}).command
    (number,) = (n for n, line in enumerate(lines) if json.loads(line)["command"] == command)
    lost = json.loads(lines[number])
    lines[number] = lines[number][:100]
    (folder / "cells.jsonl").write_text("\n".join([*lines, '{"step": "x"}', ""]))
    before = starts(grid)
    runner = Runner(grid, folder)
    said = capsys.readouterr().err
    assert f"cells.jsonl: 1 broken lines are skipped ({number + 1})" in said
    assert "cells.jsonl: 1 lines are skipped: they are about no cell" in said
    assert [cell.command for cell in runner.left(grid.unique())] == [lost["command"]]
    assert runner.run(grid.unique()) == ""
    assert "5/5 done: judged loss=mse seed=0 (" in capsys.readouterr().out
    assert sum(starts(grid)) == sum(before) + 1
    assert read_cells(folder)[lost["command"]]["rows"] == lost["rows"] != []
    assert read_cells(folder).keys() == whole.keys()


def test_a_run_whose_folder_is_gone_runs_again_where_it_is_needed(again):
    """Lines that were kept without their runs, as those of a repository, are as good as runs."""
    grid, folder = again
    victim, copy, judged = (grid.where(step, {"loss": "infonce", "seed": "0"}) for step in ("victim", "copy", "judged"))
    lines = read_cells(folder)
    shutil.rmtree(copy.folder)
    assert Runner(grid, folder).left(grid.unique()) == []
    kept = [line for line in lines.values() if line["command"] != judged.command]
    (folder / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    runner = Runner(grid, folder, jobs=2)
    assert runner.left(grid.unique()) == [copy, judged]  # the victim's run is there
    shutil.rmtree(victim.folder)
    assert runner.left(grid.unique()) == [victim, copy, judged]
    assert runner.run(grid.unique()) == ""
    assert read_cells(folder)[judged.command]["rows"][0]["top1"] == lines[judged.command]["rows"][0]["top1"]
    assert runner.left(grid.unique()) == []


def test_the_plan_is_the_commands_and_the_time_left(again):
    grid, folder = again
    lines = [line for line in lines_in(folder) if line["step"] != "judged" or line["at"]["loss"] == "mse"]
    lines = [{**line, "run_seconds": 240} for line in lines if line["at"].get("loss") != "infonce"]
    (folder / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine = {line["command"] for line in lines}
    commands = [f"{cell.command}{'  # done' * (cell.command in mine)}" for cell in grid.unique()]
    assert len(mine) == 3
    plan = Runner(grid, folder, jobs=2).plan(grid.unique())
    assert plan == [*commands, "# 2 of 5 runs are left: about 4 min"]
    (folder / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    plan = Runner(grid, folder).plan(grid.unique())
    assert plan[-1] == "# 3 of 5 runs are left: about 4 min, and the time of judged"
    (folder / "cells.jsonl").unlink()
    assert Runner(grid, folder).plan(grid.unique()) == [cell.command for cell in grid.unique()]


def test_a_command_of_the_plan_is_that_of_the_run(ran):
    """The run's own record of how it was started, and the shell's reading of the line."""
    grid = grid_of(ran)
    for cell, line in zip(grid.unique(), Runner(grid, ran).plan(grid.unique()), strict=True):
        config = yaml.safe_load((cell.folder / "config.yml").read_text())
        words = shlex.split(line, comments=True)
        assert words[0] == "python"
        assert config["provenance"]["command"] == " ".join(words[1:])


@pytest.mark.slow
def test_a_run_computes_what_an_interpreter_of_its_own_computes(ran, run_script, tmp_path):
    (cell,) = (cell for cell in grid_of(ran).unique() if cell.step == "victim")
    threads = str(yaml.safe_load((cell.folder / "config.yml").read_text())["threads"])
    words = [*cell.words[: cell.words.index("--run-dir")], "--run-dir", tmp_path / "alone", "--workers", threads]
    assert run_script(*words)[0] == 0
    mine, other = (torch.load(folder / "checkpoint.pth.tar") for folder in (cell.folder, tmp_path / "alone"))
    assert all(torch.equal(value, other["state_dict"][key]) for key, value in mine["state_dict"].items())


# ---- a part of a grid ------------------------------------------------------------------------------------------------


def test_a_part_of_a_grid_is_what_agrees_and_what_that_needs(tmp_path):
    names = {"supcon, with labels": "supcon", "mse": "mse"}
    grid = grid_of(tmp_path, STEPS, {"loss": names, "seed": [0, 1]})
    assert len(grid.unique()) == 10

    def chosen(only):
        return [str(cell) for cell in select(grid, only)]

    assert chosen("loss=mse,seed=1") == ["victim", "copy loss=mse seed=1", "judged loss=mse seed=1"]
    labelled = chosen("loss=supcon, with labels, seed=0")
    assert labelled == ["victim", *(f"{step} loss=supcon, with labels seed=0" for step in ("copy", "judged"))]
    assert chosen("seed=0,seed=1") == [str(cell) for cell in grid.unique()]
    assert "all" not in chosen("seed=0")


def test_a_cell_that_stands_for_several_points_is_chosen_by_each(tmp_path):
    """The victim of both attacks is one run, known by the first of them."""
    axes = {"attack": {"mse": "--losstype mse", "own": "--attack own-simclr"}}
    steps = {"victim": "run.py --epochs 1 {attack.victim}", "copy": "steal.py --victim {victim} {attack}"}
    grid = grid_of(tmp_path, steps, axes)
    assert [str(cell) for cell in select(grid, "attack=own")] == ["victim attack=mse", "copy attack=own"]


@pytest.mark.parametrize(
    ("only", "said"),
    [
        ("los=mse", "--only: 'los' is unknown: did you mean 'loss'?"),
        ("loss=infonc", "--only loss: 'infonc' is unknown: did you mean 'infonce'?"),
        ("mse", "--only: 'mse' is unknown: give loss, seed"),
        ("", "--only: '' is unknown: give loss, seed"),
    ],
)
def test_an_axis_or_a_value_that_is_not_there_is_named(tmp_path, only, said):
    with pytest.raises(UserError, match=re.escape(said)):
        select(grid_of(tmp_path), only)


def test_a_part_that_is_empty_is_refused(tmp_path):
    steps = {"copy": {"run": "steal.py --losstype {loss}", "without": {"loss": ["mse"]}}}
    with pytest.raises(UserError, match="--only loss=mse leaves no run"):
        select(grid_of(tmp_path, steps, {"loss": ["mse", "infonce"]}), "loss=mse")


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_run_that_fails_leaves_out_those_that_need_it_and_no_others(again, capsys):
    finished, folder = again
    grid = grid_of(finished.runs.parent, axes={"loss": ["nonsense", "mse"], "seed": [0]})
    runner = Runner(grid, folder)
    bad = grid.where("copy", {"loss": "nonsense", "seed": "0"})
    assert runner.run(grid.unique()) == "1 of 5 runs failed, 1 that need them were left out: see above"
    out = capsys.readouterr().out
    assert "3/5 done, 1 failed, " in out
    assert " left: copy loss=nonsense seed=0 (failed, " in out
    told = out[out.index("\nfailed: ") + 1 :].splitlines()
    assert told[:3] == ["failed: copy loss=nonsense seed=0", f"  {bad.command}", f"  {log_of(bad)}"]
    assert told[3].startswith("  steal.py: argument --losstype: ")
    assert told[4:] == ["left out: judged loss=nonsense seed=0, needs copy loss=nonsense seed=0"]
    assert bad.command not in read_cells(folder)
    assert bad in runner.left(grid.unique())


ENDINGS = {
    "sys.exit(75)": "exit code 75",
    "os.kill(os.getpid(), 9)": "ended by SIGKILL",
    "sys.exit('error: bees')": "bees",
    "sys.exit(3)": "exit code 3",
    "raise KeyError('bug')": "KeyError: 'bug'",
    "print('nothing')": "config.yml is not a file",
}


def test_how_a_script_ended_is_said(tmp_path, capsys):
    """Scripts of the test's own, in a folder with a space, each of which ends in one of these ways."""
    folder = tmp_path / "my scripts"
    folder.mkdir()
    scripts = [folder / f"{number}.py" for number in range(len(ENDINGS))]
    for script, ending in zip(scripts, ENDINGS, strict=True):
        script.write_text(f"import os, sys\n{ending}\n")
    ways = {str(number): shlex.quote(str(script)) for number, script in enumerate(scripts)}
    grid = grid_of(tmp_path, {"ends": "{way}"}, {"way": ways})
    assert Runner(grid, tmp_path, jobs=3).run(grid.unique()) == "6 of 6 runs failed: see above"
    out = capsys.readouterr().out
    for way, said in enumerate(ENDINGS.values()):
        last = out.partition(f"failed: ends way={way}\n")[2].splitlines()[2]
        assert last.endswith(said), (way, last)
    assert not (tmp_path / "cells.jsonl").exists()


# ---- processes -------------------------------------------------------------------------------------------------------

LOOK = """
import json, multiprocessing, os, signal, sys, torch
print(json.dumps({
    "name": __name__, "words": sys.argv, "folder": os.getcwd(), "start": multiprocessing.get_start_method(),
    "threads": [torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]],
    "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "sum": torch.ones(2000, 2000).sum().item(),
}))
"""


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_script_finds_what_it_finds_in_an_interpreter_of_its_own(tmp_path, method):
    script, log = tmp_path / "look.py", tmp_path / "log"
    script.write_text(LOOK)
    environment = dict(os.environ)
    process = Workers([str(script)], 2, method).start([str(script), "--flag", "a b"], log)
    process.join()
    head, told = log.read_text().splitlines()
    assert head == f"$ python {script} --flag 'a b'"
    assert process.exitcode == 0
    usual = subprocess.run([sys.executable, "-c", "import multiprocessing as m; print(m.get_start_method())"], **TEXT)
    assert json.loads(told) == {
        **{"name": "__main__", "words": [str(script), "--flag", "a b"], "folder": str(ROOT), "blocked": 0},
        **{"start": usual.stdout.strip(), "threads": [2, "2"], "sum": 4e6},
    }
    assert dict(os.environ) == environment
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


TEXT = {"capture_output": True, "text": True, "check": True}


def test_the_server_has_a_single_thread_and_no_gpu(tmp_path):
    """A fork has but the thread that forks: others' work would be lost, and so would a GPU's."""
    script = tmp_path / "look.py"
    script.write_text(
        "import os, sys, torch\n"
        "print(torch.cuda.is_initialized(), len(os.listdir(f'/proc/{os.getppid()}/task')), 'simclr' in sys.modules)\n"
    )
    process = Workers(["run.py", str(script)], 2).start([str(script)], tmp_path / "log")
    process.join()
    assert (tmp_path / "log").read_text().splitlines()[-1] == "False 1 True"


def test_two_processes_do_not_run_a_cell_at_the_same_time(tmp_path):
    """As when two experiments need the same victim."""
    script, log = tmp_path / "turn.py", tmp_path / "log"
    script.write_text("import time\nprint('begins')\ntime.sleep(0.3)\nprint('ends')\n")
    workers = Workers([str(script)], 1)
    started = [workers.start([str(script)], log) for _ in range(3)]
    for process in started:
        process.join()
    assert log.read_text().splitlines() == [f"$ python {script}", "begins", "ends"] * 3


def test_a_second_process_in_the_folder_gets_a_line(again):
    grid, folder = again
    script = folder / "takes.py"
    script.write_text(
        "import pathlib, sys, time\nfrom files.writing import lock\n"
        "lock(pathlib.Path(sys.argv[1]))\nprint('taken')\ntime.sleep(60)\n"
    )
    other = Workers([str(script)], 1).start([str(script), str(folder)], folder / "log")
    wait_for(lambda: (folder / "log").exists() and "taken" in (folder / "log").read_text())
    with pytest.raises(UserError, match="another process writes in"):
        Runner(grid, folder).run(grid.unique())
    other.terminate()
    other.join()
    assert other.exitcode == SAVED  # before a script listens, a signal has nothing to save
    assert (folder / "log").read_text().endswith("stopped by SIGTERM\n")
    assert Runner(grid, folder).run(grid.unique()) == ""


# ---- signals and kills -----------------------------------------------------------------------------------------------

# Victims that take their time, side by side, and a copy of each.
EPOCHS = 5
SLOW = {
    "victim": f"{STEPS['victim']} --seed {{seed}}",
    "copy": STEPS["copy"].replace("{loss}", "mse"),
}
MAIN = """
print(__name__)  # once: the scripts' processes have no need of this module
import sys
from pathlib import Path
from experiments.batches import submit
from experiments.grid import Grid
from experiments.runner import Runner
from jobs.ending import script

@script
def main():
    folder = Path(sys.argv[1])
    grid = Grid(folder / "tiny.yaml", "tiny", folder / "runs", {})
    print(Runner(grid, folder, jobs=2).run(grid.unique()))

if __name__ == "__main__":
    main()
"""


def processes_of(group):
    """The processes of a group, but for those that have ended and that nobody has asked for."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], **TEXT).stdout.splitlines()
    return [line for line in listed if line.split()[0] == str(group) and not line.split()[1].startswith("Z")]


def start(folder):
    """A runner in a process of its own, with two scripts side by side, in a group with all that it starts."""
    (folder / "main.py").write_text(MAIN)
    line = [sys.executable, folder / "main.py", folder]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)


@pytest.mark.parametrize(
    ("number", "group"),
    [
        (signal.SIGKILL, False),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
    ],
)
def test_a_grid_that_is_stopped_or_killed_goes_on_and_runs_nothing_twice(tmp_path, write, number, group):
    """To the runner alone, or to it, the server and all scripts, as Ctrl-C at a terminal does."""
    write(tmp_path)
    grid = grid_of(tmp_path, SLOW, {"seed": "{seeds}"}, seeds=[0, 1], epochs=EPOCHS)
    victims = [cell for cell in grid.unique() if cell.step == "victim"]
    with start(tmp_path) as started:
        wait_for(lambda: all((cell.folder / "metrics.jsonl").exists() for cell in victims))
        (os.killpg if group else os.kill)(started.pid, number)
        out, err = started.communicate(timeout=60)
    assert out in ("__main__\n", "")  # what is killed may not have flushed
    if number == signal.SIGKILL:
        assert started.returncode == -signal.SIGKILL
    else:
        assert started.returncode == SAVED
        assert err == f"stopped by {number.name}: the same command goes on from there\n"
    assert not (tmp_path / "cells.jsonl").exists()
    # The scripts that were not told stop too, and save; who goes on at once waits for them.
    assert Runner(grid, tmp_path, jobs=2).run(grid.unique()) == ""
    wait_for(lambda: not processes_of(started.pid))
    assert sorted(line["command"] for line in lines_in(tmp_path)) == sorted(cell.command for cell in grid.unique())
    assert starts(grid) == [2 if cell in victims else 1 for cell in grid.unique()]
    for cell in victims:
        said = log_of(cell).read_text()
        assert re.search(r"^stopped (at|after) .*: --resume goes on from there$", said, re.MULTILINE)
        assert re.search(r"^resumed after epoch \d+", said, re.MULTILINE)
        epochs = [json.loads(line)["epoch"] for line in (cell.folder / "metrics.jsonl").read_text().splitlines()]
        assert epochs == list(range(EPOCHS))
        assert read_cells(tmp_path)[cell.command]["images_trained"] == EPOCHS * 64


@pytest.mark.slow
def test_a_second_ctrl_c_ends_everything_at_once(tmp_path, write):
    write(tmp_path)
    script = tmp_path / "deaf.py"
    script.write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('hears nothing')\ntime.sleep(600)\n"
    )
    grid = grid_of(tmp_path, {"deaf": f"{shlex.quote(str(script))} {{seed}}"}, {"seed": [0, 1]})
    logs = [log_of(cell) for cell in grid.unique()]
    with start(tmp_path) as started:
        wait_for(lambda: all(log.exists() and "hears nothing" in log.read_text() for log in logs))
        os.killpg(started.pid, signal.SIGINT)
        time.sleep(1)
        assert started.poll() is None
        assert len(processes_of(started.pid)) > 2
        os.killpg(started.pid, signal.SIGINT)
        _, err = started.communicate(timeout=20)
    assert (started.returncode, err) == (130, "stopped at once by a second Ctrl-C\n")
    wait_for(lambda: not processes_of(started.pid), seconds=20)


# ---- Slurm -----------------------------------------------------------------------------------------------------------

# In the place of Slurm's programs: the first notes how it is called, the other runs a command.
SBATCH = '#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>"$CALLS"\nwc -l <"$CALLS"\n'
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'


def test_steps_become_job_arrays_that_wait_for_each_other(tmp_path, monkeypatch):
    """What sbatch is told, and what a task of an array runs."""
    folder = tmp_path / "my results"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHON", sys.executable)
    script = folder / "words.py"
    script.write_text("import sys\nprint(sys.argv[1:3])\n")
    one = f"{shlex.quote(str(script))} victim 'a b'"
    steps = {"victim": one, "copy": f"{shlex.quote(str(script))} {{victim}} {{seed}}"}
    grid = grid_of(folder, steps, {"seed": [0, 1, 2]})
    assert submit(grid, grid.unique(), folder, ["--gres=none"]) == [
        "victim: job 1, 1 runs",
        "copy: job 2, 3 runs, after 1",
    ]
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith(f"--parsable --array=0-0 --job-name=tiny-victim --output={folder}/slurm/")
    assert first.endswith(f" --gres=none {folder}/slurm/victim.sbatch")
    assert " --array=0-2 --job-name=tiny-copy " in second
    assert " --dependency=afterok:1 --kill-on-invalid-dep=yes " in second
    victim, *copies = grid.unique()
    for step, task, words in (("victim", 0, ["victim", "a b"]), ("copy", 2, [str(victim.folder), "2"])):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        done = subprocess.run(["bash", folder / "slurm" / f"{step}.sbatch"], cwd=tmp_path, **TEXT)
        assert done.stdout == f"{words}\n"
    # What has finished is left out, and nothing waits for it.
    assert submit(grid, copies[:1], folder) == ["copy: job 3, 1 runs"]
    assert "dependency" not in (tmp_path / "calls").read_text().splitlines()[-1]


def test_without_slurm_or_where_it_refuses_there_is_a_line(tmp_path, monkeypatch):
    grid = grid_of(tmp_path, {"victim": "run.py"}, {"seed": [0]})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch on this machine"):
        submit(grid, grid.unique(), tmp_path)
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(UserError, match=r"sbatch refused .*victim.sbatch: invalid partition"):
        submit(grid, grid.unique(), tmp_path)
