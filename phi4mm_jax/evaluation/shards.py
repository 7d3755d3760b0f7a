"""What runs leave of a task, and which of it belongs together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4mm_jax.evaluation.items import Answered, EvaluationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """All that was answered of a task in one directory: the whole of it, or one of several parts."""

    directory: Path
    """Where it is; named in errors."""
    number: int = 1
    """Which part, from 1."""
    of: int = 1
    """How many parts there are."""
    complete: bool = True
    """Whether all of the part was answered."""
    dataset: str
    """What was asked: a dataset with its split, or a local path."""
    settings: Mapping[str, Any]
    """JSON values that change answers or their speed, the same in all parts; None for what is not set."""
    versions: Mapping[str, str]
    """Of libraries."""
    hardware: Mapping[str, Any]
    """As `environment.hardware` gives it."""
    answered: Sequence[Answered]
    """In any order."""
    sessions: Sequence[Mapping[str, Any]]
    """What each run of the program that was not killed measured, see `speed`."""


def check_shards(shards: Sequence[Shard]) -> None:
    """Checks that shards are the complete parts of one evaluation.

    Raises:
      EvaluationError: they were asked otherwise, one is missing or unfinished, or an item is there twice.
    """
    first = shards[0]
    numbers: dict[int, Shard] = {}
    owners: dict[str, Shard] = {}
    for shard in shards:
        _check_same_questions(first, shard)
        if shard.of != first.of:
            raise EvaluationError(f"{shard.directory}: one of {shard.of} shards, but {first.directory} of {first.of}")
        if not shard.complete:
            raise EvaluationError(
                f"{shard.directory}: shard {shard.number} of {shard.of} is not finished; run it again"
            )
        if (other := numbers.setdefault(shard.number, shard)) is not shard:
            raise EvaluationError(f"{shard.directory}: shard {shard.number} is in {other.directory} too")
        for record in shard.answered:
            if owner := owners.get(record.id):
                where = "there twice" if owner is shard else f"in {owner.directory} too"
                raise EvaluationError(f"{shard.directory}: item {record.id} is {where}")
            owners[record.id] = shard
    if missing := sorted(set(range(1, first.of + 1)) - set(numbers)):
        found = ", ".join(str(shard.directory) for shard in shards)
        raise EvaluationError(f"{found}: shard {', '.join(map(str, missing))} of {first.of} is missing")


def _check_same_questions(first: Shard, shard: Shard) -> None:
    ours = {"dataset": first.dataset, **first.settings}
    theirs = {"dataset": shard.dataset, **shard.settings}
    if name := first_difference(ours, theirs):
        raise EvaluationError(
            f"{shard.directory}: {name} is {theirs.get(name)!r}, but {ours.get(name)!r} in {first.directory}"
        )


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first name, by the alphabet, under which two runs have been asked otherwise; None if there is none."""
    return next((name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)), None)
