"""What an answer shares with its references: n-grams (BLEU), and a common subsequence (ROUGE-L)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.metrics.metric import Metric, mean, nearest_first, versions

TOKENIZERS = ("13a", "zh", "ja", "ja-mecab", "ko-mecab", "char", "intl", "none")
"""Of sacrebleu, those that download nothing; "ja" is the best of what is installed."""


def bleu(tokenizer: str = "13a") -> Metric:
    """BLEU over the corpus, as sacrebleu computes it.

    Args:
      tokenizer: by sacrebleu's name; "ja" is "ja-mecab" if that is installed and "char" if not.

    Raises:
      EvaluationError: there is no such tokenizer, or it is not installed.
    """
    from sacrebleu.metrics import BLEU

    name = "bleu" if tokenizer == "13a" else f"bleu:{tokenizer}"
    if tokenizer not in TOKENIZERS:
        known = nearest_first(tokenizer, [f"bleu:{other}" for other in TOKENIZERS])
        raise EvaluationError(f"{name}: no such tokenizer; there are {known}")
    try:
        sacrebleu = BLEU(tokenize="ja-mecab" if tokenizer == "ja" else tokenizer)
    except RuntimeError:  # without MeCab
        if tokenizer != "ja":
            extra = tokenizer.removesuffix("-mecab")
            raise EvaluationError(f"{name}: needs pip install 'sacrebleu[{extra}]'; bleu:char does not") from None
        sacrebleu = BLEU(tokenize="char")

    def measure(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> Sequence[float]:
        if not references:
            return ()
        found = sacrebleu.corpus_score([prediction], [[reference] for reference in references])
        return (*found.counts, *found.totals, found.sys_len, found.ref_len)

    sacrebleu.corpus_score([""], [[""]])  # without which there is no signature
    signature = sacrebleu.get_signature().format().partition("|")[2]  # what is before says how many references
    return Metric(name=name, title="BLEU", measure=measure, score=_bleu, settings={"signature": signature})


def _bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU of summed n-gram matches and totals of four orders, and lengths of answers and references."""
    matches, totals, length, reference_length = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    # An order without a match counts as half a match, the next such as a quarter: smoothing "exp".
    unmatched = matches == 0
    smoothed = np.where(unmatched, 0.5 ** np.cumsum(unmatched, axis=-1), matches)
    scored = matches.any(axis=-1) & totals.all(axis=-1)
    precisions = smoothed / np.where(scored[..., None], totals, 1)
    shorter = np.minimum(0.0, 1 - reference_length / np.where(scored, length, 1))
    return np.where(scored, 100 * np.exp(np.log(precisions).mean(axis=-1) + shorter), 0.0)


def rouge_l() -> Metric:
    """F-measure of the longest common subsequence of words, against the reference it is best for."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])

    def grade(prediction: str, references: Sequence[str], facts: Mapping[str, Any]) -> float:
        return scorer.score_multi(references, prediction)["rougeL"].fmeasure

    rules = {"words": "runs of a-z and 0-9 in lower case, not stemmed", **versions("rouge-score")}
    return mean("rouge_l", "ROUGE-L", grade, rules)
