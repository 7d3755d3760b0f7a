"""What all metrics have in common: their names, what they need, and how their numbers add up."""

import json
import subprocess
import sys

import numpy as np
import pytest

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.metrics import registry
from phi4mm_jax.evaluation.metrics.metric import percent
from phi4mm_jax.evaluation.metrics.registry import NAMES, metric

FACTS = {"options": {"A": "red", "B": "green"}, "transcript": "a red bird"}
AVAILABLE = [name for name in NAMES if "mecab" not in name]


@pytest.mark.parametrize("name", AVAILABLE)
def test_every_metric(name):
    found = metric(name)
    assert found.name == name and found is metric(name)
    assert json.loads(json.dumps(found.settings)) == found.settings != {}
    for part in (found, *found.extras):
        wrong, right = (part.measure(answer, ["A", "A"], FACTS) for answer in ("Birds, nothing but birds", "A"))
        none = part.measure("", ["A", "A"], FACTS)
        assert len(wrong) == len(right) == len(none) > 0
        sums = np.array([[right, none], [wrong, wrong]], np.float64)
        scores = part.score(sums)
        assert scores.shape == (2, 2)
        for place in np.ndindex(2, 2):
            assert part.score(sums[place]) == scores[place]
    assert found.measure("A", [], {**FACTS, "transcript": None}) == ()


@pytest.mark.parametrize("name", [name for name in AVAILABLE if "bleu" not in name and name != "rouge_l"])
def test_the_right_answer_beats_a_wrong_one(name):
    found = metric(name)
    right, wrong = (found.score(np.array(found.measure(answer, ["B", "B"], FACTS), np.float64)) for answer in "BA")
    if found.lower_is_better:
        assert right == 0 and wrong == 100
    else:
        assert wrong == 0 and right > 0


def test_nothing_has_no_score():
    assert percent(np.array([[0.0, 0.0], [1.0, 4.0]])).tolist() == pytest.approx([np.nan, 25.0], nan_ok=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wre", "no metric 'wre'; there are wer, wer:de"),
        ("anls:3", "no metric 'anls:3'; there are anls, "),
        ("wer:", "no metric 'wer:'; there are wer, "),
        ("", "no metric ''; there are "),
        ("sep+blue", "no metric 'blue'; there are bleu, "),
        ("wre+sep+bleu", "no metric 'wre'; there are wer, "),
        ("wer:xx", "wer:xx: numbers cannot be written out in this language; there are "),
        ("cer:de", "cer:de: there are cer, cer:"),
        ("bleu:jp", "bleu:jp: no such tokenizer; there are bleu:"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, message):
    with pytest.raises(EvaluationError) as error:
        metric(name)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("wer", "jiwer"),
        ("wer:de", "num2words"),
        ("wer", "whisper_normalizer"),
        ("bleu", "sacrebleu"),
        ("anls", "rapidfuzz"),
        ("rouge_l", "rouge_score"),
    ],
)
def test_a_missing_library(name, library, monkeypatch):
    for module in [library, *(m for m in sys.modules if m.startswith(f"{library}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        EvaluationError, match=rf"^{name}: {library}[.\w]* is missing; pip install 'phi4mm-jax\[eval\]'$"
    ):
        metric.__wrapped__(name)


def test_missing_tokenizer(monkeypatch):
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    with pytest.raises(
        EvaluationError, match=r"^bleu:ja-mecab: needs pip install 'sacrebleu\[ja\]'; bleu:char does not"
    ):
        metric.__wrapped__("bleu:ja-mecab")


def test_importing_the_registry_imports_no_library():
    libraries = {"jax", "jiwer", "num2words", "rapidfuzz", "rouge_score", "sacrebleu", "whisper_normalizer"}
    code = f"import {registry.__name__}, sys; sys.exit(str({libraries} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
