"""The VQA score: how many of ten people gave the same answer, once what does not matter is taken away."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.metrics.metric import Metric, mean

_DIGITS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_FULL_STOP = re.compile(r"\.(?!\d)")

_CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it somebody someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}
"""Words by ending, of which the rules know the contraction."""


def _but_one_apostrophe() -> dict[str, str]:
    """Contractions that lack one apostrophe, to what they should be."""
    words = [stem + ending for ending, stems in _CONTRACTED.items() for stem in stems.split()]
    return {word[:i] + word[i + 1 :]: word for word in words for i, letter in enumerate(word) if letter == "'"}


_CONTRACTIONS = _but_one_apostrophe()


def normalize(answer: str) -> str:
    """An answer by the rules of the VQA challenge, as TextVQA's evaluation applies them.

    Lower case; no commas, question marks, articles, and full stops but before digits; punctuation of which one stands
    next to a space is removed, and other punctuation becomes spaces; small numbers as digits; apostrophes put back.
    """
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    spaced = {mark: "" if f"{mark} " in answer or f" {mark}" in answer else " " for mark in _PUNCTUATION}
    words = _FULL_STOP.sub("", answer.translate(str.maketrans(spaced))).split()
    words = [_DIGITS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def vqa() -> Metric:
    """A third for each person who agrees, at most one, averaged over leaving out each person in turn."""

    def grade(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        people = len(references)
        if people < 2:
            raise EvaluationError("vqa: needs the answers of several people, one reference each; got one")
        agreeing = list(map(normalize, references)).count(normalize(prediction))
        # Left out is one of those who agree, or one of the others.
        grades = min(1, (agreeing - 1) / 3), min(1, agreeing / 3)
        return (agreeing * grades[0] + (people - agreeing) * grades[1]) / people

    return mean("vqa", "VQA score", grade, {"normaliser": "of the VQA challenge, as in TextVQA's evaluation"})
