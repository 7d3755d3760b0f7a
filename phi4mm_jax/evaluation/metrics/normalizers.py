"""Text before it is compared: what counts as the same words, or the same characters."""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections.abc import Callable

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.metrics.metric import nearest_first

Normalizer = Callable[[str], str]
"""A text to the words, between single spaces, or to the characters that are compared."""

_TOO_LONG = re.compile(r"\d{4000}")
"""Python does not read an integer of more than 4300 digits, and the English normaliser fails on one."""


def english() -> Normalizer:
    """Whisper's rules for English: contractions, titles, numbers and spellings are made one."""
    from whisper_normalizer.english import EnglishTextNormalizer

    normalize = EnglishTextNormalizer()
    return lambda text: normalize(_TOO_LONG.sub(r"\g<0> ", text)).strip()


def multilingual(language: str) -> Normalizer:
    """The Open ASR leaderboard's rules for other languages: diacritics stay, numbers are written out.

    Args:
      language: code that num2words knows, such as "de".

    Raises:
      EvaluationError: it does not know the language.
    """
    import num2words
    from whisper_normalizer.basic import BasicTextNormalizer

    languages = num2words.CONVERTER_CLASSES.keys() - {"am"}  # which does not return from some large numbers
    if language not in languages:
        known = nearest_first(language, sorted(languages))
        raise EvaluationError(f"wer:{language}: numbers cannot be written out in this language; there are {known}")
    basic = BasicTextNormalizer(remove_diacritics=False)

    @functools.lru_cache(maxsize=10_000)
    def in_words(digits: str) -> str:
        try:
            return num2words.num2words(int(digits), lang=language)
        except Exception:  # too large a number: every language raises another kind
            return digits

    def normalize(text: str) -> str:
        text = re.sub(r"[^\w\s]", "", basic(text))  # invisible characters, which are neither symbols nor spaces
        text = re.sub(r"(\d)\s+(\d{3})\b", r"\1\2", " ".join(text.split()))  # 10 000, and 10.000
        return re.sub(r"\d+", lambda digits: in_words(digits[0]), text)

    return normalize


def join_compounds(reference: str, prediction: str) -> tuple[str, str]:
    """Joins words where two texts differ in nothing but the spaces: "haus tür" and "haustür"."""
    of_reference, of_prediction = reference.split(), prediction.split()
    matcher = difflib.SequenceMatcher(None, of_reference, of_prediction)
    joined: tuple[list[str], list[str]] = ([], [])
    for tag, start, stop, other_start, other_stop in matcher.get_opcodes():
        parts = of_reference[start:stop], of_prediction[other_start:other_stop]
        same_letters = tag != "equal" and "".join(parts[0]) == "".join(parts[1])
        for words, part in zip(joined, parts, strict=True):
            words += ["".join(part)] if same_letters else part
    return " ".join(joined[0]), " ".join(joined[1])


def characters(text: str) -> str:
    """The characters that are read aloud: no spaces, no punctuation, in their compatibility composition (NFKC)."""
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] not in "PZC")
