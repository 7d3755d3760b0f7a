"""From the answers to a task to its results: score, breakdown, counts and speed, as a value and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi4mm_jax.evaluation.items import Answered, EvaluationError
from phi4mm_jax.evaluation.metrics.metric import Metric
from phi4mm_jax.evaluation.shards import Shard
from phi4mm_jax.evaluation.speed import Speed, measure_speed, total
from phi4mm_jax.evaluation.statistics import CONFIDENCE, RESAMPLES, Estimate, estimate, mean
from phi4mm_jax.evaluation.tasks.task import Published, Task

_LENGTHS = 6
"""Classes of length that scores are shown by, of equally many units."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the items."""

    items: int = 0
    """All of them."""
    answered: int = 0
    """With an answer that counts."""
    errors: int = 0
    """Could not be asked; count as empty answers."""
    left_out: int = 0
    """Do not count."""
    cut: int = 0
    """Reached the limit of tokens before their answer ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthClass:
    """The score of the units of some length."""

    low: float
    """Of the shortest."""
    high: float
    """Of the longest."""
    estimate: Estimate
    """Their score."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extra:
    """Another metric of the same answers."""

    name: str
    """Of the metric, as are the next two."""
    title: str
    lower_is_better: bool
    estimate: Estimate
    """Its score, of all answers: groups are drawn together, but their items count each."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """Of a task or of a suite."""

    name: str
    """Of the task, as are the next two."""
    title: str
    note: str
    dataset: str
    """What was asked."""
    shards: str
    """Which part of it that is, such as "1 of 4"; empty for the whole."""
    parts: Sequence[str] = ()
    """Names of the tasks of a suite."""
    metric: str
    """Its title."""
    metric_name: str
    """As tasks call it."""
    metric_settings: Mapping[str, Any]
    """What computing the same needs."""
    lower_is_better: bool
    """Whether the metric counts errors."""
    estimate: Estimate
    """The score and its confidence interval."""
    extras: Sequence[Extra] = ()
    """Scores by other metrics, beside it."""
    published: Published | None
    """What others report."""
    subsets: Mapping[str, Estimate]
    """The breakdown by subset, or of a suite by task."""
    length: str
    """What length is: "seconds of audio" or "tokens of the prompt"."""
    lengths: Sequence[LengthClass]
    """The breakdown by length, from the shortest."""
    counts: Counts
    """What became of the items."""
    settings: Mapping[str, Any]
    """Of the run."""
    versions: Mapping[str, str]
    """Of libraries; several with commas if shards differ."""
    hardware: Sequence[Mapping[str, Any]]
    """Of each shard."""
    speed: Speed
    """How fast it was."""
    answered: Sequence[Answered] = dataclasses.field(repr=False)
    """The items with their scores, in the order of their ids; of a suite none."""

    @property
    def score(self) -> float | None:
        """Percent or points."""
        return self.estimate.score

    @property
    def difference(self) -> float | None:
        """From the published score."""
        return None if self.score is None or self.published is None else self.score - self.published.score

    def summary(self) -> dict[str, Any]:
        """All but the single answers, as JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "note": self.note,
            "dataset": self.dataset,
            "shards": self.shards,
            "parts": list(self.parts),
            "metric": {
                "name": self.metric_name,
                "title": self.metric,
                "lower_is_better": self.lower_is_better,
                "settings": dict(self.metric_settings),
            },
            **self.estimate.summary(),
            "interval": f"bootstrap, {CONFIDENCE} %, percentiles of {RESAMPLES} resamples",
            "extras": {
                extra.name: {"title": extra.title, "lower_is_better": extra.lower_is_better, **extra.estimate.summary()}
                for extra in self.extras
            },
            "published": self.published and dataclasses.asdict(self.published),
            "difference": self.difference,
            "subsets": {name: part.summary() for name, part in self.subsets.items()},
            "length": self.length,
            "lengths": [{"from": c.low, "to": c.high, **c.estimate.summary()} for c in self.lengths],
            "counts": dataclasses.asdict(self.counts),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "hardware": [dict(machine) for machine in self.hardware],
            "speed": self.speed.summary(),
        }

    def save(self, path: Path) -> None:
        """Writes the JSON; another reader sees all of it or what was there before."""
        replace_text(path, json.dumps(self.summary(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a file under another name first, so that there never is half of it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="replace")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def score_task(task: Task, metric: Metric, shards: Sequence[Shard]) -> Results:
    """Scores the answers to a task. Scores do not depend on how the items were cut into shards and sessions.

    Args:
      task: what was asked.
      metric: of the task.
      shards: some or all parts of one evaluation, see `shards.check_shards`.
    """
    records = sorted((record for shard in shards for record in shard.answered), key=lambda record: _order(record.id))
    scored = [_score_item(metric, record) for record in records]
    answered = [record for record, _ in scored]
    units = _units(scored, np.min)  # a group is right only if all of it is
    numbers = np.array([unit.numbers for unit in units])
    found = sorted({unit.subset for unit in units} - {None})
    chosen = {subset: [unit.subset == subset for unit in units] for subset in found}
    length, lengths = _by_length(task, metric, units, numbers)
    numbered = sorted(shard.number for shard in shards)
    counted = {record.id for record in answered if record.error is None and record.left_out is None}
    return Results(
        name=task.name,
        title=task.title,
        note=task.note,
        dataset=shards[0].dataset,
        shards="" if len(shards) == shards[0].of else f"{', '.join(map(str, numbered))} of {shards[0].of}",
        metric=metric.title,
        metric_name=metric.name,
        metric_settings=metric.settings,
        lower_is_better=metric.lower_is_better,
        estimate=estimate(metric, numbers, task.name),
        extras=[_extra(task, extra, answered) for extra in metric.extras],
        published=task.published,
        subsets={s: estimate(metric, numbers[mask], f"{task.name}/{s}") for s, mask in chosen.items()},
        length=length,
        lengths=lengths,
        counts=Counts(
            items=len(answered),
            answered=len(counted),
            errors=sum(record.error is not None and record.left_out is None for record in answered),
            left_out=sum(record.left_out is not None for record in answered),
            cut=sum(record.finish_reason == "length" and record.id in counted for record in answered),
        ),
        settings=shards[0].settings,
        versions=_together([shard.versions for shard in shards]),
        hardware=[shard.hardware for shard in shards],
        speed=measure_speed(shards, counted),
        answered=answered,
    )


def score_suite(
    name: str,
    title: str,
    parts: Sequence[Results],
    digits: int | None = None,
    published: Published | None = None,
    note: str = "",
) -> Results:
    """The mean of several tasks, each of which weighs the same.

    Args:
      name: of the suite.
      title: as papers write it.
      parts: results of its tasks.
      digits: to which their scores are rounded first; None for not at all.
      published: what others report.
      note: what a reader of the score must know.
    """
    if len({part.lower_is_better for part in parts}) != 1:
        raise EvaluationError(f"{name}: no mean of metrics of which some count errors")
    titles = {part.metric: None for part in parts}
    counts = {f.name: sum(getattr(part.counts, f.name) for part in parts) for f in dataclasses.fields(Counts)}
    return Results(
        name=name,
        title=title,
        note=note,
        dataset=f"{len(parts)} tasks",
        shards=parts[0].shards,
        parts=[part.name for part in parts],
        metric=f"mean {' and '.join(titles)}",
        metric_name="mean",
        metric_settings={"weights": "equal", "rounded to": digits, "metrics": sorted({p.metric_name for p in parts})},
        lower_is_better=parts[0].lower_is_better,
        estimate=mean([part.estimate for part in parts], digits),
        published=published,
        subsets={part.name: part.estimate for part in parts},
        length="",
        lengths=(),
        counts=Counts(**counts),
        settings={k: v for k, v in parts[0].settings.items() if all(part.settings.get(k) == v for part in parts)},
        versions=_together([part.versions for part in parts]),
        hardware=parts[0].hardware,
        speed=total([part.speed for part in parts]),
        answered=(),
    )


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What the bootstrap draws: an item, or the items of a group."""

    numbers: np.ndarray  # [K]
    subset: str | None
    audio_seconds: float
    prompt_tokens: int


def _score_item(metric: Metric, record: Answered) -> tuple[Answered, np.ndarray]:
    """The record with its score, or why it has none, and its numbers."""
    if record.left_out is not None:
        return dataclasses.replace(record, score=None), np.empty(0)
    prediction = "" if record.error is not None else record.prediction
    numbers = np.asarray(metric.measure(prediction, record.references, record.facts), np.float64)
    if not numbers.size:
        return dataclasses.replace(record, score=None, left_out="nothing left to compare with"), numbers
    score = float(metric.score(numbers))
    return dataclasses.replace(record, score=score if np.isfinite(score) else None), numbers


def _extra(task: Task, metric: Metric, answered: Sequence[Answered]) -> Extra:
    units = _units([_score_item(metric, record) for record in answered], np.sum)
    scored = estimate(metric, np.array([unit.numbers for unit in units]), f"{task.name}/{metric.name}")
    return Extra(name=metric.name, title=metric.title, lower_is_better=metric.lower_is_better, estimate=scored)


def _units(scored: Sequence[tuple[Answered, np.ndarray]], together: Callable[..., np.ndarray]) -> list[_Unit]:
    members = defaultdict[str, list[tuple[Answered, np.ndarray]]](list)
    for record, numbers in scored:
        if record.left_out is None:
            group = record.facts.get("group")
            members[f"item {record.id}" if group is None else f"group {json.dumps(group)}"].append((record, numbers))
    return [
        _Unit(
            together([numbers for _, numbers in unit], axis=0),
            unit[0][0].facts.get("subset"),
            unit[0][0].audio_seconds,
            unit[0][0].prompt_tokens,
        )
        for unit in members.values()
    ]


def _by_length(
    task: Task, metric: Metric, units: Sequence[_Unit], numbers: np.ndarray
) -> tuple[str, list[LengthClass]]:
    """What length is, and the score by it."""
    audio = any(unit.audio_seconds for unit in units)
    lengths = np.array([unit.audio_seconds if audio else unit.prompt_tokens for unit in units])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _LENGTHS + 1))) if len(units) else np.empty(0)
    which = np.searchsorted(edges[1:-1], lengths, side="right")
    classes = []
    for i in np.unique(which).tolist():
        chosen = which == i
        found = lengths[chosen]
        scored = estimate(metric, numbers[chosen], f"{task.name}/length {i}")
        classes.append(LengthClass(low=float(found.min()), high=float(found.max()), estimate=scored))
    return "seconds of audio" if audio else "tokens of the prompt", classes


def _order(id: str) -> list[tuple[int, int, str]]:
    """Sorts numbers by value: 2.10 after 2.9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in id.split(".")]


def _together(versions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    names = dict.fromkeys(name for found in versions for name in found)
    return {name: ", ".join(sorted({found[name] for found in versions if name in found})) for name in names}
