"""Word and character error rate: edits over the length of the reference, summed over the corpus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.metrics import normalizers
from phi4mm_jax.evaluation.metrics.metric import Measure, Metric, nearest_first, percent, versions

UNSCORED = "ignore time segment in scoring"
"""What references of the Open ASR sets say, once normalised, where nothing is to be scored."""

Align = Callable[[str, str], tuple[int, int]]
"""(reference, prediction), both normalised, to errors and length of the reference."""


def wer(language: str = "en") -> Metric:
    """Word error rate.

    Args:
      language: whose rules for numbers and spelling hold.
    """
    import jiwer

    def of_words(reference: str, prediction: str) -> tuple[int, int]:
        return _counts(jiwer.process_words(reference, prediction))

    def of_joined_words(reference: str, prediction: str) -> tuple[int, int]:
        return of_words(*normalizers.join_compounds(reference, prediction))

    if language == "en":
        name, normalize, align = "wer", normalizers.english(), of_words
        rules = {
            "normaliser": "EnglishTextNormalizer of whisper-normalizer, near to the Open ASR leaderboard's own",
            "compounds": "two spellings of a compound differ, as on the Open ASR leaderboard before June 2026",
            **versions("jiwer", "whisper-normalizer"),
        }
    else:
        name, normalize, align = f"wer:{language}", normalizers.multilingual(language), of_joined_words
        rules = {
            "normaliser": f"as the Open ASR leaderboard for {language}: diacritics kept, numbers written out",
            "compounds": "words are joined where the letters agree",
            **versions("jiwer", "num2words", "whisper-normalizer"),
        }
    return Metric(
        name=name,
        title="word error rate",
        lower_is_better=True,
        measure=_best(normalize, align),
        score=percent,
        settings=rules | {"left out": f'references that normalise to nothing or to "{UNSCORED}"'},
    )


def cer(language: str = "") -> Metric:
    """Character error rate.

    Args:
      language: "zh" or "ja", of which spaces and punctuation do not count; of any other text all does.
    """
    import jiwer

    if language not in ("", "zh", "ja"):
        raise EvaluationError(f"cer:{language}: there are cer, {nearest_first(language, ('cer:zh', 'cer:ja'))}")
    rule = "NFKC, without spaces and punctuation, case kept" if language else "runs of spaces count as one"
    return Metric(
        name=f"cer:{language}" if language else "cer",
        title="character error rate",
        lower_is_better=True,
        measure=_best(
            normalizers.characters if language else lambda text: " ".join(text.split()),
            lambda reference, prediction: _counts(jiwer.process_characters(reference, prediction)),
        ),
        score=percent,
        settings={"normaliser": rule, "left out": "references that normalise to nothing", **versions("jiwer")},
    )


def _counts(output: Any) -> tuple[int, int]:
    """Errors, and length of the reference, of an alignment by jiwer."""
    errors = output.substitutions + output.deletions + output.insertions
    return errors, output.hits + output.substitutions + output.deletions


def _best(normalize: normalizers.Normalizer, align: Align) -> Measure:
    """Errors and length against the reference of the least error rate; nothing if none is to be scored."""

    def measure(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> Sequence[float]:
        scored = [reference for reference in map(normalize, references) if reference not in ("", UNSCORED)]
        normalized = normalize(prediction)
        counts = [align(reference, normalized) for reference in scored]
        return min(counts, key=lambda count: count[0] / count[1], default=())

    return measure
