"""Files that are written whole or not at all, lines that are added whole, and locks of folders."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from utils import UserError, first_process

try:
    import fcntl
except ImportError:  # Windows, where two processes in a folder are not noticed
    fcntl = None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside that names no file, as that of a full disk, names this path."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write a file to, or a folder; it replaces `path` on success, and goes on failure.

    A folder takes the place of an empty one only.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            for file in [*temporary.iterdir()] if temporary.is_dir() else [temporary]:
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def save_checkpoint(content: Mapping, path: Path) -> None:
    """Write a checkpoint of tensors and plain types, atomically and by rank 0 only."""
    if not first_process():
        return
    with atomic_path(path) as temporary:
        try:
            torch.save(dict(content), temporary)
        except RuntimeError:  # torch's report of a full disk
            raise UserError(f"cannot write {path}: is the disk full?") from None


# ---- lines -----------------------------------------------------------------------------------------------------------


def add_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line of JSON whole: what a full disk cut short is taken back, or ended before the next line."""
    with path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        left = b"\n" * (file.read(1) not in (b"", b"\n")) + json.dumps(line).encode() + b"\n"
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            with naming(path):
                raise


def put_line(path: Path, line: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """As `add_line`, in place of an earlier line that has the same values of all keys.

    Processes that put lines into a file at the same time wait for each other.
    """
    wanted = {key: line[key] for key in keys}
    with locked(path.parent):
        for cut in path.parent.glob(f".{path.name}.*.tmp"):  # a kill while the file was written
            cut.unlink()
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [old for old in lines if not _has(old, wanted)]
        if len(kept) < len(lines):
            with atomic_path(path) as temporary:
                temporary.write_bytes(b"".join(kept) + json.dumps(line).encode() + b"\n")
        else:
            add_line(path, line)


def _has(line: bytes, wanted: Mapping[str, Any]) -> bool:
    try:
        content = json.loads(line)
    except ValueError:
        return False
    return isinstance(content, dict) and all(key in content and content[key] == value for key, value in wanted.items())


# ---- locks -----------------------------------------------------------------------------------------------------------


def lock(folder: Path, wait: bool = False) -> int | None:
    """Take a folder for this process, until the descriptor returned is closed or the process ends.

    UserError, unless it waits, where another process has it. None where folders cannot be locked.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # A lock of the process, not of the descriptor: workers that outlive a killed process don't keep it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise UserError(f"another process writes in {folder}: wait until it has ended") from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside it no other process that locks the folder is in it; waits for them."""
    descriptor = lock(folder, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
