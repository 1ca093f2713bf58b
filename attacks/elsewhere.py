"""Victims that are elsewhere: what they have in common, and those behind a function of a Python file.

victim = FunctionVictim("python:examples/course_api.py:ask", budget=9000)
answers = victim.query(images)                                          # as of a `Victim` in this process
"""

import hashlib
import importlib.util
import inspect
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_aug.digests import HASH_BYTES, image_digests, perceptual_hashes, unpack_digests
from jobs.ending import Stopped, received
from jobs.exchange import from_first
from utils import UserError, first_process
from victim import BudgetExceeded, Gather, Ledger, check_query

BATCH = 512  # images of a client's call, as in-process victims are asked
LARGEST_WIDTH = 10**6  # numbers of an answer


class Elsewhere(ABC):
    """A victim that is asked elsewhere, with the protocol `victim.AnyVictim`.

    address, and label, a name for folders. batch_size: images of a client's call; most: of a request. accounts: how
    many there are, None for any number. repeats: whether a request whose answer was lost can be repeated without being
    counted again. input_size: height and width that the victim says it wants, or None.

    `ledger` has what was asked as this side counts it: also where an answer was wrong, but not where none came. Of a
    job's processes rank 0 asks for all.
    """

    stateful = False  # what the other side remembers, it remembers by itself
    repeats = False
    address: str
    label: str
    version: str
    dim: int
    most: int = BATCH
    batch_size: int = BATCH
    accounts: int | None = None
    input_size: tuple[int, int] | None = None

    def __init__(self, budget: int | None = None):
        self.budget, self.ledger, self._keep = budget, Ledger(), None

    @abstractmethod
    def _send(self, images: Tensor, account: str) -> Any:
        """What comes back for images (B, 3, H, W). UserError where nothing does."""

    @abstractmethod
    def _read(self, content: Any, rows: int) -> np.ndarray:
        """The answers (B, dim) in what came back. UserError where it is something else."""

    @abstractmethod
    def words(self) -> str:
        """What the victim says of itself."""

    def begin(self, keep: Path | None) -> None:
        """Begin an attack whose answers are kept in this file, or go on with it."""
        self._keep = keep

    def query(self, images: Tensor, account: str = "default", gather: Gather | None = None) -> Tensor:
        """As `Victim.query`. UserError where the other side refuses, or what it answers are no such numbers."""
        check_query(images)
        images = (gather(images) if gather else images).cpu()
        asked = self.ledger.queries
        if self.budget is not None and asked + len(images) > self.budget:
            raise BudgetExceeded(
                f"a query of {len(images)} images would exceed the budget of {self.budget}: {asked} are spent"
            )
        parts = images.split(self.most) if len(images) else []
        return torch.cat([torch.empty(0, self.dim), *(self._query(part, account) for part in parts)])

    def _query(self, images: Tensor, account: str) -> Tensor:
        rows = torch.empty(len(images), self.dim)
        content = self._send(images, account) if first_process() else None
        hashes = unpack_digests(perceptual_hashes(images), HASH_BYTES)
        self.ledger.record(image_digests(images), account, hashes)
        if first_process():
            rows.copy_(torch.from_numpy(self._read(content, len(images)).astype(np.float32)))
            if not rows.isfinite().all():
                raise UserError(f"{self.address} answers with numbers that are not finite: a copy cannot learn these")
        return from_first(rows)

    def replay(self, digests: Tensor, account: str = "default", images: Tensor | None = None) -> None:
        """As `Victim.replay`: the ledger has queries answered before a restart."""
        self.ledger.record(unpack_digests(digests), account)

    def report(self, sources: Mapping[str, Tensor]) -> dict[str, float]:
        """As `Victim.report`, of what the other side tells."""
        return {}

    def _kept(self) -> str:
        """What a message ends with when an attack has to end early."""
        there = self.ledger.queries if self._keep else 0
        return f"; {there} answers are kept, --resume goes on from them" if there else ""


# ---- a function ------------------------------------------------------------------------------------------------------


class FunctionVictim(Elsewhere):
    """A function of a Python file, `python:FILE.py:FUNCTION`: images uint8 (B, 3, H, W) -> answers (B, dim).

    FUNCTION.dim says how wide answers are, FUNCTION.batch_size (512) how many images a call has at most. The images are
    a tensor, or an array where the argument is annotated `np.ndarray`; so may the answers be, or lists. A call that
    raises an exception counts as not asked. UserError where the file has no such function.
    """

    def __init__(self, address: str, budget: int | None = None):
        super().__init__(budget)
        self.address = address
        self._path, name = _file_and_name(address)
        self._function = _load_function(self._path, name)
        self.dim = self._whole("dim", None)
        self.most = self.batch_size = self._whole("batch_size", BATCH)
        self.label = f"{self._path.stem}-{name}"
        # Not by the file's content: who mends the function while an attack is stopped keeps the answers.
        self.version = hashlib.blake2b(f"{self._path.resolve()}:{name}".encode(), digest_size=8).hexdigest()
        try:
            wanted = [argument.annotation for argument in inspect.signature(self._function).parameters.values()]
        except ValueError:  # of a function that is not of Python
            wanted = []
        self._arrays = wanted[:1] in ([np.ndarray], ["np.ndarray"], ["numpy.ndarray"])

    def words(self) -> str:
        return f"{self.dim} numbers, {self.most} images a call"

    def _whole(self, name: str, default: int | None) -> int:
        value = getattr(self._function, name, default)
        if not isinstance(value, int) or not 1 <= value <= LARGEST_WIDTH:
            line = f"{self.address.rpartition(':')[2]}.{name} = NUMBER"
            raise UserError(f"{self.address} has the {name} {value}: write {line} below the function")
        return value

    def _send(self, images: Tensor, account: str) -> Any:
        levels = images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)
        try:
            return self._function(levels.numpy() if self._arrays else levels)
        except Exception as error:
            if received():  # it was told to stop, and perhaps left off for that
                raise Stopped(f"stopped by {received()}{self._kept()}") from None
            raise UserError(f"{self.address} failed: {_blame(error, self._path)}{self._kept()}") from None

    def _read(self, content: Any, rows: int) -> np.ndarray:
        try:
            content = content.detach().cpu() if isinstance(content, Tensor) else content
            answers = np.asarray(content, dtype=np.float32)
        except (ValueError, TypeError):
            raise UserError(
                f"{self.address} answers with a {type(content).__name__} of something else than numbers ({rows}, "
                f"{self.dim}): correct it"
            ) from None
        if answers.shape != (rows, self.dim):
            raise UserError(f"{self.address} answers {answers.shape}, not ({rows}, {self.dim}): correct it, or its dim")
        return answers


def _file_and_name(address: str) -> tuple[Path, str]:
    file, _, name = address.removeprefix("python:").rpartition(":")
    if not file or not name.isidentifier():
        raise UserError(f"{address} names no function: give python:FILE.py:FUNCTION")
    path = Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"{file} is no Python file: give python:FILE.py:FUNCTION")
    return path, name


def _load_function(path: Path, name: str) -> Callable:
    """The function of that name. The file is run, as an import does."""
    spec = importlib.util.spec_from_file_location(f"victim_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for theirs there
    sys.path.append(str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} cannot be run: {_blame(error, path)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise UserError(f"{path} has no function {name}, only {', '.join(there) or 'none'}")
    return function


def _blame(error: BaseException, path: Path) -> str:
    """An exception in a line, with the line of the file that it comes from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    lines += [error.lineno] if isinstance(error, SyntaxError) else []
    said = next(iter(str(error).splitlines()), "")[:200]
    return f"{type(error).__name__}: {said}" + (f" (line {lines[-1]})" if lines else "")
