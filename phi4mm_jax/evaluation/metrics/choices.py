"""Multiple choice: which option an answer means, by the rules of three harnesses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.metrics import open_questions
from phi4mm_jax.evaluation.metrics.answers import plain
from phi4mm_jax.evaluation.metrics.metric import Grade, Metric, fact, mean

Options = Mapping[str, str]
"""Texts by letter."""

_LEADING_LETTER = re.compile(r"\s*([A-Z])\.")
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([A-Z])\b", re.IGNORECASE)
_MARKS_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_MARKS_AT_ENDS = ",.!?;:'"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def letter() -> Metric:
    """The letter that the answer is, or begins with: of AI2D in lmms-eval."""

    def grade(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        leading = _LEADING_LETTER.match(prediction)
        return plain(leading[1] if leading else prediction) in map(plain, references)

    rules = {"extraction": 'a leading "A.", else all of the answer; case and punctuation are ignored'}
    return mean("letter", "accuracy", grade, rules)


def mmbench() -> Metric:
    """The option that VLMEvalKit finds without a judge: of MMBench."""

    def option(prediction: str, facts: Mapping[str, Any]) -> str | None:
        return option_by_letter_or_text(prediction, _options(facts, "mmbench"))

    def grade(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        return option(prediction, facts) in references

    def without(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        return option(prediction, facts) is None

    rules = {"extraction": 'a letter at the end, "answer is A", or the text of an option; else wrong, without a judge'}
    return mean("mmbench", "accuracy", grade, rules, extras=(_without_option(without),))


def mmmu() -> Metric:
    """The option that MMMU's own rules find, or, without options, the number or words; an unclear answer is wrong."""

    def grade(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        options = _options(facts, "mmmu")
        if not options:
            return open_questions.is_right(prediction, references)
        return last_option(prediction, options) in references

    def without(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        options = _options(facts, "mmmu")
        return bool(options) and last_option(prediction, options) is None

    rules = {"extraction": "of MMMU, but for an answer without any option, which is wrong where MMMU draws one"}
    return mean("mmmu", "accuracy", grade, rules, extras=(_without_option(without),))


def option_by_letter_or_text(answer: str, options: Options) -> str | None:
    """The option that an answer means as VLMEvalKit infers it; None for a refusal or if it is unclear."""
    if any(refusal in answer for refusal in _REFUSALS):
        return None
    words = answer.translate(_MARKS_TO_SPACES).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:  # which stands for no option
        return None
    stated = [letter.upper() for letter in _ANSWER_IS.findall(answer) if letter.upper() in options]
    if stated:
        return stated[0]
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    texts = [letter for letter, text in options.items() if text and text.lower() in answer.lower()]
    return texts[0] if len(texts) == 1 else None


def last_option(answer: str, options: Options) -> str | None:
    """The option that an answer names last, in the first of MMMU's ways to name one that it uses at all."""
    answer = f" {answer.strip().strip(_MARKS_AT_ENDS)} "
    for named, last in (("({})", "({})"), ("{} ", " {} "), ("{}.", "{}.")):
        letters = [letter for letter in options if named.format(letter) in answer]
        if letters:
            return max(letters, key=lambda letter: answer.rfind(last.format(letter)))
    if len(answer.split()) <= 5:
        return None
    places = {letter: answer.lower().rfind(text.lower()) for letter, text in options.items() if text}
    found = max(places, key=places.__getitem__, default=None)
    return found if found and places[found] >= 0 else None


def _options(facts: Mapping[str, Any], metric: str) -> Options:
    options = fact(facts, "options", metric)
    if not isinstance(options, Mapping):
        raise EvaluationError(f"{metric}: the item's options must be texts by letter, not {options!r}")
    return {letter: str(text) for letter, text in options.items()}


def _without_option(grade: Grade) -> Metric:
    return mean("without_option", "answers without an option", grade, lower_is_better=True)
