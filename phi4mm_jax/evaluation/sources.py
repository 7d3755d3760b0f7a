"""Rows of a dataset by number, wherever the dataset is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from phi4mm_jax.evaluation.items import EvaluationError, Row
from phi4mm_jax.evaluation.manifests import read_folder, read_manifest
from phi4mm_jax.evaluation.parquet import ParquetRows, find_split, splits_of
from phi4mm_jax.evaluation.repositories import CONVERTED, LocalRepository, open_repository
from phi4mm_jax.evaluation.tasks.task import HubDataset, JoinedDataset

_ON_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?")
"""How a dataset on the hub is named where a path may stand too."""


class Source(Protocol):
    """Rows of a dataset. They are the same, in the same order, each time; threads may share it."""

    description: str
    """What it is: a file, a directory, or a repository with its commit, configuration and split."""
    directory: Path | None
    """That relative paths of media start from; None if rows hold their media."""
    columns: Sequence[str]
    """Names that rows have."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """A row.

        Raises:
          EvaluationError: it cannot be read any more.
        """

    def column(self, name: str) -> list[Any]:
        """What all rows have there, without reading the rest of them.

        Raises:
          EvaluationError: there is no such column, or it cannot be read any more.
        """


def open_source(source: HubDataset | JoinedDataset | Path, data: str | Path | None = None) -> Source:
    """Opens the rows of a task; of remote ones no more than the number of rows is fetched.

    Args:
      source: the task's own.
      data: what the user has in its place. A JSONL, CSV or Parquet file; a directory that holds a copy of a hub
        repository, a manifest or media with texts, or several of these as `owner/name` or `name` of the task's
        repository, or by its configuration; or a repository on the hub, `owner/name[:config[:split]]`.

    Raises:
      EvaluationError: there is no such thing, it cannot be read, or it lacks the split.
    """
    if isinstance(source, JoinedDataset):
        rows = open_source(source.rows, data)
        if data is not None and set(source.columns) <= set(rows.columns):  # the user has joined them
            return rows
        return JoinedRows(rows, open_source(source.counterparts, data), source)
    own = source if isinstance(source, HubDataset) else None
    if data is None:
        return _on_hub(own) if own else _local(Path(source).expanduser(), None)
    path = Path(data).expanduser()
    if path.exists():
        return _local(path, own)
    if not (named := _ON_HUB.fullmatch(str(data))):
        raise EvaluationError(
            f"{data}: no such file or directory; accepted: a JSONL, CSV or Parquet file, a directory, or a dataset on "
            "the hub, owner/name[:config[:split]]"
        )
    given = {name: value for name, value in named.groupdict().items() if value}
    return _on_hub(dataclasses.replace(own, revision=None, **given) if own else HubDataset(**given))


class JoinedRows:
    """Rows with columns of their counterparts, which are read at once, as far as they are needed."""

    def __init__(self, rows: Source, counterparts: Source, joined: JoinedDataset):
        """Finds what belongs together.

        Raises:
          EvaluationError: a column is missing, nothing belongs together, or the sources cannot be read.
        """
        self.description = f"{rows.description} with {counterparts.description}"
        self.directory = rows.directory
        self.columns: Sequence[str] = list(dict.fromkeys((*rows.columns, *joined.columns)))
        keys = counterparts.column(joined.key)
        places = {key: place for place, key in reversed([*enumerate(keys)])}  # of several the first
        self._found = [(row, places[key]) for row, key in enumerate(rows.column(joined.key)) if key in places]
        if not self._found:
            raise EvaluationError(f"{self.description}: no two rows have the same {joined.key!r}")
        self._rows = rows
        self._others = {name: counterparts.column(column) for name, column in joined.columns.items()}

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int) -> Row:
        row, place = self._found[index]
        return {**self._rows[row], **{name: values[place] for name, values in self._others.items()}}

    def column(self, name: str) -> list[Any]:
        if name in self._others:
            return [self._others[name][place] for _, place in self._found]
        values = self._rows.column(name)
        return [values[row] for row, _ in self._found]


def rows_of_shard(total: int, limit: int | None, shard: tuple[int, int]) -> range:
    """Returns the rows of one shard of several: blocks of about equal size that together are all rows.

    Args:
      total: rows of the dataset.
      limit: how many of them count, the first ones; None for all.
      shard: which one, from 1, of how many.

    Raises:
      EvaluationError: there is no such shard, or nothing within the limit.
    """
    index, count = shard
    if not 1 <= index <= count:
        raise EvaluationError(f"shard {index}/{count}: expected I/N with I from 1 to N")
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit {limit}: expected at least 1")
    counted = total if limit is None else min(total, limit)
    return range(counted * (index - 1) // count, counted * index // count)


def _on_hub(dataset: HubDataset) -> Source:
    if dataset.repo is None:
        raise EvaluationError("the rows of this task are not on the hub: give them with --data")
    repository = open_repository(dataset.repo, dataset.revision)
    splits = splits_of(repository)
    if not splits:
        try:
            repository = open_repository(dataset.repo, CONVERTED)
        except EvaluationError as error:
            raise EvaluationError(
                f"{dataset.repo}: holds no Parquet files, and the hub has not made any ({error})"
            ) from error
        splits = splits_of(repository)
    paths = find_split(splits, dataset.config, dataset.split, dataset.repo)
    return ParquetRows(repository, paths, _described(repository.name, dataset.config, dataset.split))


def _local(path: Path, dataset: HubDataset | None) -> Source:
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise EvaluationError(f"{path}: no such file or directory")
    config, split = (dataset.config, dataset.split) if dataset else (None, None)
    if dataset and dataset.repo:
        path = _first_directory(path / dataset.repo, path / Path(dataset.repo).name) or path
    repository = LocalRepository(path)
    if splits := splits_of(repository):
        paths = find_split(splits, config, split, repository.name)
        return ParquetRows(repository, paths, _described(repository.name, config, split))
    return read_folder((config and _first_directory(path / config)) or path)


def _described(name: str, config: str | None, split: str | None) -> str:
    return " ".join((name, *filter(None, (config, split))))


def _first_directory(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_dir()), None)


def _file(path: Path) -> Source:
    match path.suffix.lower():
        case ".jsonl" | ".csv":
            return read_manifest(path)
        case ".parquet":
            return ParquetRows(LocalRepository(path.parent), [path.name], str(path))
    raise EvaluationError(f"{path}: not a kind of dataset that can be read; accepted: .jsonl, .csv, .parquet")
