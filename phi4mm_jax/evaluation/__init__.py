"""Batch evaluation: tasks in, scores out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi4mm_jax.evaluation.gathering import merge
    from phi4mm_jax.evaluation.run import evaluate
    from phi4mm_jax.evaluation.tasks.custom import custom
    from phi4mm_jax.evaluation.tasks.suite import Suite
    from phi4mm_jax.evaluation.tasks.task import Columns, HubDataset, Task

__all__ = ["Columns", "HubDataset", "Suite", "Task", "custom", "evaluate", "merge"]

_HOMES = {
    "Columns": "tasks.task",
    "HubDataset": "tasks.task",
    "Suite": "tasks.suite",
    "Task": "tasks.task",
    "custom": "tasks.custom",
    "evaluate": "run",
    "merge": "gathering",
}


def __getattr__(name: str) -> Any:
    """Loads public names on first use: `phi4mm eval --help` needs none of their libraries."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
