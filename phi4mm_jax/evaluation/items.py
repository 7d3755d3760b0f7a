"""What flows through an evaluation: a row of a dataset, the items made of it, and what was answered to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from phi4mm_jax.processing.audio import AudioSource
from phi4mm_jax.processing.images import ImageSource

Row = Mapping[str, Any]
"""A row of a dataset by column; media as the dataset holds them: bytes, a path, or `{"bytes": ..., "path": ...}`."""


class EvaluationError(ValueError):
    """A task, dataset, metric or result cannot be used; the message names it and says what is accepted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question. It is asked as one user message: pictures, then recordings, then the text, with nothing between."""

    id: str
    """Unique within its task, and the same in every run: the row's number, and the variant's after a dot."""
    name: str
    """What the dataset calls it."""
    prompt: str = ""
    """Text of the user."""
    images: tuple[ImageSource, ...] = ()
    """Pictures, in order."""
    audios: tuple[AudioSource, ...] = ()
    """Recordings, in order."""
    references: tuple[str, ...] = ()
    """Right answers."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """JSON values that the metric or the breakdown needs: `subset`, of which results are also shown alone; `group`,
    whose items are right only together; `options`, the texts of a multiple choice by letter; and others by metric."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """What became of an item: a line of the results."""

    id: str
    """Of the item, as are the next four."""
    name: str
    prompt: str
    references: tuple[str, ...]
    facts: Mapping[str, Any]
    prediction: str = ""
    """The model's answer; empty if there was an error."""
    score: float | None = None
    """The item's own, as its metric gives it (percent); None if it is left out of the score."""
    error: str | None = None
    """Why it could not be asked; it counts as an empty answer."""
    left_out: str | None = None
    """Why it does not count at all: the dataset's own rules say so."""
    finish_reason: str | None = None
    """"stop" or "length"."""
    prompt_tokens: int = 0
    """Media included."""
    completion_tokens: int = 0
    """The stop token included."""
    audio_seconds: float = 0.0
    """Of its recordings together."""
    images: int = 0
    """How many pictures it has."""
    seconds: float = 0.0
    """From its submission to its last token; items beside it share this time."""
    session: str = ""
    """Which run of the program answered it."""
    elapsed: float = 0.0
    """Seconds of that session, on the clock that speed is measured by, when it was done."""
