"""What a metric is: a few numbers of each answer that add up, and the score of their sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Measure = Callable[[str, Sequence[str], Mapping[str, Any]], Sequence[float]]
"""(prediction, references, facts of the item) to the K numbers of one answer."""


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
