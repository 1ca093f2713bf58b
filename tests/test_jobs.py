"""Several processes as one job, on the CPU: they find each other, and compute what a single process would."""

import contextlib
import dataclasses
import os
import socket
import threading

import pytest
import torch

from jobs import meeting
from jobs.ending import Misplaced
from jobs.machine import Machine, Threads, set_up
from jobs.meeting import set_up_job
from jobs.place import Place, Processes, find_place, first_host, refuse_several
from settings import Parser
from tests import jobs
from training.run import run_name
from utils import UserError, first_by_launcher

# ---- who this is -----------------------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
SLURM = {
    **{"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
    **{"SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "2"},
}


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, {}, None),
        ({}, {"world_size": -1, "rank": 0}, None),
        ({}, {"world_size": 1, "rank": 0}, None),
        ({**TORCHRUN, "MASTER_PORT": "7"}, {}, Place(3, 8, 1, 2, "a", 7)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, {}, None),
        (SLURM, {}, Place(5, 8, 1, 4, "gpu003", 20000 + 12342)),
        ({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "9"}, {}, Place(5, 8, 1, 4, "head", 9)),
        ({**SLURM, **TORCHRUN, "MASTER_PORT": "7"}, {}, Place(3, 8, 1, 2, "a", 7)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, {}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {}, None),  # a batch script itself
        ({}, {"world_size": 2, "rank": 1, "dist_url": "tcp://host:23"}, Place(1, 2, 0, 1, "host", 23)),
    ],
)
def test_the_place_of_a_process(environment, flags, expected):
    assert find_place(environment, Processes(**flags)) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("gpu[003-006,9],big1", "gpu003"), ("a7,b8", "a7"), ("x[1-2]-ib,y", "x1-ib")],
)
def test_the_first_host_of_a_list_of_slurm(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"rank": 0}, "--dist-url None is not tcp://"),
        ({"rank": 0, "dist_url": "file:///x"}, "--dist-url file:///x"),
        ({"rank": 2, "dist_url": "tcp://h:1"}, "--rank 2 is none of the 2"),
        ({"dist_url": "tcp://h:1"}, "--rank -1 is none of the 2"),
    ],
)
def test_flags_that_name_no_place(flags, named):
    with pytest.raises(UserError, match=named):
        find_place({}, Processes(**{"world_size": 2, **flags}))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', not a number from 0 to 1"),
        ({"RANK": "", "WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2', not a number from 0 to 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a number from 1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"}, "LOCAL_RANK is 'a'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "0"}, "MASTER_PORT is '0', not a number from 1 to 65535"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999999"}, "MASTER_PORT is '99999999'"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS is 'x'"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": ""}, "SLURM_PROCID is ''"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1_3"}, "SLURM_JOB_ID is '1_3'"),
    ],
)
def test_variables_that_name_no_place(variables, said, monkeypatch):
    with pytest.raises(UserError, match=said):
        find_place(variables, Processes())
    for name in ("RANK", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    first_by_launcher()  # who says it


def test_a_job_of_no_processes_is_refused():
    with pytest.raises(UserError, match="--world-size 0"):
        find_place({}, Processes(world_size=0))


def test_a_host_that_is_not_there_is_said_at_once(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "no host")
    with pytest.raises(UserError, match="no host 'no host': correct MASTER_ADDR or --dist-url"):
        set_up_job(Processes())


@pytest.fixture
def listener():
    """What listens at a port, and connections to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def place_at(server, rank=1, count=2):
    return Place(rank, count, 0, 1, "127.0.0.1", server.getsockname()[1])


@pytest.mark.parametrize("answers", [False, True])
def test_another_program_at_the_port_is_told_from_a_job(answers, listener, monkeypatch):
    monkeypatch.setattr(meeting, "ANSWER", 1.0)
    monkeypatch.setattr(meeting, "PATIENCE", 0.3)
    connections = []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connections.append(listener.accept()[0])
                if answers:
                    connections[-1].sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(Misplaced, match=r"what listens at 127.0.0.1:\d+ is not process 0 of this job"):
        meeting.connect(place_at(listener), host=False)
    with pytest.raises(Misplaced, match=r"process 0 cannot listen at 127.0.0.1:\d+, is the port free"):
        meeting.connect(place_at(listener, rank=0), host=True)
    listener.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


def test_a_process_that_is_not_started_is_said(monkeypatch):
    monkeypatch.setattr(meeting, "PATIENCE", 0.3)
    here = Place(0, 2, 0, 1, "127.0.0.1", jobs.free_port())
    with pytest.raises(Misplaced, match=r"process 1 of 2 found no process 0 at 127.0.0.1:\d+"):
        meeting.connect(dataclasses.replace(here, rank=1), host=False)
    with pytest.raises(Misplaced, match="of 2 processes 1 did not come in 0 seconds: are all started"):
        meeting.call_roll(meeting.connect(here, host=True), here)


def test_processes_that_do_not_fit_each_other_are_told():
    here = Place(0, 2, 0, 1, "127.0.0.1", jobs.free_port())
    store = meeting.connect(here, host=True)
    first = threading.Thread(target=meeting.call_roll, args=(store, here))
    first.start()
    other = meeting.connect(dataclasses.replace(here, rank=1), host=False)
    other.wait(["here/0"])
    with pytest.raises(Misplaced, match="process 2 is of a job of 3 processes, others are of 2"):
        meeting.call_roll(other, dataclasses.replace(here, rank=2, processes=3))
    with pytest.raises(Misplaced, match="two processes of the job have rank 0"):
        meeting.call_roll(other, here)
    meeting.call_roll(other, dataclasses.replace(here, rank=1))
    first.join(10)
    assert not first.is_alive()


def test_a_script_that_works_alone_refuses_to_be_one_of_many(monkeypatch):
    refuse_several()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["there/linear_eval.py"])
    with pytest.raises(UserError, match="linear_eval is one process, this is one of 2: start it without"):
        refuse_several()


# ---- the machine -----------------------------------------------------------------------------------------------------


def command_of(*words, owners=(Machine, Threads, Processes)):
    return Parser("A script.", owners, kind="run", core=("seed",)).parse(["--device", "cpu", *words])


@pytest.fixture
def threads():
    """The number of threads, as it is and will be again."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_what_the_command_line_says_of_the_machine(threads, tmp_path):
    command = command_of("-j", "1", "--precision", "bf16", "--seed", "3", "--resume", str(tmp_path))
    machine, precision = set_up(command)
    assert (machine.seed, machine.resume, machine.clear) == (3, tmp_path, True)
    assert (precision.name, precision.device) == ("bf16", torch.device("cpu"))
    assert torch.get_num_threads() == 1
    assert [type(made) for made in command.in_force] == [Machine, Processes, Threads]


@pytest.mark.parametrize(
    ("words", "resume"), [((), False), (["--resume"], True), (["--resume", "False"], False), (["--resume", ""], False)]
)
def test_resume_is_a_switch_or_a_path(words, resume):
    assert set_up(command_of(*words))[0].resume is resume


def test_what_is_in_force_already_stays_so():
    command = command_of()
    command.use_all(Machine, Threads, Processes)
    machine, _ = set_up(command)
    assert machine is command[Machine]
    assert len(command.in_force) == 3


def test_fp16_precision_is_precision_fp16_in_the_runs_name_too(monkeypatch):
    monkeypatch.setattr("jobs.machine.Precision.choose", lambda name, device: name)
    names = set()
    for words in (["--fp16-precision"], ["--precision", "fp16"], ["--fp16_precision", "True", "--precision", "fp16"]):
        command = command_of(*words)
        machine, precision = set_up(command)
        assert machine.precision == precision == command[Machine].precision == command.precision == "fp16"
        names.add(run_name(command))
    assert names == {"run-seed0-precision=fp16"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--fp16-precision"], "fp16 needs a CUDA device"),
        (["--fp16-precision", "--precision", "bf16"], "--precision bf16 contradict each other"),
        (["--gpu", "1"], "--gpu-index has no effect with --device cpu: leave it out"),
        (["--device", "tpu"], "tpu"),
        (["--world-size", "2", "--rank", "0"], "--dist-url None is not tcp"),
    ],
)
def test_what_cannot_be_had_is_one_line(words, line):
    with pytest.raises(UserError, match=line):
        set_up(command_of(*words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_nccl_needs_gpus():
    job = ("--world-size", "2", "--rank", "0", "--dist-url", "tcp://127.0.0.1:1", "--dist-backend", "nccl")
    with pytest.raises(UserError, match="--dist-backend nccl needs GPUs"):
        set_up(command_of(*job))


def test_a_flag_at_its_default_is_accepted_where_it_has_no_effect():
    set_up(command_of("--gpu", "0"))
    command = command_of("--gpu", "0")
    command.use_all(Machine, Threads, Processes)
    command.refuse_idle()


@pytest.mark.parametrize("words", [["-j", "0"], ["--gpu", "-1"], ["--world-size", "-2"], ["--precision", "fp8"]])
def test_values_out_of_range_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        command_of(*words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_scripts_for_one_process_have_no_flags_for_several(monkeypatch, threads):
    set_up(command_of(owners=(Machine,)))
    monkeypatch.setitem(os.environ, "SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setitem(os.environ, "SLURM_PROCID", "1")
    with pytest.raises(UserError, match="is one process, this is one of 4"):
        set_up(command_of(owners=(Machine, Threads)))


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    """What a single process makes of the whole batch."""
    return {
        "losses": jobs.compare_losses(),
        "correlation": jobs.cross_correlation(),
        "batch norm": jobs.batch_norm(),
        "consistent": jobs.consistent_answers(),
    }


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request, tmp_path_factory):
    """What several processes make of it."""
    path = tmp_path_factory.mktemp("job") / "found.pt"
    assert jobs.run_job(request.param, jobs.numbers, path) == [0] * request.param
    return torch.load(path)


@pytest.mark.parametrize("name", jobs.COMPARING)
def test_losses_and_gradients_are_those_of_one_process(alone, together, name):
    for found, expected in zip(together["losses"][name], alone["losses"][name], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_correlation_matrix_is_that_of_one_process(alone, together):
    torch.testing.assert_close(together["correlation"], alone["correlation"], rtol=1e-5, atol=1e-5)


def test_batch_norm_is_over_all_processes(alone, together):
    assert together["batch norm"].keys() == alone["batch norm"].keys()
    for name, expected in alone["batch norm"].items():
        torch.testing.assert_close(together["batch norm"][name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_perceptual_hashes_are_those_of_the_images_of_all_processes(alone, together):
    """The ledger's, and those by the secret that noise follows from."""
    (answers, ledger), (expected, of_one) = together["consistent"], alone["consistent"]
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ledger["default"]["near"], of_one["default"]["near"])
    assert ledger["default"]["near"].numel() == 3 * (jobs.IMAGES - 1)  # two images are the same
    torch.testing.assert_close(answers[2], answers[5], rtol=1e-4, atol=1e-4)
    assert (answers[2] - answers[3]).abs().mean() > 1


@pytest.mark.parametrize("total", [0, 1, 3, 7])
def test_uneven_shares_come_back_in_order(together, total):
    for found in together["uneven"][total]:
        assert found[:, 0].tolist() == list(range(total))


def test_a_flag_of_any_process_is_seen_by_all(together):
    assert together["any"] == [False, True]
