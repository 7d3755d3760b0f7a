"""Short answers to questions about pictures: how near to one of the right ones they are."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from phi4mm_jax.evaluation.metrics.metric import Metric, mean, versions

_PUNCTUATION = f"[{re.escape(string.punctuation)}]"
_NOT_OF_NUMBERS = re.compile(rf"(?<!\d)(?!-\d){_PUNCTUATION}|{_PUNCTUATION}(?!\d)")
"""Punctuation but for what is within a number, or its minus."""


def anls() -> Metric:
    """Average normalised Levenshtein similarity: of DocVQA and InfographicVQA."""
    from rapidfuzz.distance import Levenshtein

    def distance(reference: str, prediction: str) -> float:
        edits = Levenshtein.distance(_collapsed(reference), _collapsed(prediction))
        return edits / max(len(reference), len(prediction), 1)  # lengths from before spaces are collapsed

    def grade(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        similarity = 1 - min(distance(reference, prediction) for reference in references)
        return similarity if similarity >= 0.5 else 0.0

    rules = {"normaliser": "lower case, spaces collapsed; below 0.5 is 0", **versions("rapidfuzz")}
    return mean("anls", "ANLS", grade, rules)


def relaxed_accuracy() -> Metric:
    """Numbers may be off by 5 %, and all else must be equal but for case: of ChartQA."""

    def grade(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        return any(_about_equal(reference.strip(), prediction.strip()) for reference in references)

    rules = {"numbers": "as Python reads them, with or without %; no units, no commas", "tolerance": 0.05}
    return mean("relaxed_accuracy", "relaxed accuracy", grade, rules)


def exact(name: str = "exact") -> Metric:
    """Equal to a reference but for case, spaces and punctuation outside of numbers."""

    def grade(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        return plain(prediction) in map(plain, references)

    rules = {"normaliser": "lower case, spaces collapsed, no ASCII punctuation but within numbers"}
    return mean(name, "accuracy", grade, rules)


def contains() -> Metric:
    """A reference is found within the answer, in any case."""

    def grade(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        return any(reference and reference in _collapsed(prediction) for reference in map(_collapsed, references))

    return mean("contains", "accuracy", grade, {"normaliser": "lower case, spaces collapsed"})


def ocrbench() -> Metric:
    """A reference is found within the answer, as OCRBench has it: formulas keep their case, and lose their spaces."""

    def text(text: str) -> str:
        return text.lower().strip().replace("\n", " ")

    def formula(text: str) -> str:
        return text.replace("\n", "").replace(" ", "")

    def grade(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        normalize = formula if "HME100k" in (facts.get("dataset"), facts.get("subset")) else text
        return any(reference and reference in normalize(prediction) for reference in map(normalize, references))

    rules = {"normaliser": "lower case; of HME100k as written, without spaces; full-width characters are not folded"}
    return mean("ocrbench", "accuracy", grade, rules)


def plain(text: str) -> str:
    """A text without what `exact` ignores; one of nothing else is kept."""
    collapsed = _collapsed(text)
    return " ".join(_NOT_OF_NUMBERS.sub("", collapsed).split()) or collapsed


def _collapsed(text: str) -> str:
    return " ".join(text.lower().split())


def _about_equal(reference: str, prediction: str) -> bool:
    expected, found = _number(reference), _number(prediction)
    if expected and found is not None:
        return abs(found - expected) / abs(expected) <= 0.05
    return reference.lower() == prediction.lower()


def _number(text: str) -> float | None:
    """A finite number, in percent or not."""
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
