"""The report: one HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import numpy as np

from phi4mm_jax.evaluation import tables
from phi4mm_jax.evaluation.differences import Span, differences
from phi4mm_jax.evaluation.items import Answered, Item
from phi4mm_jax.evaluation.previews import Preview, Previews
from phi4mm_jax.evaluation.results import Results, replace_text
from phi4mm_jax.evaluation.speed import CLOCK
from phi4mm_jax.evaluation.statistics import CONFIDENCE

MediaOf = Callable[[str, str], Item | None]
"""(name of the task, id) to the item with its media, or None if they cannot be had any more."""

_MEDIA_BYTES = 14_000_000
"""Of all media together."""
_WORST = 20
"""Answers shown of a task, if there are few tasks."""
_MAX_CASES = 200
"""Answers shown of all tasks."""
_ROWS = 50
"""Subsets and failed items shown of a task."""
_REFERENCES = 5
"""Right answers shown of an item."""
_CHARACTERS = 1200
"""Of each text."""
_TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
    """A bad answer."""

    record: Answered
    media: Sequence[Preview]
    spans: Sequence[Span]
    """Where a transcript differs from the reference; empty for other tasks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Section:
    """What the template shows of a task beyond its results."""

    results: Results
    top: float
    """Where the axes of scores end."""
    histogram: Sequence[tuple[str, int]]
    """Scores and how many items have them."""
    imperfect: int
    """How many items are not entirely right."""
    cases: Sequence[_Case]
    failed: Sequence[Answered]


def write_report(path: Path, results: Sequence[Results], media_of: MediaOf, title: str) -> None:
    """Writes the page, of at most 20 MB.

    Args:
      path: of the file.
      results: of tasks and suites; a suite is shown before its tasks.
      media_of: where the pictures and recordings of the worst answers come from.
      title: what was evaluated.
    """
    results = _suites_first(results)
    ends = [abs(end) for result in results for end in _shift(result) or ()]
    template = _environment().get_template("report.html")
    page = template.render(
        title=title,
        titles={result.name: result.title for result in results},
        parts={name for result in results for name in result.parts},
        results=results,
        sections=[_section(result, media_of, len(results)) for result in results],
        span=(max(ends) or 1.0) if ends else None,
    )
    replace_text(path, page)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,  # answers and datasets are strangers' text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": tables.number,
        "interval": tables.interval,
        "directed": tables.directed,
        "dataset": tables.dataset,
        "hardware": tables.hardware,
        "pairs": tables.pairs,
        "shift": _shift,
        "verdict": _verdict,
        "cut": _cut,
    }
    environment.globals |= {"confidence": CONFIDENCE, "max_rows": _ROWS, "max_references": _REFERENCES, "clock": CLOCK}
    return environment


def _suites_first(results: Sequence[Results]) -> list[Results]:
    named = {result.name: result for result in results}
    parts = {name for result in results for name in result.parts}
    heads = [result for result in results if result.name not in parts]
    order = dict.fromkeys(name for head in heads for name in (head.name, *head.parts))
    return [named[name] for name in order if name in named]


def _section(results: Results, media_of: MediaOf, sections: int) -> _Section:
    bad = _from_worst(results)
    previews = Previews(_MEDIA_BYTES // sections)
    estimates = [results.estimate, *results.subsets.values(), *(c.estimate for c in results.lengths)]
    ends = [e.high for e in estimates if e.high is not None]
    return _Section(
        results=results,
        top=_round_up(max(ends + ([results.published.score] if results.published else []), default=1.0)),
        histogram=_histogram([r.score for r in results.answered if r.score is not None]),
        imperfect=len(bad),
        cases=[
            _case(results, record, media_of, previews) for record in bad[: min(_WORST, max(1, _MAX_CASES // sections))]
        ],
        failed=[record for record in results.answered if record.error is not None],
    )


def _from_worst(results: Results) -> list[Answered]:
    """The answers that are not entirely right; equally bad ones in a mixed order, so that they are of all subsets."""
    sign, perfect = (-1, 0) if results.lower_is_better else (1, 100)
    scored = [r for r in results.answered if r.score is not None and r.error is None]
    bad = [record for record in scored if not math.isclose(record.score, perfect, abs_tol=1e-6)]
    return sorted(bad, key=lambda record: (sign * record.score, zlib.crc32(record.id.encode())))


def _case(results: Results, record: Answered, media_of: MediaOf, previews: Previews) -> _Case:
    spans: Sequence[Span] = ()
    kind = results.metric_name.partition(":")[0]
    if kind in ("wer", "cer") and record.references:
        spans = differences(_cut(record.references[0]), _cut(record.prediction), by_characters=kind == "cer")
    try:
        item = media_of(results.name, record.id)
    except Exception as error:  # whatever has become of the rows: the answers are worth showing without
        media = [Preview(kind="image", note=f"no media: {str(error) or repr(error)}")]
    else:
        media = previews.of(item) if item else []
    return _Case(record=record, media=media, spans=spans)


def _histogram(scores: Sequence[float]) -> list[tuple[str, int]]:
    """How many items have a score of 0, of less than 10, 20, ..., 100, of 100, and of more if there are any."""
    labels = ["0", *(f"<{edge}" for edge in range(10, 101, 10)), "100", ">100"]
    edges = [1e-6, *range(10, 100, 10), 100 - 1e-6, 100 + 1e-6]
    counts = np.bincount(np.digitize(scores, edges), minlength=len(labels)).tolist()
    return list(zip(labels, counts, strict=True))[: None if counts[-1] else -1]


def _round_up(value: float) -> float:
    """To 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(value)) if value > 0 else 1
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


def _shift(results: Results) -> tuple[float, float] | None:
    """The confidence interval of the difference from the published score."""
    if results.published is None or results.estimate.low is None:
        return None
    return results.estimate.low - results.published.score, results.estimate.high - results.published.score


def _verdict(results: Results) -> str:
    """Whether the published score is "within" the confidence interval, or the score "better" or "worse"."""
    shift = _shift(results)
    if shift is None:
        return ""
    if shift[0] <= 0 <= shift[1]:
        return "within"
    return "better" if (shift[1] < 0) == results.lower_is_better else "worse"


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}…"
