"""Saved models: the leaves as they lie in memory, quantized or not, so that loading them is only reading.

A saved model is a directory with the configuration and tokenizer files of its source, the arrays as Orbax or
safetensors files, and a manifest. The manifest has the size and checksum of every other file and is written last, and
the directory gets its name when all is done: what was cut short or damaged is never loaded. Four-bit values are stored
two in a byte, the first in the lower half, and float8_e4m3fn as its bits.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np

from phi4mm_jax.config import QuantizationConfig
from phi4mm_jax.config.building import build
from phi4mm_jax.config.files import read_json
from phi4mm_jax.weights.hub import CONFIGURATION_FILES
from phi4mm_jax.weights.progress import track
from phi4mm_jax.weights.reader import CheckpointError

Storage = Literal["orbax", "safetensors"]
"""How the arrays of a saved model are written."""

MANIFEST = "saved_model.json"
_FORMAT_VERSION = 1
_ORBAX = "arrays"
_SHARD_BYTES = 4 << 30
_CHUNK_BYTES = 8 << 20
_READERS = 4  # threads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a saved model holds."""

    source: str
    """What it was made from: a directory or a hub id."""
    revision: str | None
    """Commit of the source on the hub."""
    quantization: QuantizationConfig
    """How its leaves are quantized."""
    storage: Storage
    """How its arrays are written."""
    arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    """Type and shape of each array, as stored."""
    files: Mapping[str, tuple[int, int]]
    """Bytes and CRC-32 of every other file."""

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Reads the manifest of a saved model; None if the directory is no such thing.

        Raises:
          CheckpointError: it is damaged, or of a version that this package does not know.
        """
        path = directory / MANIFEST
        if not path.is_file():
            return None
        try:
            values = dict(read_json(path))
            if (version := values.pop("format_version")) != _FORMAT_VERSION:
                raise CheckpointError(f"{path}: has format_version {version}; this package reads {_FORMAT_VERSION}")
            if values["storage"] not in get_args(Storage):
                raise ValueError(f"storage = {values['storage']!r}: expected one of {', '.join(get_args(Storage))}")
            values["quantization"] = build(QuantizationConfig, values["quantization"])
            values["arrays"] = {name: (dtype, tuple(shape)) for name, (dtype, shape) in values["arrays"].items()}
            values["files"] = {name: (int(size), int(crc)) for name, (size, crc) in values["files"].items()}
            return cls(**values)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); save the model again") from None

    def write(self, directory: Path) -> None:
        """Writes it, as the last file of a saved model."""
        values = {"format_version": _FORMAT_VERSION, **dataclasses.asdict(self)}
        (directory / MANIFEST).write_text(json.dumps(values, indent=1) + "\n")


def check_new(path: Path) -> None:
    """Checks that a directory can be written.

    Raises:
      CheckpointError: there is something at `path`.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path}: already exists; name a new directory")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to be filled, under another name until that is done; nothing is left of it if it fails.

    Raises:
      CheckpointError: see `check_new`.
    """
    check_new(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(path)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial)
        raise


def save(
    path: Path,
    leaves: Mapping[str, Any],
    *,
    name: str,
    source: Path,
    quantization: QuantizationConfig,
    storage: Storage = "orbax",
    progress: bool = True,
) -> None:
    """Saves a model.

    Args:
      path: the directory to write, which must not exist or must be empty.
      leaves: dotted path to placed leaf, an array or a pytree of arrays.
      name: what the model was loaded as.
      source: the directory it was loaded from, whose configuration and tokenizer go with it.
      quantization: how the leaves are quantized.
      storage: `orbax`, which restores to any sharding, or `safetensors`, which other programs read too.
      progress: report it on standard error.

    Raises:
      CheckpointError: there is something at `path`.
    """
    with new_directory(path) as partial:
        for file in CONFIGURATION_FILES:
            if (source / file).is_file():
                (partial / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / file, partial / file)
        arrays = {key: _pack(leaf) for key, leaf in _named(leaves).items()}
        if storage == "orbax":
            _write_orbax(partial / _ORBAX, arrays)
        else:
            _write_safetensors(partial, arrays)
        files = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
        Manifest(
            source=name,
            revision=source.name if source.parent.name == "snapshots" else None,
            quantization=quantization,
            storage=storage,
            arrays={key: (array.dtype.name, array.shape) for key, array in arrays.items()},
            files=dict(_checksums(partial, files, "Checking what was written", progress)),
        ).write(partial)


def restore(directory: Path, manifest: Manifest, shapes: Mapping[str, Any], *, progress: bool = True) -> dict[str, Any]:
    """Reads the leaves of a saved model, after its files have been checked.

    Args:
      directory: that of the saved model.
      manifest: what `Manifest.read` said of it.
      shapes: dotted path to leaf, a `ShapeDtypeStruct` with a sharding or a pytree of them.
      progress: report it on standard error.

    Returns:
      Path to placed leaf.

    Raises:
      CheckpointError: files are missing or damaged, or are of another model; all of them are named.
    """
    wanted = _named(shapes)
    stored = {key: _packed_shape(shape) for key, shape in wanted.items()}
    problems = [f"missing: {key}" for key in sorted(stored.keys() - manifest.arrays.keys())]
    problems += [f"unknown: {key}" for key in sorted(manifest.arrays.keys() - stored.keys())]
    for key in sorted(stored.keys() & manifest.arrays.keys()):
        if (shape := manifest.arrays[key][1]) != stored[key].shape:
            problems.append(f"mis-shaped: {key} is {list(shape)}, expected {list(stored[key].shape)}")
    problems += [f"missing file {file}" for file in manifest.files if not (directory / file).is_file()]
    if not problems:
        checked = _checksums(directory, manifest.files, "Checking files", progress)
        problems = [f"damaged file {file}" for file, found in checked if found != manifest.files[file]]
    if problems:
        raise CheckpointError.about(directory, problems)
    read = _read_orbax if manifest.storage == "orbax" else _read_safetensors
    arrays = read(directory, stored)
    leaves = {key: _unpack(arrays.pop(key), shape) for key, shape in wanted.items()}
    return jax.tree.unflatten(jax.tree.structure(dict(shapes)), leaves.values())


# --- arrays --------------------------------------------------------------------------------------------------


def _named(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of all leaves by dotted path, in the order of `jax.tree`."""
    flat, _ = jax.tree.flatten_with_path(dict(leaves))
    return {".".join(str(getattr(k, "key", None) or k.name) for k in path): array for path, array in flat}


_PACKED = {jnp.dtype(jnp.int4): 2, jnp.dtype(jnp.float8_e4m3fn): 1}
"""Values to a byte, of the types that are not stored as such: safetensors' numpy reader has neither."""


def _pack(array: jax.Array) -> jax.Array:
    """An array [N, K] of a packed type as bytes [N, K / count]; others as they are."""
    if (count := _PACKED.get(array.dtype)) is None:
        return array
    rows = array.shape[0]
    return jax.lax.bitcast_convert_type(array.reshape(rows, -1, count), jnp.uint8).reshape(rows, -1)


def _packed_shape(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if (count := _PACKED.get(shape.dtype)) is None:
        return shape
    rows, columns = shape.shape
    return jax.ShapeDtypeStruct((rows, columns // count), jnp.uint8, sharding=shape.sharding)


def _unpack(array: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """The inverse of `_pack`."""
    if shape.dtype not in _PACKED:
        return array
    values = jax.lax.bitcast_convert_type(array, shape.dtype).reshape(shape.shape)
    return jax.block_until_ready(jax.device_put(values, shape.sharding))


def _write_orbax(path: Path, arrays: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp  # takes seconds to import

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), arrays)


def _read_orbax(directory: Path, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((directory / _ORBAX).resolve(), shapes)


def _write_safetensors(directory: Path, arrays: dict[str, jax.Array]) -> None:
    from safetensors.numpy import save_file

    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in arrays.items():
        if sum(a.nbytes for a in shards[-1].values()) + array.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][name] = np.asarray(array)
    for i, shard in enumerate(shards, start=1):
        save_file(shard, directory / f"arrays-{i:05}-of-{len(shards):05}.safetensors")


def _read_safetensors(directory: Path, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    from safetensors import safe_open

    arrays = {}
    for path in sorted(directory.glob("arrays-*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():
                array = jax.device_put(file.get_tensor(name), shapes[name].sharding)
                arrays[name] = jax.block_until_ready(array.astype(shapes[name].dtype))
    return arrays


# --- checksums -----------------------------------------------------------------------------------------------


def _checksums(
    directory: Path, files: Collection[str], action: str, progress: bool
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields each file with its size and CRC-32."""
    sizes = [(directory / file).stat().st_size for file in files]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="checksums") as readers:
        found = zip(files, readers.map(lambda file: _checksum(directory / file), files), strict=True)
        yield from track(
            found, lambda item: item[1][0], action=action, of="files", count=len(files), total=sum(sizes), show=progress
        )


def _checksum(path: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
