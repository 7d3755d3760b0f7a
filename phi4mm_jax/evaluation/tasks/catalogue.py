"""Tasks and suites by name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.tasks.choices import CHOICES
from phi4mm_jax.evaluation.tasks.custom import custom
from phi4mm_jax.evaluation.tasks.nano import NANO
from phi4mm_jax.evaluation.tasks.pictures import PICTURES
from phi4mm_jax.evaluation.tasks.recognition import (
    COMMON_VOICE_ASR,
    FLEURS_ASR,
    MULTILINGUAL_ASR,
    OPEN_ASR,
    OPEN_ASR_2025,
)
from phi4mm_jax.evaluation.tasks.spoken import AMI_SUMMARIES, VISION_SPEECH
from phi4mm_jax.evaluation.tasks.suite import Suite
from phi4mm_jax.evaluation.tasks.task import Task
from phi4mm_jax.evaluation.tasks.translation import TRANSLATION

CATALOGUE: tuple[Task | Suite, ...] = (
    *(OPEN_ASR, OPEN_ASR_2025, MULTILINGUAL_ASR, FLEURS_ASR, COMMON_VOICE_ASR),
    *TRANSLATION,
    *PICTURES,
    *CHOICES,
    *(VISION_SPEECH, AMI_SUMMARIES, NANO),
)
"""All suites, and the tasks that belong to none, in the order in which they are listed."""

_BY_NAME = {entry.name: entry for entry in CATALOGUE} | {
    task.name: task for entry in CATALOGUE if isinstance(entry, Suite) for task in entry.tasks
}


def named(name: str) -> Task | Suite | None:
    """The task or suite of a name; None if there is none."""
    return _BY_NAME.get(name)


def find(name: str, **own: Any) -> Task | Suite:
    """What is meant by a name.

    Args:
      name: of a task ("docvqa"), a suite ("open-asr"), or a part of one ("open-asr/ami"); or the path of a JSONL, a CSV
        or a folder with rows of one's own.
      **own: arguments of `custom`, for one's own.

    Raises:
      EvaluationError: there is nothing of such a name; the message has the nearest ones.
    """
    if known := named(name):
        if given := [key for key, value in own.items() if value is not None]:
            raise EvaluationError(f"{name}: has its own {' and '.join(given)}; to be given for a file or folder alone")
        return known
    if Path(name).exists():
        return custom(name, **own)
    if Path(name).suffix in (".jsonl", ".csv"):
        raise EvaluationError(f"{name}: no such file")
    near = difflib.get_close_matches(name.lower(), _BY_NAME, n=3, cutoff=0.5) or [entry.name for entry in CATALOGUE]
    raise EvaluationError(f"no task {name!r}, nor a file or folder; did you mean {', '.join(near)}?")
