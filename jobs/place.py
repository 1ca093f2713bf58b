"""Which process of how many this is, by a launcher's variables or the flags of 2022.

torchrun --nproc-per-node 4 steal.py ...        srun --ntasks 8 python steal.py ...        python steal.py ...
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from jobs import ending
from settings import Settings, setting
from utils import UserError


@dataclass(frozen=True)
class Processes(Settings):
    """Several processes as one job, as the scripts of 2022 were told; torchrun and srun need none of these flags."""

    world_size: int = setting(
        -1,
        "processes of the job, or machines with --multiprocessing-distributed; torchrun and srun need no such flags",
        at_least=-1,
        named=False,
    )
    rank: int = setting(-1, "number of this process, or of this machine, from 0", at_least=-1, named=False)
    dist_url: str | None = setting(None, "tcp://ADDRESS:PORT where the process of rank 0 listens", named=False)
    dist_backend: str | None = setting(
        None,
        "library that exchanges tensors",
        choices=("nccl", "gloo"),
        otherwise="nccl between GPUs, gloo between CPUs",
        named=False,
    )
    multiprocessing_distributed: bool = setting(False, "start a process for each GPU of this machine", named=False)
    title = "several processes"


# ---- who this is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """This process's rank, in the job and on its machine, of how many, and where rank 0 listens."""

    rank: int
    processes: int
    local_rank: int
    local_processes: int
    address: str
    port: int
    hosted: bool = False  # the launcher hosts the store


def find_place(environment: Mapping[str, str], processes: Processes) -> Place | None:
    """This process's place by torchrun's variables, Slurm's, or the flags of 2022, in this order; None if it is alone.

    UserError for variables or flags that name no place.
    """
    if processes.world_size == 0:
        raise ending.Misplaced("--world-size 0 is no number of processes: leave it out, or give 1 or more")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        place = _place_of_torchrun(environment)
    # A batch script itself runs outside of any step: only srun makes several processes.
    elif _number(environment, "SLURM_STEP_NUM_TASKS", 1, at_least=1) > 1:
        place = _place_of_slurm(environment)
    else:
        place = place_of_flags(processes) if processes.world_size > 1 else None
    return place if place and place.processes > 1 else None


def _number(
    environment: Mapping[str, str], name: str, otherwise: int, at_least: int = 0, below: int | None = None
) -> int:
    """The whole number in a launcher's variable. UserError for something else, or for one out of range."""
    text = environment.get(name, str(otherwise))
    if not text.isdecimal() or int(text) < at_least or (below is not None and int(text) >= below):
        to = "" if below is None else f" to {below - 1}"
        raise ending.Misplaced(f"the variable {name} is {text!r}, not a number from {at_least}{to}: correct it")
    return int(text)


def _place_of_torchrun(environment: Mapping[str, str]) -> Place:
    processes = _number(environment, "WORLD_SIZE", 1, at_least=1)
    return Place(
        _number(environment, "RANK", 0, below=processes),
        processes,
        _number(environment, "LOCAL_RANK", 0),
        _number(environment, "LOCAL_WORLD_SIZE", 1, at_least=1),
        environment.get("MASTER_ADDR", "127.0.0.1"),
        _number(environment, "MASTER_PORT", 29500, at_least=1, below=2**16),
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _place_of_slurm(environment: Mapping[str, str]) -> Place:
    processes = _number(environment, "SLURM_STEP_NUM_TASKS", 1, at_least=1)
    job, step = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0)
    here = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_NTASKS_PER_NODE", "1"))
    if "SLURM_PROCID" not in environment:
        raise ending.Misplaced("the variable SLURM_PROCID is not set: start the script by srun")
    # Steps that share a machine need different ports.
    port = 20000 + (10 * job + step) % 20000
    return Place(
        _number(environment, "SLURM_PROCID", 0, below=processes),
        processes,
        _number(environment, "SLURM_LOCALID", 0),
        int(re.match(r"\d*", here).group() or 1),
        environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        _number(environment, "MASTER_PORT", port, at_least=1, below=2**16) if environment.get("MASTER_PORT") else port,
    )


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: gpu[003-006,9],big1 -> gpu003."""
    name, number, rest = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes).groups()
    return name + (number or "") + (rest or "")


def place_of_flags(processes: Processes) -> Place:
    found = re.fullmatch(r"tcp://([^:/]+):(\d+)", processes.dist_url or "")
    if not found:
        raise ending.Misplaced(
            f"--dist-url {processes.dist_url} is not tcp://ADDRESS:PORT of the process of --rank 0: "
            f"give it, or use torchrun"
        )
    if not 0 < int(found[2]) < 2**16:
        raise ending.Misplaced(f"--dist-url {processes.dist_url} has no port from 1 to {2**16 - 1}: choose another")
    if not 0 <= processes.rank < processes.world_size:
        raise ending.Misplaced(
            f"--rank {processes.rank} is none of the {processes.world_size} of --world-size: give 0 or more"
        )
    return Place(processes.rank, processes.world_size, 0, 1, found[1], int(found[2]))


def refuse_several() -> None:
    """UserError when a script for a single process was started as one of several, which would all do the same."""
    place = find_place(os.environ, Processes())
    if place:
        script = os.path.basename(sys.argv[0]).removesuffix(".py")
        raise UserError(f"{script} is one process, this is one of {place.processes}: start it without torchrun or srun")
