"""All tasks, as `phi4mm eval --list` shows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from phi4mm_jax.evaluation.tasks.catalogue import CATALOGUE
from phi4mm_jax.evaluation.tasks.suite import Suite, tasks_of
from phi4mm_jax.evaluation.tasks.task import HubDataset, JoinedDataset, Task


def listing() -> str:
    """A table for a terminal: suites with their tasks below them, and tasks of their own."""
    rows = [("TASK", "METRIC", "PUBLISHED", "DATASET"), *_rows()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _rows() -> Iterator[tuple[str, str, str, str]]:
    for entry in CATALOGUE:
        if isinstance(entry, Suite):
            yield entry.name, "mean" if entry.averaged else "", _published(entry), entry.title
        for task in tasks_of(entry):
            indent = "  " if task is not entry else ""
            yield indent + task.name, task.metric, _published(task), _dataset(task.source)


def _published(entry: Task | Suite) -> str:
    return f"{entry.published.score:g}" if entry.published else ""


def _dataset(source: HubDataset | JoinedDataset | Path) -> str:
    rows = source.rows if isinstance(source, JoinedDataset) else source
    if isinstance(rows, Path) or rows.repo is None:
        return "your own (--data)"
    return " ".join(filter(None, (rows.repo, rows.config, rows.split)))
