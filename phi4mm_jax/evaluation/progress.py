"""How far an evaluation is, with the score so far: a bar on a terminal, plain lines elsewhere; on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Self

from tqdm import tqdm

_SECONDS_PER_LINE = 10.0


class Progress:
    """Of one task."""

    def __init__(self, task: str, metric: str, total: int, done: Iterable[str], show: bool):
        """Begins with what has been done before.

        Args:
          task: its name.
          metric: what its score is called.
          total: rows of the dataset that are asked.
          done: items, by their ids.
          show: whether to show anything.
        """
        self._metric, self._failed = metric, 0
        self._rows = set(map(_row, done))
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=len(self._rows), desc=task, unit="row", disable=not (show and terminal))
        self._lines = show and not terminal
        self._line = {"total": total, "prefix": task, "initial": len(self._rows)}
        self._postfix = ""
        self._begun = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines:
            self._print_line()
        self._bar.close()

    def advance(self, item: str, score: float | None, failed: bool) -> None:
        """Shows that an item is done.

        Args:
          item: its id.
          score: of all items so far, None if none counts.
          failed: whether it could not be asked.
        """
        self._rows.add(_row(item))
        self._failed += failed
        parts = [f"{self._metric} {score:.2f}"] if score is not None else []
        parts += [f"{self._failed} failed"] if self._failed else []
        self._postfix = ", ".join(parts)
        self._bar.set_postfix_str(self._postfix, refresh=False)
        self._bar.update(len(self._rows) - self._bar.n)
        if self._lines and time.monotonic() - self._last_line > _SECONDS_PER_LINE:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._begun
        form = "{desc}: {n_fmt} of {total_fmt} rows, {elapsed}, {remaining} left{postfix}"
        line = tqdm.format_meter(len(self._rows), elapsed=elapsed, bar_format=form, postfix=self._postfix, **self._line)
        print(line, file=sys.stderr, flush=True)


def _row(item: str) -> str:
    """The row's part of an item's id."""
    return item.partition(".")[0]
