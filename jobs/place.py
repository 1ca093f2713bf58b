"""Which process of how many this is, and how the processes of a job find each other.

torchrun --nproc-per-node 4 steal.py ...        srun --ntasks 8 python steal.py ...        python steal.py ...
"""

import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from jobs import ending
from settings import Settings, setting
from utils import UserError

PATIENCE = timedelta(minutes=5)  # for the job's processes to find each other


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
        place = _place_of_flags(processes) if processes.world_size > 1 else None
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


def _place_of_flags(processes: Processes) -> Place:
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


# ---- joining the others ----------------------------------------------------------------------------------------------


def set_up_job(processes: Processes) -> Place | None:
    """Join this process to its job, if it has one, and return its place; from here on only rank 0 prints.

    --multiprocessing-distributed replaces this process by torchrun. UserError when the other processes are not found.
    """
    if processes.multiprocessing_distributed and "RANK" not in os.environ:
        _become_torchrun(processes)
    place = find_place(os.environ, processes)
    if place is None:
        return None
    if processes.dist_backend == "nccl" and not torch.cuda.is_available():
        raise UserError("--dist-backend nccl needs GPUs, there is none: leave it out")
    if place.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        socket.getaddrinfo(place.address, place.port)
    except (OSError, UnicodeError) as error:
        raise ending.Misplaced(f"no host {place.address!r}, where rank 0 should listen: {error}") from None
    try:
        stores = [_store(place, host) for host in (place.rank == 0 and not place.hosted, False)]
    except (RuntimeError, dist.DistNetworkError) as error:
        raise ending.Misplaced(
            f"process {place.rank} of {place.processes} finds no job at {place.address}:{place.port}: are all started, "
            f"and is the port free? {str(error).splitlines()[0][:120]}"
        ) from None
    ending.join(stores[1], place.rank, place.processes, not place.hosted)
    # Tensors on a GPU go through NCCL, those on the CPU, such as answers and digests, through gloo.
    over_nccl = torch.cuda.is_available() and processes.dist_backend != "gloo"
    backend = "cpu:gloo,cuda:nccl" if over_nccl else "gloo"
    dist.init_process_group(backend, store=stores[0], rank=place.rank, world_size=place.processes)
    if "OMP_NUM_THREADS" not in os.environ:  # else they would all compute on all cores
        torch.set_num_threads(max(1, torch.get_num_threads() // place.local_processes))
    return place


def refuse_several() -> None:
    """UserError when a script for a single process was started as one of several, which would all do the same."""
    place = find_place(os.environ, Processes())
    if place:
        script = os.path.basename(sys.argv[0]).removesuffix(".py")
        raise UserError(f"{script} is one process, this is one of {place.processes}: start it without torchrun or srun")


def _store(place: Place, host: bool) -> dist.Store:
    store = dist.TCPStore(place.address, place.port, None, host, PATIENCE, wait_for_workers=False)
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def _become_torchrun(processes: Processes) -> None:
    """--multiprocessing-distributed of 2022: a process for each GPU of this machine; --world-size counts machines."""
    machines, here = max(1, processes.world_size), max(1, torch.cuda.device_count())
    if machines * here == 1:
        return
    if machines == 1:
        where = ["--standalone"]
    else:
        place = _place_of_flags(processes)
        where = [f"--nnodes={machines}", f"--node-rank={place.rank}"]
        where += [f"--master-addr={place.address}", f"--master-port={place.port}"]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={here}", *where, *sys.argv]
    os.execv(sys.executable, command)
