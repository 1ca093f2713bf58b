"""Freed memory stays with a script's process."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from jobs.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
layers = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()) for _ in range(4)))
rows = torch.randn(1 << 17, 64)  # 32 MiB, as each of the layers' outputs
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers(rows).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(new_pages() for _ in range(12)))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library than glibc, whose memory this is about"
)
def test_a_training_step_takes_the_pages_that_the_last_left():
    new_pages = {}
    for way in ("kept", "returned"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True)
        new_pages[way] = sum(int(word) for word in done.stdout.split()[-6:])
        print(way, done.stdout)
    assert new_pages["returned"] > 6 * 10_000, "each output of a layer is in new pages, 8,192 of them"
    assert new_pages["kept"] < 0.1 * new_pages["returned"]
