"""Splits of datasets in Parquet: which files they are, and their rows by number."""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fsspec.utils import glob_translate

from phi4mm_jax.evaluation.items import EvaluationError, Row
from phi4mm_jax.evaluation.repositories import Repository

Splits = dict[str, dict[str, list[str]]]
"""Paths of Parquet files, by configuration and split; the configuration that needs no name is "default"."""

_SHARD = re.compile(r"(^\d+|[-_]?\d{5}-of-\d{5}(-[0-9a-f]{16})?)$")
"""What the name of a file says besides its split: 0000, -00000-of-00003, or the latter with a hash."""
_SPLITS = {"train", "test", "validation", "valid", "val", "dev"}
"""Names that folders of splits have; of others the files' names tell."""
_KEPT_BYTES = 256 << 20
"""Row groups that are kept, uncompressed; never fewer than two, for rows are read in order by several threads."""
_PIECE = 32 << 20
"""Bytes that are fetched at once."""


# --- which files ---------------------------------------------------------------------------------------------


def splits_of(repository: Repository) -> Splits:
    """Returns what the repository's README declares, or else what the names of its files tell.

    Raises:
      EvaluationError: the files cannot be listed or the README cannot be read.
    """
    paths = repository.paths()
    parquet = [path for path in paths if path.endswith(".parquet")]
    if not parquet:
        return {}
    return ("README.md" in paths and _declared(_read_text(repository, "README.md"), parquet)) or _named(parquet)


def find_split(splits: Splits, config: str | None, split: str | None, name: str) -> list[str]:
    """Returns the files of a split.

    Args:
      splits: of the repository.
      config: None for the default one.
      split: None for the only one.
      name: of the repository, for messages.

    Raises:
      EvaluationError: there is no such configuration or split; the message says which there are.
    """
    if not splits:
        raise EvaluationError(f"{name}: holds no Parquet files")
    of_config = splits.get(config or "default")
    if of_config is None:
        wanted = f"no configuration {config!r}" if config else "several configurations and no default one"
        raise EvaluationError(f"{name}: has {wanted}; there are {', '.join(sorted(splits))}")
    if split is None and len(of_config) == 1:
        return next(iter(of_config.values()))
    if split not in of_config:
        wanted = f"no split {split!r}" if split else "several splits"
        raise EvaluationError(
            f"{name}: configuration {config or 'default'!r} has {wanted}; there are {', '.join(sorted(of_config))}"
        )
    return of_config[split]


def _declared(readme: str, paths: Sequence[str]) -> Splits:
    """Reads the `configs` of a README's header, as documented for datasets on the hub."""
    header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    try:
        declared = yaml.safe_load(header[1]).get("configs") if header else None
    except (yaml.YAMLError, AttributeError):  # someone's mistake; the names of files tell enough
        declared = None
    splits: Splits = {}
    configs = [config for config in declared or () if isinstance(config, Mapping)]
    for config in configs:
        name, folder = str(config.get("config_name", "default")), str(config.get("data_dir") or "")
        if "data_files" in config:
            found = {
                split: list(dict.fromkeys(path for pattern in patterns for path in _matching(folder, pattern, paths)))
                for split, patterns in _patterns(config["data_files"]).items()
            }
        else:
            inside = [path for path in paths if path.startswith(posixpath.join(folder, ""))]
            found = _named(posixpath.relpath(path, folder or ".") for path in inside).get("default", {})
            found = {split: [posixpath.join(folder, path) for path in files] for split, files in found.items()}
        splits[name] = {split: files for split, files in found.items() if files}
        if config.get("default") or len(configs) == 1:
            splits["default"] = splits[name]
    return {name: of_config for name, of_config in splits.items() if of_config}


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Returns the patterns of a `data_files` entry by split; those without one are of the split "train"."""
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    patterns: dict[str, list[str]] = {}
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        entry = entry if isinstance(entry, Mapping) else {"path": entry}
        path = entry.get("path") or []
        patterns.setdefault(str(entry.get("split", "train")), []).extend(path if isinstance(path, list) else [path])
    return patterns


def _matching(folder: str, pattern: str, paths: Iterable[str]) -> list[str]:
    expression = re.compile(glob_translate(posixpath.normpath(posixpath.join(folder, pattern))))
    return sorted(path for path in paths if expression.match(path))


def _named(paths: Iterable[str]) -> Splits:
    """Tells configuration and split from paths such as data/test-00000-of-00003.parquet or config/test/0000.parquet."""
    splits: Splits = {}
    for path in sorted(paths):
        *folders, stem = PurePosixPath(path).with_suffix("").parts
        split = _SHARD.sub("", stem)
        if folders and (not split or folders[-1] in _SPLITS):
            split = folders.pop()
        config = "/".join(folder for folder in folders if folder != "data") or "default"
        splits.setdefault(config, {}).setdefault(split or "train", []).append(path)
    return splits


# --- rows ----------------------------------------------------------------------------------------------------


class ParquetRows:
    """Rows of some Parquet files, one after the other. Threads may share it; a row group is read once for all."""

    directory: Path | None = None

    def __init__(self, repository: Repository, paths: Sequence[str], description: str):
        """Reads the files' footers.

        Args:
          repository: where they are.
          paths: of the files.
          description: for messages and results.

        Raises:
          EvaluationError: a file cannot be read, or is not in Parquet.
        """
        self.description = description
        self._repository, self._paths = repository, paths
        with ThreadPoolExecutor(8) as pool:
            self._footers = list(pool.map(self._footer, paths))
        self.columns: Sequence[str] = self._footers[0].schema.to_arrow_schema().names
        self._groups = [(i, j) for i, footer in enumerate(self._footers) for j in range(footer.num_row_groups)]
        self._ends = list(accumulate(self._footers[i].row_group(j).num_rows for i, j in self._groups))
        sizes = [[group.total_byte_size for group in map(f.row_group, range(f.num_row_groups))] for f in self._footers]
        self.fingerprint = hashlib.blake2b(repr((self._ends, sizes)).encode(), digest_size=8).hexdigest()
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, Future[pa.Table]] = OrderedDict()  # by row group, the latest used last

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self._ends, index)
        table = self._table(group)
        return table.slice(index - self._ends[group] + table.num_rows, 1).to_pylist()[0]

    def column(self, name: str) -> list[Any]:
        if name not in self.columns:
            raise EvaluationError(f"{self.description}: no column {name!r}; there are {', '.join(self.columns)}")
        return [value for group in range(len(self._groups)) for value in self._read(group, [name])[name].to_pylist()]

    def _table(self, group: int) -> pa.Table:
        with self._lock:
            future = self._tables.pop(group, None)
            is_new = future is None
            future = self._tables[group] = future or Future()
            while len(self._tables) > 2 and sum(map(self._bytes, self._tables)) > _KEPT_BYTES:
                self._tables.popitem(last=False)
        if is_new:
            try:
                future.set_result(self._read(group))
            except BaseException as error:
                with self._lock:
                    self._tables.pop(group, None)
                future.set_exception(error)
        return future.result()

    def _bytes(self, group: int) -> int:
        file, group = self._groups[group]
        return self._footers[file].row_group(group).total_byte_size

    def _read(self, group: int, columns: list[str] | None = None) -> pa.Table:
        file, group = self._groups[group]
        footer = self._footers[file]
        try:
            with self._repository.open(self._paths[file]) as stream:
                part = _Part(stream, *_extent(footer.row_group(group), columns))
            # No threads of Arrow: one that still holds a Python object while the program ends aborts it.
            parquet = pq.ParquetFile(part, metadata=footer, pre_buffer=False)
            return parquet.read_row_group(group, columns, use_threads=False)
        except Exception as error:
            raise self._failure(error, self._paths[file]) from error

    def _footer(self, path: str) -> pq.FileMetaData:
        try:
            with self._repository.open(path) as stream:
                return pq.read_metadata(stream)
        except Exception as error:
            raise self._failure(error, path) from error

    def _failure(self, error: Exception, path: str) -> EvaluationError:
        is_damage = type(error) is OSError and error.errno is None  # so says Parquet's reader of unreadable footers
        if is_damage or isinstance(error, pa.ArrowException):
            reason = str(error).partition("\n")[0]
            return EvaluationError(f"{self._repository.name}/{path}: not a Parquet file, or a damaged one ({reason})")
        return EvaluationError(self._repository.explain(error))


class _Part(io.RawIOBase):
    """A part of a file in memory, where it lies in the file."""

    def __init__(self, file: BinaryIO, start: int, end: int):
        self._start, self._position = start, 0
        file.seek(start)
        pieces = []
        while missing := end - file.tell():
            pieces.append(file.read(min(missing, _PIECE)))
            if not pieces[-1]:
                raise pa.ArrowInvalid(f"ends {missing} bytes early")
        self._content = memoryview(b"".join(pieces))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = (0, self._position, self._start + len(self._content))[whence]
        self._position = origin + offset
        return self._position

    def read(self, size: int = -1) -> memoryview:
        begin = self._position - self._start
        found = self._content[begin : None if size < 0 else begin + size]
        self._position += len(found)
        return found


def _extent(group: pq.RowGroupMetaData, columns: list[str] | None) -> tuple[int, int]:
    """Where the columns of a row group begin and end in their file; they lie one after the other."""
    extents = []
    for chunk in map(group.column, range(group.num_columns)):
        if columns is None or chunk.path_in_schema.partition(".")[0] in columns:
            offsets = chunk.data_page_offset, chunk.dictionary_page_offset
            start = min(offset for offset in offsets if offset)
            extents.append((start, start + chunk.total_compressed_size))
    return min(start for start, _ in extents), max(end for _, end in extents)


def _read_text(repository: Repository, path: str) -> str:
    try:
        with repository.open(path) as stream:
            return stream.read().decode("utf-8", "replace")
    except Exception as error:
        raise EvaluationError(repository.explain(error)) from error
