"""Answers of MMMU's open questions: numbers, or words, among what an answer concludes with."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

_CONCLUSIONS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""With commas, with an exponent, and plain ones."""


def is_right(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer concludes with the number of a reference, or its words are within a conclusion."""
    conclusions = _conclusions(answer)
    numbers = [number for text in conclusions for pattern in _NUMBERS for number in pattern.findall(text)]
    found = {value for text in conclusions + numbers for value in _values(text)}
    expected = {value for reference in references for value in _values(reference)}
    words = [value for value in expected if isinstance(value, str) and value]
    return any(any(word in value for word in words) if isinstance(value, str) else value in expected for value in found)


def _conclusions(answer: str) -> list[str]:
    """The shortest end of each line that follows a word such as "is", in lower case; all of it if there is none."""
    lines = answer.strip().strip(".").lower().split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        marks = (*_CONCLUSIONS, "=") if number == len(lines) else _CONCLUSIONS
        ends = [line.rpartition(mark)[2].strip() for mark in marks if mark in line]
        # As MMMU does it, which starts anew after an empty end.
        shortest = functools.reduce(lambda best, end: end if not best or len(end) < len(best) else best, ends, "")
        if shortest not in ("", *":,.!?;'"):
            found.append(shortest)
    return found or [answer]


def _values(text: str) -> list[str | float]:
    """A number to two decimals, or words in lower case; of a single letter, such as are not part of a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
