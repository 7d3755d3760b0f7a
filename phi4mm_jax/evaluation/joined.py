"""Rows of one dataset with columns of their counterparts in another, such as a translation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phi4mm_jax.evaluation.items import EvaluationError, Row
from phi4mm_jax.evaluation.tasks.task import JoinedDataset

if TYPE_CHECKING:
    from phi4mm_jax.evaluation.sources import Source


class JoinedRows:
    """Rows of a `JoinedDataset`. What is read of counterparts is kept: keys and texts, no media."""

    def __init__(self, rows: Source, counterparts: Source, dataset: JoinedDataset):
        """Finds what belongs together.

        Raises:
          EvaluationError: a column is missing, no row has a counterpart, or the sources cannot be read.
        """
        self.description = f"{rows.description} with {counterparts.description}"
        self.fingerprint = f"{rows.fingerprint} {counterparts.fingerprint}"
        self.directory = rows.directory
        self.columns = list(dict.fromkeys((*rows.columns, *dataset.columns)))
        places: dict[Any, int] = {}
        for place, key in enumerate(counterparts.column(dataset.key)):
            places.setdefault(key, place)
        self._pairs = [(row, places[key]) for row, key in enumerate(rows.column(dataset.key)) if key in places]
        if not self._pairs:
            raise EvaluationError(
                f"{rows.description}: no row has the {dataset.key!r} of one of {counterparts.description}"
            )
        self._rows = rows
        self._others = {name: counterparts.column(column) for name, column in dataset.columns.items()}

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Row:
        row, place = self._pairs[index]
        return {**self._rows[row], **{name: values[place] for name, values in self._others.items()}}

    def column(self, name: str) -> list[Any]:
        if name in self._others:
            return [self._others[name][place] for _, place in self._pairs]
        values = self._rows.column(name)
        return [values[row] for row, _ in self._pairs]
