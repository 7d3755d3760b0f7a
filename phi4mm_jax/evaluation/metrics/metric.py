"""What a metric is: a few numbers of each answer that add up, and the score of their sum."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from phi4mm_jax.evaluation.items import EvaluationError

Measure = Callable[[str, Sequence[str], Mapping[str, Any]], Sequence[float]]
"""(prediction, references, facts of the item) to the K numbers of one answer."""

Grade = Callable[[str, Sequence[str], Mapping[str, Any]], float]
"""The same to one number from 0 to 1; there are references."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric over a corpus. Of an item its own score is that of its numbers alone."""

    name: str
    """As tasks call it: "wer", "wer:de", "anls"."""
    title: str
    """As a table calls it: "word error rate"."""
    lower_is_better: bool = False
    """Whether it counts errors."""
    measure: Measure
    """The numbers of one answer. An answer without any references left to compare with, by the metric's own rules,
    gives none at all (an empty sequence): it is left out."""
    score: Callable[[np.ndarray], np.ndarray]
    """Sums of numbers [..., K] float64 to scores [...], percent or points."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What a reader needs to compute the same: libraries with versions, normaliser, signature."""
    extras: tuple[Metric, ...] = ()
    """Other metrics of the same answers, to be shown beside its score."""


def mean(
    name: str,
    title: str,
    grade: Grade,
    settings: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Metric:
    """The metric that is the mean of grades from 0 to 1, in percent; items without references are left out."""

    def measure(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> Sequence[float]:
        return (float(grade(prediction, references, facts)), 1.0) if references else ()

    return Metric(name=name, title=title, measure=measure, score=percent, settings=settings or {}, **fields)


def percent(sums: np.ndarray) -> np.ndarray:
    """100 a / b of sums [..., (a, b)]; not a number where b is 0."""
    part, whole = sums[..., 0], sums[..., 1]
    return np.divide(100.0 * part, whole, out=np.full_like(part, np.nan), where=whole != 0)


def fact(facts: Mapping[str, Any], name: str, metric: str) -> Any:
    """A fact of the item.

    Raises:
      EvaluationError: it lacks the fact; the message names the metric, too.
    """
    if name not in facts:
        raise EvaluationError(f"{metric}: the item has no {name!r} among its facts, which are {sorted(facts)}")
    return facts[name]


def nearest_first(name: str, known: Iterable[str]) -> str:
    """Known names in words, those that are most like an unknown one before the others."""
    return ", ".join(sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio()))


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages, for the settings of a metric."""
    return {package: importlib.metadata.version(package) for package in packages}
