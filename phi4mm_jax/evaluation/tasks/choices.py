"""Questions about pictures with options to choose from: AI2D, MMBench, MMMU."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterable, Mapping
from typing import Any

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.tasks.task import REPORT, Columns, HubDataset, Published, Row, Task

_LETTER = "Answer with the option's letter from the given choices directly."
CHOOSE = "{question}\n{lines}\n" + _LETTER
"""A question whose options stand in `lines`."""

_ROTATIONS = 1_000_000
"""Rows of MMBench from this index on repeat others with their options rotated."""


def by_letter(options: Iterable[Any]) -> dict[str, str]:
    """Options under the letters that prompts give them.

    Raises:
      EvaluationError: there are more than letters.
    """
    texts = list(map(str, options))
    if len(texts) > len(string.ascii_uppercase):
        raise EvaluationError(
            f"a multiple choice of {len(texts)} options; at most {len(string.ascii_uppercase)} can be asked"
        )
    return dict(zip(string.ascii_uppercase, texts, strict=False))


def lines_of(options: Mapping[str, str]) -> str:
    """Options as prompts show them: a line each, "A. ..."."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def chosen_by_number(row: Row) -> Iterable[Row]:
    """Of options in a list and the number of the right one, the lines and its letter, as in AI2D."""
    options = by_letter(row["options"])
    yield {
        **row,
        "options": options,
        "lines": lines_of(options),
        "answer": string.ascii_uppercase[int(row["answer"])],
    }


def rotated(row: Row) -> Iterable[Row]:
    """A question of MMBench with its options in every rotation: it counts if all of them are answered right.

    The dataset has the rotations too, behind all questions. Made here instead, those of a question stay together, and
    the first rows of the dataset are whole questions.
    """
    index = int(row["index"])
    if index >= _ROTATIONS:
        return
    letters = [letter for letter in "ABCD" if _is_given(row[letter])]
    texts = [row[letter] for letter in letters]
    right = letters.index(row["answer"])
    hint = f"Hint: {row['hint']}\n" if _is_given(row["hint"]) else ""
    for shift in range(len(texts)):
        options = by_letter(texts[shift:] + texts[:shift])
        lines = lines_of(options)
        yield {
            **row,
            "prompt": f"{hint}Question: {row['question']}\nOptions:\n{lines}\n"
            "Please select the correct answer from the options above. \n",
            "options": options,
            "answer": string.ascii_uppercase[(right - shift) % len(texts)],
            "group": index,
        }


def _is_given(text: str | None) -> bool:
    return text is not None and str(text) not in ("", "nan")


def exam_question(row: Row) -> Iterable[Row]:
    """A question of MMMU: with options or open, and the pictures that its text names.

    The tags stay in the text as they are ("<image 1>"): pictures come before the text, so its k-th picture is what the
    tag with the k-th number means.
    """
    options = by_letter(_options(row["options"])) if row["question_type"] == "multiple-choice" else {}
    question = "\n".join([row["question"], *([lines_of(options)] if options else [])])
    named = sorted(set(re.findall(r"<image (\d)>", question)))
    yield {
        **row,
        "prompt": f"{question}\n\n{_LETTER if options else 'Answer the question using a single word or phrase.'}",
        "pictures": [row[f"image_{number}"] for number in named],
        "options": options,
        "answer": row["answer"] if options else _listed(row["answer"]) or row["answer"],
        "subject": re.sub(r"^[^_]+_(.+)_\d+$", r"\1", row["id"]),
    }


def _options(text: str) -> list[str]:
    options = _listed(text)
    if not options:
        raise EvaluationError(f"options of a multiple choice are a list in Python's notation, not {text!r}")
    return options


def _listed(text: str) -> list[str] | None:
    """A list that is written as Python writes it; None if the text is anything else."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return [str(part) for part in value] if isinstance(value, list) else None


AI2D = Task(
    name="ai2d",
    title="AI2D",
    source=HubDataset(repo="lmms-lab/ai2d"),
    columns=Columns(images=("image",), references=("answer",), facts=("options",)),
    prompt=CHOOSE,
    max_tokens=16,
    metric="letter",
    prepare=chosen_by_number,
    published=Published(score=82.3, source=REPORT),
)
MMBENCH = Task(
    name="mmbench",
    title="MMBench, English, circular",
    source=HubDataset(repo="lmms-lab/MMBench", config="en", split="dev"),
    columns=Columns(
        name=("index",), images=("image",), references=("answer",), subset=("L2-category",), facts=("options",)
    ),
    prompt="{prompt}",
    max_tokens=1024,
    metric="mmbench",
    prepare=rotated,
    published=Published(score=86.7, source=REPORT),
    note="A question counts if it is answered right in all rotations of its options. An answer in which no option is "
    "found counts as wrong; others ask GPT what it means.",
)
MMMU = Task(
    name="mmmu",
    title="MMMU",
    source=HubDataset(repo="lmms-lab/MMMU", split="validation"),
    columns=Columns(images=("pictures",), references=("answer",), subset=("subject",), facts=("options",)),
    prompt="{prompt}",
    metric="mmmu",
    prepare=exam_question,
    published=Published(score=55.1, source=REPORT),
)

CHOICES = (AI2D, MMBENCH, MMMU)
"""All of them."""
