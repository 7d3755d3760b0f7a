"""Tasks of one's own: rows in a JSONL, a CSV or a folder, by what their columns are called."""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable
from pathlib import Path

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.sources import open_source
from phi4mm_jax.evaluation.tasks.choices import by_letter
from phi4mm_jax.evaluation.tasks.recognition import TRANSCRIBE, TRANSCRIPTS
from phi4mm_jax.evaluation.tasks.task import Columns, Row, Task

_IMAGES = ("image", "images")
_AUDIOS = ("audio", "audios", "audio_filepath")
_ANSWERS = ("answers", "answer")
_PROMPTS = ("prompt", "question")
_FACTS = ("options", "transcript", "dataset")
"""Columns that metrics may ask for."""


def custom(
    path: str | Path, metric: str | None = None, prompt: str | None = None, max_tokens: int | None = None
) -> Task:
    """A task whose rows are a file's or folder's; its first row says of which form they are.

    Columns: `image` or `images`, `audio` or `audios`, `prompt` or `question`, `answers` or `answer`; and if there are
    any `id`, `subset`, `metric` (the same in all rows), `options` (a list: a multiple choice) and `transcript`. Or of
    recordings to be transcribed, as manifests of speech recognition are: `audio_filepath` or `audio`, and `text`.

    Args:
      path: of a JSONL or CSV, or of a folder with one or with Parquet; media are relative to it.
      metric: by name; by default what the rows say, and "wer" for recordings to be transcribed.
      prompt: text of the user, with columns in braces; by default the rows' own.
      max_tokens: of an answer.

    Raises:
      EvaluationError: there are no rows, or what they are asked or scored by is not said.
    """
    path = Path(path)
    if max_tokens is not None and max_tokens < 1:
        raise EvaluationError(f"max_tokens = {max_tokens}: expected at least 1")
    source = open_source(path)
    if not len(source):
        raise EvaluationError(f"{path}: holds no rows")
    row = source[0]
    transcribed = _has(row, _AUDIOS) and _has(row, TRANSCRIPTS) and not _has(row, (*_ANSWERS, *_PROMPTS))
    if metric is None:
        metric = row.get("metric") or ("wer" if transcribed else None)
    if metric is None:
        raise EvaluationError(f"{path}: name a metric, or give the rows a column `metric`; {_found(row)}")
    return Task(
        name=path.resolve().stem.lower(),
        title=path.name,
        source=path,
        columns=Columns(
            name=("id", "name", *_AUDIOS[-1:]),
            images=_IMAGES,
            audios=_AUDIOS,
            references=TRANSCRIPTS if transcribed else _ANSWERS,
            subset=("subset",),
            facts=tuple(column for column in _FACTS if column in row),
        ),
        prompt=_prompt(path, row, prompt, transcribed),
        max_tokens=max_tokens or Task.max_tokens,
        metric=metric,
        prepare=functools.partial(_prepared, metric=metric),
    )


def _has(row: Row, columns: Iterable[str]) -> bool:
    return any(row.get(column) is not None for column in columns)


def _found(row: Row) -> str:
    return f"the first row has the columns {', '.join(row)}"


def _prompt(path: Path, row: Row, prompt: str | None, transcribed: bool) -> str:
    if prompt is None:
        asked = next((column for column in _PROMPTS if column in row), None)
        if asked is None and not _has(row, _AUDIOS):
            raise EvaluationError(f"{path}: nothing is asked: no column {' or '.join(_PROMPTS)}; {_found(row)}")
        return f"{{{asked}}}" if asked else TRANSCRIBE if transcribed else ""
    try:
        shown = [column for _, column, _, _ in string.Formatter().parse(prompt) if column is not None]
    except ValueError as error:
        raise EvaluationError(f"prompt {prompt!r}: {error}; a brace that is meant is written twice") from None
    if missing := [column for column in shown if column not in row]:
        raise EvaluationError(f"prompt {prompt!r}: no column {missing[0]!r}; {_found(row)}")
    return prompt


def _prepared(row: Row, metric: str) -> Iterable[Row]:
    """A row whose options, if it has some, are by letter; it needs no media, those that it lacks are null."""
    if row.get("metric") not in (None, metric):
        raise EvaluationError(f"a row asks for the metric {row['metric']!r}, others for {metric!r}: one task has one")
    row = {**dict.fromkeys((*_IMAGES, *_AUDIOS)), **row}
    if options := row.get("options"):
        if not isinstance(options, (list, tuple)):
            raise EvaluationError(f"options of a multiple choice are a list of texts, not {options!r}")
        row["options"] = by_letter(options)
    yield row
