"""A suite: tasks that are reported together, and the mean of their scores."""

from __future__ import annotations

import dataclasses

from phi4mm_jax.evaluation.tasks.task import Published, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """What `phi4mm eval NAME` runs one task after the other."""

    name: str
    """Lower case."""
    title: str
    """As papers write it."""
    tasks: tuple[Task, ...]
    """Its parts, each named `SUITE/PART`."""
    averaged: bool = True
    """Whether the mean of the parts' scores means anything."""
    digits: int | None = None
    """To how many digits each score is rounded before the mean is taken; None: it is not."""
    published: Published | None = None
    """What others report for the mean."""
    note: str = ""
    """What a reader of the mean must know."""


def tasks_of(entry: Task | Suite) -> tuple[Task, ...]:
    """The tasks of a suite; a task alone."""
    return entry.tasks if isinstance(entry, Suite) else (entry,)
