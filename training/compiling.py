"""Compiling a network's forward and backward pass by torch.compile, where a run is long enough to pay for it.

The result differs in rounding only. docs/speed.md has what it gains.
"""

import logging
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from jobs.exchange import processes
from training.recipe import Recipe
from utils import Precision, UserError

WORTH = 400_000  # images through the network, from which on `auto` compiles: some ten minutes of a small network

Network = Callable[[Tensor], Tensor]


def compiles(recipe: Recipe, precision: Precision, images: int) -> bool:
    """Whether a run that sends so many images through its network compiles it. UserError where it must and cannot.

    `auto` decides by what a resumed run has in common with the whole run, so that both round alike.
    """
    if recipe.compile == "off":
        return False
    compiler = os.environ.get("CXX", "g++")
    obstacle = None
    if processes() > 1:
        obstacle = f"one process, this is one of {processes()}"
    elif precision.device.type == "cpu" and not shutil.which(compiler):
        obstacle = f"a C++ compiler, and there is no {compiler}"
    if recipe.compile == "on":
        if obstacle:
            raise UserError(f"--compile on needs {obstacle}: leave it out")
        return True
    measured = precision.device.type == "cpu" and precision.name == "bf16"
    return not obstacle and measured and images >= WORTH


def compiled(network: Network, like: Tensor) -> Network:
    """The network, compiled for batches of the shape of `like`; other batches, such as an epoch's last, are not."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a CUDA that is not there
    # By this process alone: others would stay behind where it is killed.
    shape, fast = like.shape, torch.compile(network, dynamic=False, options={"compile_threads": 1})
    return lambda inputs: fast(inputs) if inputs.shape == shape else network(inputs)
