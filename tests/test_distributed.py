"""Several processes as one job, on the CPU: they find each other, compute what one would, and end together."""

import argparse
import itertools

import pytest
import torch

import linear_eval
from distributed import Place, find_place, first_host
from tests import jobs
from utils import UserError

FLAGS = {"world_size": -1, "rank": -1, "dist_url": None}


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
    assert find_place(environment, argparse.Namespace(**{**FLAGS, **flags})) == expected


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
        find_place({}, argparse.Namespace(**{**FLAGS, "world_size": 2, **flags}))


def test_a_script_that_works_alone_refuses_to_be_one_of_many(refused, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    line = ("--dataset", "shapes", "--dataset-test", "shapes")
    assert "linear_eval is one process, this is one of 2: start it without" in refused(linear_eval, *line)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    """What one process makes of the whole batch."""
    return {
        "losses": jobs.compare_losses(),
        "correlation": jobs.cross_correlation(),
        "batch norm": jobs.batch_norm(),
    }


@pytest.fixture(scope="module", params=[2, 4])
def together(request, tmp_path_factory):
    """What so many processes make of it."""
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


def test_uneven_shares_come_back_in_order_and_flags_are_seen_by_all(together):
    assert together["uneven"][:, 0].tolist() == list(range(7))
    assert together["any"] == [False, True]


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    assert jobs.run_job(1, jobs.train_all, folder) == [0]
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def many_processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"of-{request.param}")
    assert jobs.run_job(request.param, jobs.train_all, folder) == [0] * request.param
    return folder, request.param


RUNS = [
    *(f"victim-{name}" for name in ("infonce", "softnn", "supcon", "barlow", "supervised")),
    *(f"copy-{name}" for name in ("infonce", "contsteal", "symmetrized", "rda")),
]


@pytest.mark.parametrize("name", RUNS)
def test_weights_after_three_steps_are_those_of_one_process(one_process, many_processes, name):
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


def test_together_they_never_exceed_the_budget(tmp_path, capfd):
    assert jobs.run_job(2, jobs.overspend, tmp_path) == [2, 2]
    err = capfd.readouterr().err
    assert "exceed the budget of 23" in err
    assert err.count("\n") == 1
