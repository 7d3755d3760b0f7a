"""Small sets of every kind for phi4mm-nano, as `python -m tools.nano.evaluation_sets` writes them for --data."""

from __future__ import annotations

from phi4mm_jax.evaluation.tasks.choices import CHOOSE, chosen_by_number
from phi4mm_jax.evaluation.tasks.recognition import TRANSCRIBE
from phi4mm_jax.evaluation.tasks.suite import Suite
from phi4mm_jax.evaluation.tasks.task import Columns, HubDataset, Task
from phi4mm_jax.evaluation.tasks.translation import CHAIN, with_transcript


def _nano(part: str, title: str, metric: str, columns: Columns, prompt: str = "{question}", **fields: object) -> Task:
    return Task(
        name=f"nano/{part}",
        title=title,
        source=HubDataset(repo=None, config=part),
        columns=columns,
        prompt=prompt,
        max_tokens=48,
        metric=metric,
        **fields,
    )


NANO = Suite(
    name="nano",
    title="phi4mm-nano, everything that it learned",
    averaged=False,
    tasks=(
        _nano("text", "Sums, comparisons, words", "exact", Columns(subset=("kind",))),
        _nano(
            "asr", "Sentences", "wer", Columns(audios=("audio",), references=("text",), subset=("voices",)), TRANSCRIBE
        ),
        _nano(
            "translation",
            "Sentences, through the transcript",
            "sep+bleu",
            Columns(audios=("audio",), references=("translation",), facts=("transcript",)),
            CHAIN.format(language="English"),
            prepare=with_transcript,
            note="The form of the task alone: phi4mm-nano learned no translation.",
        ),
        _nano("reading", "Words in pictures", "anls", Columns(images=("image",), subset=("kind",))),
        _nano(
            "ocr",
            "Words in pictures, found in the answer",
            "ocrbench",
            Columns(images=("image",), references=("answer",), subset=("question_type",), facts=("dataset",)),
        ),
        _nano(
            "choice",
            "Colours, with options",
            "mmbench",
            Columns(images=("image",), references=("answer",), facts=("options",)),
            CHOOSE,
            prepare=chosen_by_number,
            note="phi4mm-nano learned no letters of options; what counts is that it names the right one.",
        ),
        _nano("figures", "Figures", "exact", Columns(images=("image",))),
        _nano("pairs", "Two pictures", "exact", Columns(images=("images",))),
        _nano(
            "spoken",
            "Spoken questions about pictures",
            "exact",
            Columns(images=("image",), audios=("audio",), subset=("voices",)),
            "",
        ),
    ),
)
"""What the bundled model is measured by."""
