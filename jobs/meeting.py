"""How the processes of a job meet: in a store that rank 0 or the launcher hosts, at an address and a port."""

import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from jobs.ending import Misplaced, join
from jobs.place import Place, Processes, find_place, place_of_flags
from utils import UserError

PATIENCE = 300.0  # seconds until all processes have to be there
ANSWER = 10.0  # seconds in which a store answers, once something listens at its port


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
    stores = [connect(place, host) for host in (place.rank == 0 and not place.hosted, False)]
    join(stores[1], place.rank, place.processes, not place.hosted)
    call_roll(stores[0], place)
    # Tensors on a GPU go through NCCL, those on the CPU, such as answers and digests, through gloo.
    over_nccl = torch.cuda.is_available() and processes.dist_backend != "gloo"
    backend = "cpu:gloo,cuda:nccl" if over_nccl else "gloo"
    dist.init_process_group(backend, store=stores[0], rank=place.rank, world_size=place.processes)
    if "OMP_NUM_THREADS" not in os.environ:  # else they would all compute on all cores
        torch.set_num_threads(max(1, torch.get_num_threads() // place.local_processes))
    return place


def _become_torchrun(processes: Processes) -> None:
    """--multiprocessing-distributed of 2022: a process for each GPU of this machine; --world-size counts machines."""
    machines, here = max(1, processes.world_size), max(1, torch.cuda.device_count())
    if machines * here == 1:
        return
    if machines == 1:
        where = ["--standalone"]
    else:
        place = place_of_flags(processes)
        where = [f"--nnodes={machines}", f"--node-rank={place.rank}"]
        where += [f"--master-addr={place.address}", f"--master-port={place.port}"]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={here}", *where, *sys.argv]
    os.execv(sys.executable, command)


# ---- the job's store -------------------------------------------------------------------------------------------------


def connect(place: Place, host: bool) -> dist.Store:
    """A connection to the job's store, which this process hosts or waits for. Misplaced where there is none."""
    where = f"{place.address}:{place.port}"
    _check_host(place)
    if not host:
        _wait_for_listener(place)
    found: list[dist.Store | RuntimeError] = []

    def make() -> None:
        patience = timedelta(seconds=PATIENCE)
        try:
            found.append(dist.TCPStore(place.address, place.port, None, host, patience, wait_for_workers=False))
        except RuntimeError as error:
            found.append(error)

    # In a thread, since torch waits without end for another program's answer, and hears no signals meanwhile.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(ANSWER)
    if found and isinstance(found[0], dist.Store):
        return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), found[0])
    if host:
        said = str(found[0]).splitlines()[0][:120] if found else "it does not answer"
        raise Misplaced(f"process {place.rank} cannot listen at {where}, is the port free? {said}")
    raise Misplaced(f"what listens at {where} is not process 0 of this job: give all processes another port")


def _check_host(place: Place) -> None:
    try:
        socket.getaddrinfo(place.address, place.port)
    except (OSError, UnicodeError) as error:
        raise Misplaced(f"no host {place.address!r}: correct MASTER_ADDR or --dist-url: {error}") from None


def _wait_for_listener(place: Place) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Misplaced(
                    f"process {place.rank} of {place.processes} found no process 0 at {place.address}:{place.port} in "
                    f"{PATIENCE:.0f} seconds, is it started? {error.strerror or error}"
                ) from None
            time.sleep(0.2)


def call_roll(store: dist.Store, place: Place) -> None:
    """Wait until all processes are there. Misplaced where they do not come, or are not of one job."""
    size = store.compare_set("processes", "", str(place.processes)).decode()
    if size != str(place.processes):
        raise Misplaced(
            f"process {place.rank} is of a job of {place.processes} processes, others are of {size}: "
            f"start all with the same number"
        )
    if store.add(f"here/{place.rank}", 1) > 1:
        raise Misplaced(f"two processes of the job have rank {place.rank}: give each its own --rank")
    ranks, deadline = range(place.processes), time.monotonic() + PATIENCE
    while not store.check([f"here/{rank}" for rank in ranks]):
        if time.monotonic() > deadline:
            absent = [str(rank) for rank in ranks if not store.check([f"here/{rank}"])]
            raise Misplaced(
                f"of {place.processes} processes {', '.join(absent[:8])} did not come in {PATIENCE:.0f} seconds: "
                f"are all started?"
            )
        time.sleep(0.05)
