"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from utils import UserError, first_process


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces `path` on success and is removed on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(content: Mapping, path: Path) -> None:
    """Write a checkpoint of tensors and plain types, atomically and by rank 0 only."""
    if not first_process():
        return
    with atomic_path(path) as temporary:
        try:
            torch.save(dict(content), temporary)
        except RuntimeError as error:  # torch's report of a full disk
            raise UserError(f"cannot write {path}, is the disk full? {str(error).splitlines()[0]}") from None
