"""What the processes of a test's job do: each function runs in every one of them, started by `run_job`."""

import argparse
import os
import signal
import socket
import time
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
import loss
from defenses import build_defences
from defenses.watermark import WatermarkMLP
from loss import STEAL_LOSSES, TRAIN_LOSSES
from models import SimSiamHeads, build_copy, build_encoder
from simclr import SimCLR
from stopping import script
from training import Training
from utils import Precision, Run, UserError, seeded
from victim import Victim, image_digests

FLAGS = argparse.Namespace(multiprocessing_distributed=False, world_size=-1, rank=-1, dist_url=None, dist_backend=None)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_job(processes: int, work, *arguments, timeout: float = 300) -> list[int]:
    """Runs `work(*arguments)` in so many processes that form a job; their exit codes. Fails when one doesn't end."""
    context = torch.multiprocessing.get_context("spawn")
    port = free_port()
    started = [
        context.Process(target=_enter, args=(rank, processes, port, work, arguments)) for rank in range(processes)
    ]
    for one in started:
        one.start()
    deadline = time.monotonic() + timeout
    for one in started:
        one.join(max(0.1, deadline - time.monotonic()))
    alive = [one for one in started if one.is_alive()]
    for one in alive:
        one.kill()
    assert not alive, f"{len(alive)} of {processes} processes hang"
    return [one.exitcode for one in started]


def _enter(rank: int, processes: int, port: int, work, arguments) -> None:
    place = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})

    def main() -> None:
        distributed.set_up(FLAGS)
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
    "barlow": (lambda a, b, labels: loss.barlow_stealing(a, b), 1),
    "contsteal": (lambda a, b, labels: loss.contsteal(a, b, views=2), 2),
    "rda": (lambda a, b, labels: loss.rda(a, b, views=2), 2),
    # These compare rows of one image only.
    "mse": (lambda a, b, labels: loss.mse(a, b), 1),
    "symmetrized": (lambda a, b, labels: loss.symmetrized(a, b, views=2), 2),
    "stolenencoder": (lambda a, b, labels: loss.stolenencoder(a, b, views=3), 3),
}


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
        call = distributed.parallel(layer)
        own = inputs[distributed.Part.of(IMAGES, views, torch.device("cpu")).own]
        features = distributed.whole_batch(call(layer, own), views)
        value = function(features, answers, labels)
        (value * distributed.processes()).backward()
        found[name] = value.detach(), torch.cat([layer.weight.grad.flatten(), layer.bias.grad])
    return found


def cross_correlation() -> Tensor:
    """Barlow Twins' matrix (D, D) of two views, each process having its part of them."""
    rows = torch.randn(2 * IMAGES, WIDTH, generator=torch.Generator().manual_seed(5))
    own = rows[distributed.Part.of(IMAGES, 2, torch.device("cpu")).own]
    a, b = distributed.whole_batch(own, 2).chunk(2)
    a, b = (F.batch_norm(one, None, None, training=True) for one in (a, b))
    return a.T @ b / IMAGES


def batch_norm() -> dict[str, Tensor]:
    """Outputs, gradients and running statistics of a net with batch norms, of the whole batch."""
    draws = torch.Generator().manual_seed(1)
    images = 3 + 2 * torch.randn(IMAGES, 3, 4, 4, generator=draws)
    with seeded(0):
        net = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4), nn.BatchNorm1d(4)
        )
    call = distributed.parallel(net)
    own = images[distributed.share(IMAGES)].requires_grad_()
    out = distributed.whole_batch(call(net, own))
    (out.pow(3).mean() * distributed.processes()).backward()
    found = {"out": out.detach(), "images": distributed.gather(own.grad, IMAGES) / distributed.processes()}
    found |= {f"grad {name}": value.grad for name, value in net.named_parameters()}
    found |= {name: value for name, value in net.state_dict().items() if "running" in name or "tracked" in name}
    return found


def numbers(path) -> None:
    """All of the above, written by the first process."""
    found = {"losses": compare_losses(), "correlation": cross_correlation(), "batch norm": batch_norm()}
    found["uneven"] = distributed.gather(torch.arange(7)[distributed.share(7)][:, None], 7)
    found["any"] = [distributed.any_of(False), distributed.any_of(distributed.share(4).start == 0)]
    if distributed.share(2).start == 0:
        torch.save(found, path)


# ---- training --------------------------------------------------------------------------------------------------------

STEPS = 3


def training(folder, **values) -> tuple:
    """What SimCLR takes after its loss, for three steps."""
    defaults = {"epochs": 1, "batch_size": 8, "lr": 0.05, "weight_decay": 1e-4, "optimizer": "sgd", "flat_epochs": 0}
    cpu = Precision("fp32", torch.device("cpu"))
    return Training(**{**defaults, **values}), Run(folder), cpu


def pictures() -> Tensor:
    return torch.randint(0, 256, (8 * STEPS, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def new_encoder(head: str = "mlp-bn"):
    with seeded(3):
        return build_encoder("resnet10w32", 16, head=head)


class Counting(Victim):
    """A victim that counts the images that its encoder answers in this process."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.own = Counter()
        encoder = self._service.encoder
        encoder.register_forward_pre_hook(lambda module, inputs: self.own.update(image_digests(inputs[0])))


def train_all(folder) -> None:
    """Train by the trainer's jobs, with everything that draws or exchanges; weights go to the folder.

    In float64: the batch norms of so small batches magnify float32's rounding so that it would hide small errors.
    """
    torch.set_default_dtype(torch.float64)
    Tensor.float = Tensor.double
    train_victims(folder)
    steal_copies(folder)


def train_victims(folder) -> None:
    images, labels = pictures(), torch.arange(8 * STEPS) % 4
    for name in ("infonce", "softnn", "supcon", "barlow", "supervised"):
        views = TRAIN_LOSSES[name].min_views
        rest = training(folder / f"victim-{name}", n_views=views, temperature=0.5)
        with seeded(4):
            mark = WatermarkMLP(256) if name == "infonce" else None
        SimCLR(new_encoder(), TRAIN_LOSSES[name], *rest, companion=mark).train(images, labels)


def steal_copies(folder) -> None:
    images = pictures()
    ways = {
        "infonce": {},
        "contsteal": {"n_views": 1, "queryaug": True, "useaug": True},
        "symmetrized": {"n_views": 2},
        "rda": {"n_views": 3, "prototype": True, "useaug": True, "copy_views": 2},
    }
    for name, values in ways.items():
        rest = training(folder / f"copy-{name}", temperature=0.5, **values)
        with seeded(5):
            copy = build_copy("resnet10w32", 256)
            heads = SimSiamHeads(256, 32) if STEAL_LOSSES[name].predictor else None
        budget = values.get("n_views", 1) * len(images)
        victim = Counting(new_encoder("mlp"), budget, build_defences(["buckets", "rounding"], {}))
        SimCLR(copy, STEAL_LOSSES[name], *rest, companion=heads).steal(images, victim)
        torch.save(
            {"own": [*victim.own], "times": [*victim.own.values()], "queries": victim.ledger.queries},
            folder / f"asked-{name}-{dist.get_rank() if dist.is_initialized() else 0}.pt",
        )


def overspend(folder) -> None:
    """Ask for one image more than the budget, some of it in batches that end unevenly."""
    victim = Victim(new_encoder("mlp"), budget=8 * STEPS - 1)
    rest = training(folder / "over")
    SimCLR(build_copy("resnet10w32", 256), STEAL_LOSSES["mse"], *rest).steal(pictures(), victim)


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
        distributed.gather(torch.zeros(1, 2), distributed.processes())


def fail_in_all() -> None:
    raise UserError("everybody sees bees")


def leave_early(rank: int) -> None:
    """One process is done long before the others."""
    if dist.get_rank() != rank:
        time.sleep(2)
