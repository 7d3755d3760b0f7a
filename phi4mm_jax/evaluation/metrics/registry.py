"""Metrics by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.metrics import answers, chain, choices, error_rates, overlap, vqa
from phi4mm_jax.evaluation.metrics.metric import Metric, nearest_first

_METRICS: Mapping[str, Callable[[], Metric]] = {
    "accuracy": functools.partial(answers.exact, "accuracy"),
    "anls": answers.anls,
    "contains": answers.contains,
    "exact": answers.exact,
    "letter": choices.letter,
    "mmbench": choices.mmbench,
    "mmmu": choices.mmmu,
    "ocrbench": answers.ocrbench,
    "relaxed_accuracy": answers.relaxed_accuracy,
    "rouge_l": overlap.rouge_l,
    "vqa": vqa.vqa,
}
_FAMILIES: Mapping[str, Callable[..., Metric]] = {"bleu": overlap.bleu, "cer": error_rates.cer, "wer": error_rates.wer}
"""What comes after a colon is a language or a tokenizer."""

NAMES = (
    *_METRICS,
    *("bleu", *(f"bleu:{tokenizer}" for tokenizer in overlap.TOKENIZERS if tokenizer != "13a")),
    *("cer", "cer:ja", "cer:zh"),
    *("wer", "wer:de", "wer:es", "wer:fr", "wer:it", "wer:pt"),
    *("sep+bleu", "sep+bleu:ja", "sep+bleu:zh"),
)
"""Names of metrics; "wer" takes more languages, and "sep+" any metrics: "wer:de+sep+bleu"."""


@functools.cache
def metric(name: str) -> Metric:
    """The metric of a name.

    Of "wer:de+sep+bleu" the part after `<sep>` is scored by "bleu", and the part before it, beside that, by "wer:de";
    "sep+bleu" is "wer+sep+bleu".

    Raises:
      EvaluationError: there is none of this name, or what it needs is not installed.
    """
    before, sep, after = name.rpartition("sep+")
    if sep:
        return chain.chain(name, translation=metric(after), transcript=metric(before.removesuffix("+") or "wer"))
    family, _, parameter = name.partition(":")
    try:
        if name in _METRICS:
            return _METRICS[name]()
        if family in _FAMILIES and not name.endswith(":"):
            return _FAMILIES[family](*filter(None, [parameter]))
    except ModuleNotFoundError as error:
        raise EvaluationError(f"{name}: {error.name} is missing; pip install 'phi4mm-jax[eval]'") from None
    raise EvaluationError(f"no metric {name!r}; there are {nearest_first(name, NAMES)}")
