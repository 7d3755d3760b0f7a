"""Filling a model's leaves from a checkpoint: checked from headers alone, then streamed tensor by tensor."""

from __future__ import annotations

import dataclasses
import logging
import math
import mmap
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.weights.mapping import RULES, TIED_HEAD, Entry, entries
from phi4mm_jax.weights.progress import track
from phi4mm_jax.weights.reader import CheckpointError, StoredTensor, read_checkpoint

logger = logging.getLogger(__name__)

Placed = TypeVar("Placed")

_READERS = 4  # threads; what they hold is not yet placed, so few
_SCRATCH_BYTES = 4_000_000  # converted at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a load did."""

    num_tensors: int
    """Tensors read."""
    num_bytes: int
    """Their size in the checkpoint."""
    seconds: float
    """How long it took."""
    skipped: Mapping[str, str]
    """Tensors left unread, each with the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Assignment:
    """One tensor, the leaf it fills, and the leaf's number format."""

    tensor: StoredTensor
    entry: Entry
    dtype: np.dtype

    def value(self) -> np.ndarray:
        """Returns the leaf's value: each row is read straight to its place, or is converted on the way there."""
        tensor, scale = self.tensor, np.float32(self.entry.scale)
        leaf = _host_buffer(self.entry.leaf_shape, self.dtype)
        rows = leaf.reshape(tensor.shape[0], -1)
        step = max(1, _SCRATCH_BYTES // (rows.shape[1] * tensor.dtype.itemsize))
        for source, target in self.entry.row_moves():
            if scale == 1 and tensor.dtype == self.dtype:
                tensor.read_into(rows[target], source.start)
                continue
            for done in range(0, source.stop - source.start, step):
                block = rows[target][done : done + step]
                scratch = np.empty(block.shape, tensor.dtype)
                tensor.read_into(scratch, source.start + done)
                block[...] = scratch if scale == 1 else scratch.astype(np.float32) * scale  # rounds once
        return leaf


def _host_buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns uninitialised memory of its own pages: JAX on CPU adopts it without a copy, and it is freed at once."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype).reshape(shape)


def load(
    directory: str | Path,
    config: ModelConfig,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    place: Callable[[str, np.ndarray], Placed],
    *,
    progress: bool = True,
) -> tuple[dict[str, Placed], LoadReport]:
    """Reads every leaf of a model from a checkpoint in either layout.

    Host memory holds what has been placed, plus a few tensors that are being read ahead.

    Args:
      directory: see `reader.read_checkpoint`.
      config: the model's sizes.
      abstract: dotted path to shape and dtype of every leaf; values arrive in that dtype.
      place: takes a path and the leaf's value and returns what is to be kept of it, such as a sharded `jax.Array` or
        a quantized pair. The array is not touched again, so `jax.device_put` may adopt its memory.
      progress: show a bar on a terminal, or plain lines elsewhere.

    Returns:
      Path to placed value, in the order of `abstract`; and the report.

    Raises:
      CheckpointError: before any tensor is read, with every missing, unknown or mis-shaped tensor.
    """
    start = time.monotonic()
    directory = Path(directory)
    assignments, skipped = _assign(directory, read_checkpoint(directory), config, abstract)
    placed: dict[str, Placed] = {}
    num_bytes = sum(a.tensor.nbytes for a in assignments)
    for assignment, value in track(
        _read_ahead(assignments),
        lambda pair: pair[0].tensor.nbytes,
        action="Loading weights",
        of="tensors",
        count=len(assignments),
        total=num_bytes,
        show=progress,
    ):
        placed[assignment.entry.path] = place(assignment.entry.path, value)
    report = LoadReport(
        num_tensors=len(assignments),
        num_bytes=num_bytes,
        seconds=time.monotonic() - start,
        skipped=skipped,
    )
    logger.info(
        "%s: %d tensors, %.1f GB in %.1f s",
        *(directory, report.num_tensors, report.num_bytes / 1e9, report.seconds),
    )
    for reason, count in Counter(skipped.values()).items():
        logger.info("skipped %d tensors: %s", count, reason)
    return {path: placed[path] for path in abstract}, report


def _assign(
    directory: Path,
    tensors: Mapping[str, StoredTensor],
    config: ModelConfig,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> tuple[list[_Assignment], dict[str, str]]:
    """Matches tensors with leaves, in the order in which they lie on disk; also returns the skipped ones' reasons."""
    rules = (*RULES, TIED_HEAD)
    tables = [{e.name: e for e in entries(config, layout, rules)} for layout in ("hub", "native")]
    table = max(tables, key=lambda table: len(table.keys() & tensors.keys()))
    assignments, skipped, problems = [], {}, []
    unfilled = set(abstract)
    for name, tensor in tensors.items():
        entry = table.get(name)
        if entry is None:
            problems.append(f"unknown: {name} {list(tensor.shape)}")
            continue
        if entry.skipped:
            skipped[name] = entry.skipped
            continue
        if tensor.shape != entry.shape:
            problems.append(f"mis-shaped: {name} is {list(tensor.shape)}, expected {list(entry.shape)}")
        elif entry.path not in unfilled or abstract[entry.path].shape != entry.leaf_shape:
            problems.append(f"no leaf {entry.path} {list(entry.leaf_shape)} in the model for {name}")
        else:
            assignments.append(_Assignment(tensor=tensor, entry=entry, dtype=np.dtype(abstract[entry.path].dtype)))
        unfilled.discard(entry.path)
    names = {e.path: e.name for e in table.values()}
    problems += [f"missing: {names.get(path, '(no tensor in the table)')} for {path}" for path in sorted(unfilled)]
    if problems:
        raise CheckpointError.about(directory, sorted(problems))
    return sorted(assignments, key=lambda a: (a.tensor.file, a.tensor.offset)), skipped


def _read_ahead(assignments: Iterable[_Assignment]) -> Iterator[tuple[_Assignment, np.ndarray]]:
    """Yields each assignment with its leaf's value, in order, while the next few are read in the background."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="weights") as readers:
        pending: deque[tuple[_Assignment, Future[np.ndarray]]] = deque()
        for assignment in assignments:
            if len(pending) == _READERS:
                done, value = pending.popleft()
                yield done, value.result()
            pending.append((assignment, readers.submit(assignment.value)))
        while pending:
            done, value = pending.popleft()
            yield done, value.result()
