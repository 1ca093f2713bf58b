"""Encoders: their architectures, the SimCLR model around them, and the checkpoints that hold them."""

from models.checkpoint import load_encoder, read_checkpoint
from models.simclr import ARCHITECTURES, SimCLREncoder, build_copy, build_encoder, projection_head
from models.simsiam import SimSiamHeads

__all__ = [
    "ARCHITECTURES",
    "SimCLREncoder",
    "SimSiamHeads",
    "build_copy",
    "build_encoder",
    "load_encoder",
    "projection_head",
    "read_checkpoint",
]
