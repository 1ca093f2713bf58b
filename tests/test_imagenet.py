"""The ImageNet-scale commands of the README, word for word but for their sizes, by two processes on a CPU."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from models import build_encoder
from tests.conftest import ROOT, write_imagenet
from tests.jobs import free_port
from utils import seeded

STEAL = """stealsimsiam.py --world-size -1 --rank 0 --pretrained models/checkpoint_0099-batch256.pth.tar
    --batch-size 512 --lr 0.1 --lars --losstype 'infonce' --datasetsteal 'imagenet' --workers 8 --num_queries 100000
    --temperature 0.1"""
JUDGE = """linsimsiam.py --world-size -1 --rank 0 --batch-size 256 --lars --lr 1.0 --datasetsteal 'imagenet'
    --num_queries 250000 --losstype 'infonce' --dataset 'cifar10' --modeltype 'stolen' --workers 8"""
SIZES = ("--num_queries", "20", "--batch-size", "4", "--epochs", "2", "--workers", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory, data):
    """A folder with the data where the commands look for it, and a ResNet-50 of SimSiam's layout."""
    root = tmp_path_factory.mktemp("place")
    write_imagenet(root / "datasets" / "imagenet")
    os.link(data / "mnist.npz", root / "datasets" / "cifar10.npz")  # as many images as the test has time for
    with seeded(0):
        network = build_encoder("resnet50-imagenet").backbone
    keys = {f"module.encoder.{key.replace('shortcut', 'downsample')}": key for key in network.state_dict()}
    state = {name: network.state_dict()[key] for name, key in keys.items()}
    state["module.predictor.0.weight"] = torch.zeros(4, 4)
    (root / "models").mkdir()
    content = {"epoch": 100, "arch": "resnet50", "state_dict": state, "optimizer": {}}
    torch.save(content, root / "models" / "checkpoint_0099-batch256.pth.tar")
    return root


def torchrun(place, command, *more):
    """A command of the README in two processes, with these flags in place of its own."""
    line = shlex.split(command)
    line[0] = str(ROOT / line[0])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launch, *line, *more], cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


@pytest.mark.slow
def test_both_commands_by_two_processes_after_a_preemption(place):
    """The attack is told to stop once; that it goes on without paying again is in the ledger."""
    whole = torchrun(place, STEAL, *SIZES)
    deadline = time.monotonic() + 150
    while not [*place.rglob("stolen_simsiam-*/metrics.jsonl")]:
        assert time.monotonic() < deadline
        assert whole.poll() is None, whole.communicate()
        time.sleep(0.1)
    whole.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, err = whole.communicate(timeout=60)
    assert "stopped at step" in err
    again = torchrun(place, STEAL, *SIZES, "--resume")
    out, err = again.communicate(timeout=150)
    assert again.returncode == 0, err
    assert out.count("layout of SimSiam") == 1  # only the first process speaks
    assert "resumed after epoch 1" in out
    held = torch.load(next(place.rglob("stolen_simsiam-*/checkpoint.pth.tar")))
    assert held["epoch"] == 2
    assert held["ledger"]["default"]["queries"] == 20
    assert len(held["query_digests"].unique(dim=0)) == 20

    sizes = ("--batch-size", "8", "--epochs", "2", "--workers", "1")
    missing = torchrun(place, JUDGE, *sizes)
    _, err = missing.communicate(timeout=60)
    assert missing.returncode
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "num_queries 250000" in line
    assert "stolen_simsiam-imagenet-resnet50-infonce-20q" in line
    judged = torchrun(place, JUDGE, *sizes, "--num_queries", "20")
    _, err = judged.communicate(timeout=150)
    assert judged.returncode == 0, err
    (row,) = map(json.loads, (place / "checkpoints" / "results.jsonl").read_text().splitlines())
    assert (row["train_images"], row["test_images"], row["queries"]) == (40, 24, 20)
    assert row["arch"] == "resnet50-imagenet"


@pytest.mark.slow
def test_a_process_for_each_gpu_of_each_machine_without_torchrun(place):
    """--multiprocessing-distributed on two "machines", which have no GPUs, so one process each."""
    port = free_port()
    flags = ["--world-size", "2", "--dist-url", f"tcp://127.0.0.1:{port}", "--multiprocessing-distributed"]
    line = [sys.executable, str(ROOT / "stealsimsiam.py"), "--pretrained", "nowhere.pth.tar"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    machines = [
        subprocess.Popen([*line, *flags, "--rank", str(rank)], cwd=place, env=environment, **pipes) for rank in (1, 0)
    ]
    errors = "".join(machine.communicate(timeout=90)[1] for machine in machines)
    assert errors.count("error: no checkpoint at nowhere.pth.tar") == 1
