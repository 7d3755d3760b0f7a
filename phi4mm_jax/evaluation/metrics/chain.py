"""A transcript, `<sep>`, a translation: the answer of a model that is asked for both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from phi4mm_jax.evaluation.metrics.metric import Metric, mean

SEPARATOR = "<sep>"


def chain(name: str, translation: Metric, transcript: Metric) -> Metric:
    """What follows the last separator by one metric; beside it, what precedes it by another.

    An answer without a separator is a translation whose transcript is empty. The transcript's reference is the item's
    fact `transcript`; an item without it does not count there.
    """

    def of_translation(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> Sequence[float]:
        return translation.measure(prediction.rpartition(SEPARATOR)[2].strip(), references, facts)

    def of_transcript(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> Sequence[float]:
        references = [facts["transcript"]] if facts.get("transcript") is not None else []
        return transcript.measure(prediction.rpartition(SEPARATOR)[0].strip(), references, facts)

    def without(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        return SEPARATOR not in prediction

    return dataclasses.replace(
        translation,
        name=name,
        measure=of_translation,
        settings=translation.settings | {"scored": f"what follows the last {SEPARATOR}, or all if there is none"},
        extras=(
            dataclasses.replace(
                transcript, name="transcript", title=f"{transcript.title} of the transcript", measure=of_transcript
            ),
            mean("without_sep", f"answers without {SEPARATOR}", without, lower_is_better=True),
        ),
    )
