"""Spoken questions about pictures, and summaries of recordings; their rows are given with --data."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterable

from phi4mm_jax.evaluation.tasks.choices import by_letter
from phi4mm_jax.evaluation.tasks.suite import Suite
from phi4mm_jax.evaluation.tasks.task import REPORT, Columns, HubDataset, Published, Row, Task

_CARD = "model card, second-hand"


def spoken_choice(row: Row) -> Iterable[Row]:
    """The right one of options that are asked aloud, by its letter, whether it is given so or by its number."""
    answer = str(row["answer"])
    yield {
        **row,
        "options": by_letter(row.get("options") or ()),
        "answer": string.ascii_uppercase[int(answer)] if answer.isdecimal() else answer,
    }


def _spoken(part: str, title: str, metric: str, max_tokens: int, score: float) -> Task:
    return Task(
        name=f"s-vision-speech/{part}",
        title=title,
        source=HubDataset(repo=None, config=part),
        columns=Columns(images=("image", "images"), audios=("audio", "audios")),
        prompt="",
        max_tokens=max_tokens,
        metric=metric,
        published=Published(score=score, source=_CARD),
        note="Columns: `image`, `audio` (the question) and `answers`.",
    )


_S_AI2D = _spoken("ai2d", "s_AI2D", "letter", 16, 68.9)

VISION_SPEECH = Suite(
    name="s-vision-speech",
    title="Spoken questions about pictures",
    tasks=(
        dataclasses.replace(
            _S_AI2D,
            columns=dataclasses.replace(_S_AI2D.columns, references=("answer",), facts=("options",)),
            prepare=spoken_choice,
            note="Columns: `image`, `audio` (question and options), `answer` (a letter, or a number from 0).",
        ),
        _spoken("chartqa", "s_ChartQA", "relaxed_accuracy", 16, 69.0),
        _spoken("docvqa", "s_DocVQA", "anls", 32, 87.3),
        _spoken("infovqa", "s_InfoVQA", "anls", 32, 63.7),
    ),
    published=Published(score=72.2, source=_CARD),
    note="The sets of InternOmni: the questions of AI2D, ChartQA, DocVQA and InfographicVQA, asked aloud by a machine. "
    "Other voices give other scores.",
)
"""The vision-speech benchmark of the model card."""

AMI_SUMMARIES = Task(
    name="ami-summaries",
    title="AMI meetings, summaries",
    source=HubDataset(repo=None, config="ami-summaries"),
    columns=Columns(audios=("audio",), references=("summary", "summaries", "answers")),
    prompt="Summarize the audio.",
    max_tokens=512,
    metric="rouge_l",
    note="Not the published metric: GPT-4 judged the summaries there, 6.29 of 7 "
    f"({REPORT}). Columns: `audio` and `summary`.",
)
