"""Keeping freed memory for the next step, as PyTorch does on a GPU."""

import ctypes
import sys

# glibc's numbers of these parameters (malloc.h).
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
# What keeps, and what glibc does by itself once a process has had large tensors.
_KEEPING = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
_AS_EVER = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}


def keep_freed_memory(keep: bool = True) -> bool:
    """Tell the C library to keep memory that is freed, or to return it as ever; whether it can be told.

    Otherwise glibc returns each large tensor to the system, whose zeroing of new pages takes a quarter of a training
    step. The process keeps the most that it ever used.
    """
    if not sys.platform.startswith("linux"):
        return False
    set_parameter = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return bool(set_parameter) and all(set_parameter(*each) for each in (_KEEPING if keep else _AS_EVER).items())
