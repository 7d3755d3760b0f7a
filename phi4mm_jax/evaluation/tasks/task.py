"""A task: where its rows come from, how they are asked, and how answers are scored."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4mm_jax.evaluation.items import EvaluationError, Item, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A split of a dataset on the hub, in Parquet."""

    repo: str | None
    """Such as "lmms-lab/DocVQA"; None for one that the hub does not have, whose rows are always given."""
    config: str | None = None
    """Its configuration; None for the only one."""
    split: str = "test"
    """Which part of it."""
    revision: str | None = None
    """Branch, tag or commit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinedDataset:
    """Rows of a dataset, each with columns of its counterpart in another; those without a counterpart are left out."""

    rows: HubDataset
    """Whose rows they are, all of them in their order: several may have the same counterpart."""
    counterparts: HubDataset
    """Where the other columns are; of rows with the same key the first counts."""
    key: str = "id"
    """Column by which rows belong together."""
    columns: Mapping[str, str]
    """Columns of the counterpart, by the names that they get."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a row has what. Of several names the first that the row has counts."""

    name: tuple[str, ...] = ("id",)
    """The item's name; the row's number where there is none."""
    images: tuple[str, ...] = ()
    """Pictures, each column one or a list of them; those that are null are left out."""
    audios: tuple[str, ...] = ()
    """Recordings, likewise."""
    references: tuple[str, ...] = ("answers", "answer")
    """Right answers: a string, a number, or a list of these."""
    subset: tuple[str, ...] = ()
    """What results are broken down by."""
    facts: tuple[str, ...] = ()
    """Columns that the metric needs, all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A score that others report for the released model."""

    score: float
    """Percent, or points of BLEU."""
    source: str
    """Who, and on what, where it differs from this task."""


REPORT = "technical report, second-hand"
"""Source of scores of the released model's report that are known from what others wrote about it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What `phi4mm eval NAME` runs."""

    name: str
    """Lower case; a part of a suite has the suite's name before a slash."""
    title: str
    """As papers write it."""
    source: HubDataset | JoinedDataset | Path
    """Its rows: on the hub, or a local directory, JSONL or CSV."""
    columns: Columns = Columns()
    """Where a row has what."""
    prompt: str = "{question}"
    """Text of the user, with columns in braces; `{{` is a brace."""
    max_tokens: int = 128
    """Of an answer."""
    ignore_eos: bool = False
    """Whether every answer has as many tokens, whatever it says: to measure speed."""
    metric: str
    """By name, see `metrics.registry`."""
    prepare: Callable[[Row], Iterable[Row]] | None = None
    """Turns a raw row into one or several; for what `columns` cannot say."""
    published: Published | None = None
    """What others report."""
    note: str = ""
    """What a reader of the score must know."""

    def items(self, number: int, row: Row, directory: Path | None = None) -> list[Item]:
        """The items of a row.

        Args:
          number: of the row in its dataset.
          row: by column.
          directory: that relative paths of media are relative to.

        Raises:
          EvaluationError: the row lacks what the task needs; the message names the column.
        """
        try:
            rows = list(self.prepare(row)) if self.prepare else [row]
        except KeyError as error:
            raise EvaluationError(f"{self.name}: row {number} has no column {error}") from None
        ids = [str(number)] if len(rows) == 1 else [f"{number}.{i}" for i in range(len(rows))]
        return [self._item(id, row, directory) for id, row in zip(ids, rows, strict=True)]

    def _item(self, id: str, row: Row, directory: Path | None) -> Item:
        columns = self.columns
        name = _first(row, columns.name)
        references = _first(row, columns.references)
        if references is None:
            raise EvaluationError(f"{self.name}: row {id} has none of the columns {', '.join(columns.references)}")
        try:
            prompt = self.prompt.format_map({name: value for name, value in row.items() if value is not None})
        except KeyError as error:
            raise EvaluationError(f"{self.name}: row {id} has no column {error}, which the prompt shows") from None
        if missing := [column for column in columns.facts if column not in row]:
            raise EvaluationError(f"{self.name}: row {id} has no column {missing[0]!r}, which the metric needs")
        facts = {column: row[column] for column in columns.facts}
        subset = _first(row, columns.subset)
        if subset is not None:
            facts["subset"] = str(subset)
        if "group" in row:
            facts["group"] = row["group"]
        return Item(
            id=id,
            name=id if name is None else str(name),
            prompt=prompt,
            images=tuple(self._media(id, row, columns.images, directory)),
            audios=tuple(self._media(id, row, columns.audios, directory)),
            references=tuple(map(str, references if isinstance(references, (list, tuple)) else [references])),
            facts=facts,
        )

    def _media(self, id: str, row: Row, columns: Sequence[str], directory: Path | None) -> Iterable[Any]:
        """Media of some columns: bytes, or paths that no longer depend on where the dataset is."""
        if columns and not any(column in row for column in columns):
            raise EvaluationError(f"{self.name}: row {id} has none of the columns {', '.join(columns)}")
        for column in columns:
            found = row.get(column)
            for medium in found if isinstance(found, (list, tuple)) else [found]:
                if isinstance(medium, Mapping):  # as Parquet files hold them
                    medium = medium.get("bytes") or medium.get("path")
                if medium is None:
                    continue
                if isinstance(medium, (str, os.PathLike)) and directory and "://" not in str(medium)[:20]:
                    medium = str(medium) if str(medium).startswith("data:") else directory / medium
                yield medium


def _first(row: Row, names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
