"""Encoders: their architectures, the SimCLR model around them, and the checkpoints that hold them."""

from models.checkpoint import load_encoder, read_checkpoint
from models.simclr import ARCHITECTURES, SimCLREncoder, build_encoder

__all__ = ["ARCHITECTURES", "SimCLREncoder", "build_encoder", "load_encoder", "read_checkpoint"]
