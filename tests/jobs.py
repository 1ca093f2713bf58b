"""What the processes of a test's job do: `run_job` starts the processes, and each function runs in all of them."""

import os
import signal
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import loss
import run
from defenses.noise import Noise
from jobs.ending import script
from jobs.exchange import any_of, gather, parallel, processes, share, whole_batch
from jobs.machine import check_flags
from jobs.meeting import set_up_job
from jobs.place import Processes
from models import build_encoder
from utils import UserError, seeded
from victim import Victim


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_job(count: int, work, *arguments, timeout: float = 300) -> list[int]:
    """Runs `work(*arguments)` in `count` processes that form a job; returns their exit codes. Fails if any hangs."""
    context = torch.multiprocessing.get_context("spawn")
    port = free_port()
    started = [context.Process(target=_enter, args=(rank, count, port, work, arguments)) for rank in range(count)]
    for process in started:
        process.start()
    deadline = time.monotonic() + timeout
    for process in started:
        process.join(max(0.1, deadline - time.monotonic()))
    alive = [process for process in started if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, f"{len(alive)} of {count} processes hang"
    return [process.exitcode for process in started]


def _enter(rank: int, count: int, port: int, work, arguments) -> None:
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})

    def main() -> None:
        set_up_job(Processes())
        torch.set_num_threads(1)
        work(*arguments)

    script(main)()


# ---- losses and batch norm -------------------------------------------------------------------------------------------

IMAGES, WIDTH = 8, 6
# Every loss that compares rows of different images, with how many rows an image has.
COMPARING = {
    "nt_xent": (lambda a, b, labels: loss.nt_xent(a, 2), 2),
    "softnn between views": (lambda a, b, labels: loss.soft_nearest_neighbour(a, 2, 5.0), 2),
    "supcon between views": (lambda a, b, labels: loss.supcon_training(a, labels), 2),
    "barlow between views": (lambda a, b, labels: loss.barlow(a, 2), 2),
    "infonce": (lambda a, b, labels: loss.infonce(a, b, views=1), 1),
    "infonce, 3 views": (lambda a, b, labels: loss.infonce(a, b, views=3), 3),
    "softnn": (lambda a, b, labels: loss.softnn(a, b, 5.0, views=2), 2),
    "supcon": (lambda a, b, labels: loss.supcon(a, b, labels), 1),
    "barlow": (lambda a, b, labels: loss.barlow_twins(a, b), 1),
    "contsteal": (lambda a, b, labels: loss.contsteal(a, b, views=2), 2),
    "rda": (lambda a, b, labels: loss.rda(a, b, views=2), 2),
    # These compare rows of the same image only.
    "mse": (lambda a, b, labels: loss.mse(a, b), 1),
    "symmetrized": (lambda a, b, labels: loss.symmetrized(a, b, views=2), 2),
    "stolenencoder": (lambda a, b, labels: loss.stolenencoder(a, b, views=3), 3),
}


def local_rows(images: int, views: int) -> Tensor:
    """This process's rows, view-major, of a batch of `images` with `views` rows each."""
    local = torch.arange(images)[share(images)]
    return torch.cat([local + view * images for view in range(views)])


def compare_losses() -> dict[str, tuple[Tensor, Tensor]]:
    """For each loss its value, and the gradient of a linear layer before it: by this job's whole batch."""
    found = {}
    for number, (name, (function, views)) in enumerate(COMPARING.items()):
        draws = torch.Generator().manual_seed(number)
        inputs, answers = torch.randn(2, views * IMAGES, WIDTH, generator=draws)
        labels = torch.arange(IMAGES) % 4
        layer = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=draws))
            layer.bias.zero_()
        call = parallel(layer)
        local = inputs[local_rows(IMAGES, views)]
        features = whole_batch(call(layer, local), views)
        value = function(features, answers, labels)
        (value * processes()).backward()
        found[name] = value.detach(), torch.cat([layer.weight.grad.flatten(), layer.bias.grad])
    return found


def cross_correlation() -> Tensor:
    """Barlow Twins' matrix (D, D) of two views, each process having its share of them."""
    rows = torch.randn(2 * IMAGES, WIDTH, generator=torch.Generator().manual_seed(5))
    local = rows[local_rows(IMAGES, 2)]
    a, b = whole_batch(local, 2).chunk(2)
    a, b = (F.batch_norm(view, None, None, training=True) for view in (a, b))
    return a.T @ b / IMAGES


def batch_norm() -> dict[str, Tensor]:
    """Outputs, gradients and running statistics of a net with batch norms, of the whole batch."""
    draws = torch.Generator().manual_seed(1)
    images = 3 + 2 * torch.randn(IMAGES, 3, 4, 4, generator=draws)
    with seeded(0):
        net = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4), nn.BatchNorm1d(4)
        )
    call = parallel(net)
    local = images[share(IMAGES)].requires_grad_()
    out = whole_batch(call(net, local))
    (out.pow(3).mean() * processes()).backward()
    found = {"out": out.detach(), "images": gather(local.grad, IMAGES) / processes()}
    found |= {f"grad {name}": value.grad for name, value in net.named_parameters()}
    found |= {name: value for name, value in net.state_dict().items() if "running" in name or "tracked" in name}
    return found


def consistent_answers() -> tuple[Tensor, dict]:
    """The answers to a call that all processes share, with noise by perceptual hashes, and the ledger's account."""
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    images[5] = images[2]
    with seeded(1):
        encoder = build_encoder("resnet10w32", 16)
    victim = Victim(encoder, defences=[Noise(mu=0.0, sigma=3.0, consistent_noise=True, secret=6)])
    answers = victim.query(images[share(IMAGES)], gather=lambda rows: gather(rows, IMAGES))
    return answers, victim.ledger.state_dict()


def numbers(path) -> None:
    """All of the above, written by the first process."""
    found = {"losses": compare_losses(), "correlation": cross_correlation(), "batch norm": batch_norm()}
    found["consistent"] = consistent_answers()
    found["uneven"] = {}
    for total in (0, 1, 3, 7):  # fewer rows than processes, too
        local = torch.arange(total)[share(total)][:, None]
        found["uneven"][total] = [gather(local, total)]
        with pytest.raises(ValueError, match=r"are not this process's share"):
            gather(torch.zeros(len(local) + 1, 1), total)
    found["any"] = [any_of(False), any_of(share(4).start == 0)]
    if share(2).start == 0:
        torch.save(found, path)


# ---- ends ------------------------------------------------------------------------------------------------------------


def fail_in_one(rank: int, how: str) -> None:
    """One process fails while the others wait for it in a collective."""
    if dist.get_rank() == rank:
        if how == "user error":
            raise UserError("the folder is full of bees")
        if how == "bug":
            raise ZeroDivisionError("bees")
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        gather(torch.zeros(1, 2), processes())


def fail_in_all() -> None:
    raise UserError("everybody sees bees")


def start_with_flags(*lines: str) -> None:
    """Each process with its command line of run.py."""
    check_flags(run.parse(lines[dist.get_rank()].split()), dist.get_rank())
    dist.barrier()


def leave_early(rank: int) -> None:
    """One process is done long before the others."""
    if dist.get_rank() != rank:
        time.sleep(2)


def print_to_nobody(fails: bool) -> None:
    """Rank 0 prints to a closed pipe while rank 1 waits for it; if rank 1 `fails`, rank 0 has yet to flush its text."""
    if dist.get_rank() == 0:
        reading, writing = os.pipe()
        os.close(reading)
        # As a pipe is buffered outside of pytest.
        os.dup2(writing, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        print("a table", flush=not fails)
    if fails and dist.get_rank() == 1:
        time.sleep(1)
        raise UserError("bees")
    if fails:
        time.sleep(600)  # busy with something else than the job
    while True:
        gather(torch.zeros(1, 2), processes())
