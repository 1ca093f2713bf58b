"""Keeping freed memory for the next step, as PyTorch does on a GPU."""

import ctypes
import sys

# glibc's numbers of these parameters (malloc.h).
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell the C library to keep memory that is freed, for the rest of the process; whether it can.

    Otherwise glibc returns each large tensor to the system, whose zeroing of new pages takes a quarter of a training
    step. The process keeps the most that it ever used.
    """
    if not sys.platform.startswith("linux"):
        return False
    set_parameter = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return bool(set_parameter and set_parameter(MMAP_MAX, 0) and set_parameter(TRIM_THRESHOLD, -1))
