"""A checkpoint directory as a mapping from tensor name to a lazily read tensor.

Only headers are read up front. They are parsed here because a tensor's place in its file is needed, so that it can be
read straight to where it is wanted: a mapped 5 GB shard would count as resident memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from phi4mm_jax.models.lora import ADAPTERS
from phi4mm_jax.weights.mapping import adapter_of, canonical_name

INDEX_NAME = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_MAX_HEADER_BYTES = 100_000_000  # of the format


class CheckpointError(ValueError):
    """A checkpoint is unreadable or does not fit the model; the message lists everything that is wrong."""

    @classmethod
    def about(cls, directory: Path, problems: Iterable[str]) -> CheckpointError:
        """Returns one error that names all problems, a line each."""
        problems = list(problems)
        if len(problems) == 1:
            return cls(f"{directory}: {problems[0]}")
        return cls(f"{directory}: {len(problems)} problems:\n" + "\n".join(f"  {problem}" for problem in problems))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies."""

    file: Path
    """Its safetensors file."""
    dtype: np.dtype
    """Its number format."""
    shape: tuple[int, ...]
    """Its shape."""
    offset: int
    """Its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_into(self, out: np.ndarray, row: int = 0) -> None:
        """Fills `out` (contiguous, of this dtype) with consecutive rows, of the first axis, from `row` on.

        Raises:
          CheckpointError: the file has shrunk since its header was read.
        """
        bytes_left = memoryview(out.view(np.uint8).reshape(-1))
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + row * (self.nbytes // self.shape[0]))
            while bytes_left:  # one call reads at most 2 GiB
                count = file.readinto(bytes_left)
                if not count:
                    raise CheckpointError(f"{self.file}: ends before byte {self.offset + self.nbytes}")
                bytes_left = bytes_left[count:]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads what one safetensors file holds.

    Returns:
      Name, as stored, to tensor.

    Raises:
      CheckpointError: the file is missing, cut off, damaged, or has a tensor of an unsupported number format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise CheckpointError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull`")
            if len(start) < 8 or size < 8 + length or length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: truncated or no safetensors file ({size} bytes hold no whole header)")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _parse(path, name, 8 + length, **fields) for name, fields in header.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: damaged header; download the file again") from None
    end = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if size < end:
        raise CheckpointError(f"{path}: truncated: {size} bytes, but its header describes {end}")
    return tensors


def _parse(path: Path, name: str, base: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
    """Returns one header entry, checked; `base` is where the file's data begin."""
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
    begin, end = data_offsets
    tensor = StoredTensor(file=path, dtype=DTYPES[dtype], shape=tuple(map(int, shape)), offset=base + int(begin))
    if begin < 0 or min(shape, default=0) < 0 or end - begin != tensor.nbytes:
        raise ValueError("sizes contradict each other")
    return tensor


def read_checkpoint(directory: str | Path) -> dict[str, StoredTensor]:
    """Reads the headers of a checkpoint: its shards, and its adapter folders where the shards lack an adapter.

    Args:
      directory: holds `model.safetensors.index.json` and the shards it names, or else one or more `*.safetensors`; and
        possibly `vision-lora/` and `speech-lora/`.

    Returns:
      Canonical name (see `mapping.canonical_name`) to tensor.

    Raises:
      CheckpointError: with every file that is missing, cut off or damaged, and every name that occurs twice.
    """
    directory = Path(directory)
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []

    def add(path: Path, adapter: str = "") -> None:
        try:
            header = read_header(path)
        except CheckpointError as error:
            problems.append(str(error).removeprefix(f"{directory}/"))
            return
        for stored, tensor in header.items():
            name = canonical_name(stored, adapter)
            if name in tensors:
                problems.append(f"{name} is in both {tensors[name].file.name} and {path.name}")
            tensors[name] = tensor

    for path in _shards(directory):
        add(path)
    in_shards = {adapter_of(name) for name in tensors}
    for adapter in ADAPTERS:
        path = directory / f"{adapter}-lora" / ADAPTER_FILE
        if adapter not in in_shards and path.is_file():
            add(path, adapter)
    if problems:
        raise CheckpointError.about(directory, problems)
    return tensors


def _shards(directory: Path) -> list[Path]:
    """Returns the files that hold the model itself, present or not."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; expected a checkpoint directory")
    index = directory / INDEX_NAME
    if index.is_file():
        return [directory / name for name in sorted(set(read_index(index).values()))]
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{directory}: no *.safetensors files; expected a checkpoint directory")
    return shards


def read_index(index: Path) -> dict[str, str]:
    """Returns the map from tensor to file of a `model.safetensors.index.json`."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if all(isinstance(file, str) for file in weight_map.values()):
            return weight_map
    except (ValueError, LookupError, AttributeError, TypeError):
        pass
    raise CheckpointError(f"{index}: damaged; expected JSON with a weight_map from tensor to file")
