"""Metrics of longer texts: error rates, BLEU, ROUGE-L, and a transcript with its translation."""

import itertools

import jiwer
import numpy as np
import pytest
import sacrebleu
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phi4mm_jax.evaluation.metrics.normalizers import characters, english, join_compounds, multilingual
from phi4mm_jax.evaluation.metrics.registry import metric

WORDS = st.lists(st.sampled_from(["ab", "b", "abb", "c", "drei", "x", "y"]), max_size=9).map(" ".join)
CORPUS = st.lists(st.tuples(WORDS, WORDS.filter(bool)), min_size=1, max_size=6)


def measure(name, prediction, *references, **facts):
    return tuple(metric(name).measure(prediction, references, facts))


def corpus_score(name, pairs):
    found = metric(name)
    numbers = np.array([found.measure(prediction, [reference], {}) for prediction, reference in pairs], np.float64)
    return float(found.score(numbers.sum(axis=0)))


def edits(a, b):
    """Levenshtein's distance by its definition."""
    table = {}
    for i, j in itertools.product(range(len(a) + 1), range(len(b) + 1)):
        if 0 in (i, j):
            table[i, j] = i + j
        else:
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
    return table[len(a), len(b)]


# Word error rate


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "The cat sat.", (0, 3)),
        ("the cat", "the cat sat", (1, 3)),
        ("a cat sat down", "the cat sat", (2, 3)),
        ("", "the cat sat", (3, 3)),
        ("[music] (applause)", "the cat sat", (3, 3)),
        ("Mr. Smith's colour isn't twenty five dollars", "mister smith is color is not $25", (0, 7)),
        ("uh the um cat", "the cat", (0, 2)),
        ("whitepaper", "white paper", (2, 2)),  # no compounds in English
        ("anything", "ignore_time_segment_in_scoring", ()),
        ("anything", "[noise]", ()),
        ("anything", "", ()),
    ],
)
def test_wer(prediction, reference, expected):
    assert measure("wer", prediction, reference) == expected


@settings(deadline=None)
@given(CORPUS)
def test_wer_of_a_corpus(pairs):
    predictions, references = zip(*pairs, strict=True)
    expected = 100 * jiwer.wer(list(references), list(predictions))
    assert corpus_score("wer", pairs) == pytest.approx(expected, abs=1e-9)
    errors = sum(edits(reference.split(), prediction.split()) for prediction, reference in pairs)
    assert expected == pytest.approx(100 * errors / sum(len(r.split()) for r in references), abs=1e-9)


def test_the_best_of_several_references():
    assert measure("wer", "it is red", "it is", "that is red", "it is red now and then") == (1, 3)
    assert measure("wer", "it is red", "", "it was red") == (1, 3)


def test_an_endless_number_is_words_too():
    assert measure("wer", "1" * 9000, "one")[1] == 1
    for language in ("de", "es", "it", "ru"):
        assert multilingual(language)("1" * 9000) == "1" * 9000


@settings(deadline=None)
@given(st.text(max_size=40))
@example("¢7 $0.5 ½ ² and a half million")
def test_normalizers_take_any_text(text):
    for normalize in (english(), multilingual("de")):
        normalized = normalize(text)
        assert normalized == " ".join(normalized.split())
    assert not set(characters(text)) & set(" .,。、！\n")


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("de", "Die Tür kostet 21 €!", "die tür kostet einundzwanzig"),
        ("de", "10.000 Menschen", "zehntausend menschen"),
        ("de", "10 000 Menschen", "zehntausend menschen"),
        ("de", "3,5 [Lachen] (leise) <unk> Kilo", "drei fünf kilo"),
        ("fr", "L'été, à 7 heures", "l été à sept heures"),
        ("es", "¿Qué? ¡22 años!", "qué veintidós años"),
        ("it", "È il 3° piano", "è il tre piano"),
        ("pt", "São 16 cães", "são dezasseis cães"),
        ("pt", "zero\u200bwidth soft\u00adhyphen", "zerowidth softhyphen"),
        ("nl", "e\u0301e\u0301n", "één"),
    ],
)
def test_multilingual_words(language, text, expected):
    assert multilingual(language)(text) == expected


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("die haus tür ist auf", "die haustür ist auf", ("die haustür ist auf", "die haustür ist auf")),
        ("die haustür ist auf", "die haus tür ist auf", ("die haustür ist auf", "die haustür ist auf")),
        ("die haustür", "die haus türe", ("die haustür", "die haus türe")),
        ("a bc d", "ab c d", ("abc d", "abc d")),
        ("a b", "", ("a b", "")),
    ],
)
def test_compounds(reference, prediction, expected):
    assert join_compounds(reference, prediction) == expected


@settings(deadline=None)
@given(WORDS, WORDS)
def test_compounds_keep_the_letters(reference, prediction):
    joined = join_compounds(reference, prediction)
    assert [text.replace(" ", "") for text in joined] == [t.replace(" ", "") for t in (reference, prediction)]
    assert edits(*(t.split() for t in joined)) <= edits(reference.split(), prediction.split())


def test_wer_of_other_languages():
    assert measure("wer:de", "Die Haus Tür kostet 21 Euro.", "die Haustür kostet einundzwanzig Euro") == (0, 5)
    assert measure("wer:fr", "où est l'ete", "Où est l'été ?") == (1, 4)
    assert measure("wer:de", "", "Die Haustür!") == (2, 2)


# Character error rate


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "expected"),
    [
        ("cer:zh", "今天 天气，很好。", "今天天气很好", (0, 6)),
        ("cer:zh", "今天天汽好", "今天天气很好！", (2, 6)),
        ("cer:zh", "ＡＢＣ１２", "ABC12", (0, 5)),
        ("cer:zh", "abc", "ABC", (3, 3)),
        ("cer:ja", "ｶﾞｷﾞ「です」", "ガギです", (0, 4)),
        ("cer:ja", "", "です。", (2, 2)),
        ("cer:ja", "です", "。、！", ()),
        ("cer", "ab  c\n", "a b c", (1, 5)),
        ("cer", "A,b", "a,b.", (2, 4)),
        ("cer", "x", " ", ()),
    ],
)
def test_cer(name, prediction, reference, expected):
    assert measure(name, prediction, reference) == expected


@settings(deadline=None)
@given(st.text("ab c", max_size=9), st.text("abc", min_size=1, max_size=9))
def test_cer_counts_edits(prediction, reference):
    assert measure("cer", prediction, reference) == (
        edits(reference, " ".join(prediction.split())),
        len(reference),
    )
    assert measure("cer:zh", prediction, reference)[0] == edits(reference, prediction.replace(" ", ""))


# BLEU

SENTENCES = st.one_of(
    st.lists(st.sampled_from(["a", "b", "the", "cat,", "Mat.", "don't"]), max_size=9).map(" ".join),
    st.text("今天天气很好ab ，", max_size=12),
)


@settings(deadline=None)
@given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=6), st.sampled_from(["13a", "zh", "char"]))
@example([("a b c d e", "a b c d e")], "13a")
@example([("a b c x e f g h", "a b c d e f g h"), ("", "a b")], "13a")
@example([("a c b d", "a b c d")], "13a")  # no bigram, trigram or 4-gram: smoothed
@example([("a b", "a b")], "13a")  # too short for a 4-gram
def test_bleu_of_a_corpus(pairs, tokenizer):
    predictions, references = zip(*pairs, strict=True)
    expected = sacrebleu.corpus_bleu(list(predictions), [list(references)], tokenize=tokenizer)
    assert corpus_score(f"bleu:{tokenizer}", pairs) == pytest.approx(expected.score, abs=1e-9)


def test_bleu_by_hand():
    # 4 of 5 words, 2 of 4 pairs, 1 of 3 triples, and none of 2 quadruples, which counts as a half; 5 words for 6.
    expected = 100 * (4 / 5 * 2 / 4 * 1 / 3 * 0.5 / 2) ** 0.25 * np.exp(1 - 6 / 5)
    assert corpus_score("bleu", [("the cat sat a mat", "the cat sat on the mat")]) == pytest.approx(expected, abs=1e-9)


def test_bleu_of_several_references():
    references = ["the cat sat on a mat", "a cat is on the mat now", "cats"]
    expected = sacrebleu.corpus_bleu(["the cat is on the mat"], [[reference] for reference in references])
    found = np.array(measure("bleu", "the cat is on the mat", *references), np.float64)
    assert metric("bleu").score(found) == pytest.approx(expected.score, abs=1e-9)


def test_bleu_signatures():
    assert metric("bleu:zh").settings == {
        "signature": f"case:mixed|eff:no|tok:zh|smooth:exp|version:{sacrebleu.__version__}"
    }
    assert (
        "|tok:char|" in metric("bleu:ja").settings["signature"] or "|tok:ja-" in metric("bleu:ja").settings["signature"]
    )


# ROUGE-L


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The meeting is over", ["the meeting, is over!"], 1.0),
        ("a b c", ["a x c d"], 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("a b c", ["x", "a b"], 0.8),
        ("", ["a"], 0.0),
        ("a", ["?"], 0.0),
    ],
)
def test_rouge_l(prediction, references, expected):
    assert measure("rouge_l", prediction, *references) == pytest.approx((expected, 1.0))


# Transcript and translation


@pytest.mark.parametrize(
    ("answer", "translation", "transcript", "without"),
    [
        ("the cat sat <sep> die Katze saß", "die Katze saß", (0, 3), 0),
        ("the <sep> cat<sep>die Katze saß", "die Katze saß", (1, 3), 0),
        ("die Katze saß", "die Katze saß", (3, 3), 1),
        ("the cat sat<sep>", "", (0, 3), 0),
        ("", "", (3, 3), 1),
    ],
)
def test_chain(answer, translation, transcript, without):
    chain = metric("sep+bleu")
    facts = {"transcript": "The cat sat."}
    numbers = chain.measure(answer, ["die Katze saß da"], facts)
    assert numbers == metric("bleu").measure(translation, ["die Katze saß da"], {})
    assert chain.score is metric("bleu").score
    extras = {extra.name: tuple(extra.measure(answer, ["die Katze saß da"], facts)) for extra in chain.extras}
    assert extras == {"transcript": transcript, "without_sep": (without, 1)}


def test_chain_of_other_metrics():
    chain = metric("wer:de+sep+bleu:zh")
    assert chain.settings["signature"] == metric("bleu:zh").settings["signature"]
    transcript = chain.extras[0]
    assert transcript.title == "word error rate of the transcript" and transcript.lower_is_better
    assert transcript.settings == metric("wer:de").settings
    assert transcript.measure("21 Haus Türen <sep> 门", ["门"], {"transcript": "einundzwanzig Haustüren"}) == (0, 2)
    assert transcript.measure("x <sep> 门", ["门"], {}) == ()
