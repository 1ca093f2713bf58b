"""Encoders: their architectures, the SimCLR model around them, and their checkpoints."""

from models.checkpoint import load_encoder, read_checkpoint
from models.simclr import (
    ARCHITECTURES,
    LARGE,
    USUAL,
    SimCLREncoder,
    arch_name,
    as_encoder,
    build_copy,
    build_encoder,
    large_arch_name,
    projection_head,
)
from models.simsiam import SimSiamHeads

__all__ = [
    "ARCHITECTURES",
    "LARGE",
    "USUAL",
    "SimCLREncoder",
    "SimSiamHeads",
    "arch_name",
    "as_encoder",
    "build_copy",
    "build_encoder",
    "large_arch_name",
    "load_encoder",
    "projection_head",
    "read_checkpoint",
]
