"""Rows of one dataset with columns of their counterparts in another, such as a translation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi4mm_jax.evaluation.items import EvaluationError, Row
from phi4mm_jax.evaluation.tasks.task import JoinedDataset

if TYPE_CHECKING:
    from phi4mm_jax.evaluation.sources import Source


class JoinedRows:
    """Rows of a `JoinedDataset`. What is read of counterparts is kept: keys and texts, no media."""

    def __init__(self, dataset: JoinedDataset, rows: Source, keys: Source, others: Source):
        """Finds what belongs together.

        Args:
          dataset: what is joined.
          rows: its own rows.
          keys: the same, of which the key alone is read.
          others: the counterparts, of which the key and the columns that are wanted are read.

        Raises:
          EvaluationError: a column is missing, or no row has a counterpart.
        """
        key, columns = dataset.key, dataset.columns
        for source, needed in ((keys, [key]), (others, [key, *columns.values()])):
            if missing := [column for column in needed if column not in source.columns]:
                raise EvaluationError(f"{source.description}: has no column {missing[0]!r}, which joining takes")
        counterparts: dict[object, Row] = {}
        for i in range(len(others)):
            other = others[i]
            counterparts.setdefault(other[key], {name: other[column] for name, column in columns.items()})
        found = ((i, counterparts.get(keys[i][key])) for i in range(len(keys)))
        self._pairs = [(i, counterpart) for i, counterpart in found if counterpart is not None]
        if not self._pairs:
            raise EvaluationError(f"{rows.description}: no row has the {key!r} of one of {others.description}")
        self._rows = rows
        self.description = f"{rows.description} with {others.description}"
        self.directory = rows.directory
        self.columns = [*rows.columns, *columns]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Row:
        i, counterpart = self._pairs[index]
        return {**self._rows[i], **counterpart}
