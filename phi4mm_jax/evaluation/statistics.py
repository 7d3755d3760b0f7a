"""The score of a corpus, and how far another draw of its items could have moved it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from phi4mm_jax.evaluation.metrics.metric import Metric

RESAMPLES = 1000
"""Corpora of the same size that the bootstrap draws."""
CONFIDENCE = 95
"""Percent of them that an interval holds."""
_SEED = 2503


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A score with its confidence interval, by the percentiles of the bootstrap."""

    score: float | None
    """Percent or points; None where the metric defines none, as of no items."""
    low: float | None
    """Where the interval begins."""
    high: float | None
    """Where it ends."""
    units: int
    """Items, or groups of items, that were drawn from."""
    resampled: np.ndarray = dataclasses.field(repr=False)
    """[RESAMPLES] scores of the drawn corpora."""

    def summary(self) -> dict[str, float | int | None]:
        """What is kept of it as JSON."""
        return {"score": self.score, "low": self.low, "high": self.high, "units": self.units}


def estimate(
    metric: Metric,
    numbers: np.ndarray,  # [U, K]
    stream: str,
) -> Estimate:
    """Scores a corpus of U units.

    Args:
      metric: what the numbers are of.
      numbers: of each unit, in an order that does not depend on the run.
      stream: names the random numbers; corpora of other names are drawn independently.
    """
    units = len(numbers)
    if not units:
        return _estimate(float("nan"), np.full(RESAMPLES, np.nan), 0)
    random = np.random.default_rng([_SEED, *stream.encode()])
    sums = np.empty((RESAMPLES, numbers.shape[1]))
    for draw in sums:
        draw[:] = np.bincount(random.integers(units, size=units), minlength=units) @ numbers
    return _estimate(float(metric.score(numbers.sum(axis=0))), metric.score(sums), units)


def mean(estimates: Sequence[Estimate], digits: int | None = None) -> Estimate:
    """The unweighted mean of independent corpora.

    Args:
      estimates: of each corpus; one without a score leaves the mean without one.
      digits: to which the scores are rounded first, as some leaderboards do; None for not at all.
    """
    scores = np.array([np.nan if e.score is None else e.score for e in estimates])
    scores = scores if digits is None else scores.round(digits)
    resampled = np.mean([e.resampled for e in estimates], axis=0)
    return _estimate(float(scores.mean()), resampled, sum(e.units for e in estimates))


def _estimate(score: float, resampled: np.ndarray, units: int) -> Estimate:
    defined = resampled[np.isfinite(resampled)]
    low = high = None
    if np.isfinite(score) and len(defined):
        low, high = np.percentile(defined, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2]).tolist()
    return Estimate(
        score=score if np.isfinite(score) else None,
        low=low,
        high=high,
        units=units,
        resampled=resampled,
    )
