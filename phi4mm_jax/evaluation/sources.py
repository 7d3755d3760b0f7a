"""Rows of a dataset by number, wherever the dataset is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from phi4mm_jax.evaluation.items import EvaluationError, Row
from phi4mm_jax.evaluation.joined import JoinedRows
from phi4mm_jax.evaluation.manifests import read_folder, read_manifest
from phi4mm_jax.evaluation.parquet import ParquetRows, find_split, splits_of
from phi4mm_jax.evaluation.repositories import CONVERTED, LocalRepository, Repository, open_repository
from phi4mm_jax.evaluation.tasks.task import HubDataset, JoinedDataset

_ON_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?")
"""How a dataset on the hub is named where a path may stand too."""


class Source(Protocol):
    """Rows of a dataset. They are the same, in the same order, each time; threads may share it."""

    description: str
    """What it is: a file, a directory, or a repository with its commit, configuration and split."""
    fingerprint: str
    """Another one if rows were changed, as far as can be told without reading media."""
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
        """What all rows have there, of which nothing else is read.

        Raises:
          EvaluationError: there is no such column, or it cannot be read any more.
        """


def open_source(source: HubDataset | JoinedDataset | Path, data: str | Path | None = None) -> Source:
    """Opens the rows of a task; of remote ones no more than the number of rows is fetched.

    Args:
      source: the task's own.
      data: what the user has in its place. A JSONL, CSV or Parquet file; a directory that holds a copy of a hub
        repository, a manifest or media with texts, or several of these as `owner/name` or `name` of the task's
        repository; a directory with a JSONL, a CSV or a folder named as the task's configuration; or a repository on
        the hub, `owner/name[:config[:split]]`. Of a joined dataset, one table is taken for rows that are joined.

    Raises:
      EvaluationError: there is no such thing, it cannot be read, or it lacks the split.
    """
    if isinstance(source, JoinedDataset):
        rows, counterparts = open_source(source.rows, data), open_source(source.counterparts, data)
        is_one_table = rows.description == counterparts.description
        return rows if is_one_table else JoinedRows(rows, counterparts, source)
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
        raise EvaluationError(
            f"{dataset.config}: the hub has no such rows; name yours with --data: a JSONL or CSV, or a directory that "
            f"holds {dataset.config}.jsonl, {dataset.config}.csv, or a configuration {dataset.config} in Parquet"
        )
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
    return ParquetRows(repository, paths, _described(repository, dataset))


def _local(path: Path, dataset: HubDataset | None) -> Source:
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise EvaluationError(f"{path}: no such file or directory")
    repository = LocalRepository(path)
    splits = splits_of(repository)
    if dataset and dataset.repo and (dataset.config or "default") not in splits:
        inside = (path / dataset.repo, path / Path(dataset.repo).name)
        if copy := next((directory for directory in inside if directory.is_dir()), None):
            return _local(copy, dataclasses.replace(dataset, repo=None))
    if not splits:
        named = [path / f"{dataset.config}{suffix}" for suffix in (".jsonl", ".csv", "")] if dataset else []
        path = next((part for part in named if part.exists()), path)
        return read_folder(path) if path.is_dir() else read_manifest(path)
    paths = find_split(splits, dataset and dataset.config, dataset and dataset.split, repository.name)
    return ParquetRows(repository, paths, _described(repository, dataset))


def _described(repository: Repository, dataset: HubDataset | None) -> str:
    part = ", ".join(filter(None, (dataset.config, dataset.split))) if dataset else ""
    return f"{repository.name} ({part})" if part else repository.name


def _file(path: Path) -> Source:
    match path.suffix.lower():
        case ".jsonl" | ".csv":
            return read_manifest(path)
        case ".parquet":
            return ParquetRows(LocalRepository(path.parent), [path.name], str(path))
    raise EvaluationError(f"{path}: not a kind of dataset that can be read; accepted: .jsonl, .csv, .parquet")
