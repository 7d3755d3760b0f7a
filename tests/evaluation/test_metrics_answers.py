"""Metrics of short answers, on cases worked out by hand."""

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.metrics import vqa
from phi4mm_jax.evaluation.metrics.registry import metric


def grade(name, prediction, *references, **facts):
    score, weight = metric(name).measure(prediction, references, facts)
    assert weight == 1 and 0 <= score <= 1
    return score


# ANLS


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("1,234 kg", ["1,234 kg"], 1),
        (" New  YORK\n", ["new york"], 1),
        ("hello", ["hallo"], 1 - 1 / 5),
        ("hello", ["goodbye", "hallo", "help"], 1 - 1 / 5),
        ("abcd", ["abxy"], 0.5),
        ("abcd", ["axyz"], 0),
        ("a     b", ["a c"], 1 - 1 / 7),  # of the length before spaces are collapsed
        ("Zürich.", ["Zurich"], 1 - 2 / 7),
        ("", ["yes"], 0),
        ("", [""], 1),
    ],
)
def test_anls(prediction, references, expected):
    assert grade("anls", prediction, *references) == pytest.approx(expected)


@functools.cache
def distance(a, b):
    """Levenshtein's distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@settings(deadline=None)
@given(st.text("abAß ", max_size=6), st.lists(st.text("abAß ", max_size=6), min_size=1, max_size=3))
def test_anls_is_its_formula(prediction, references):
    similarities = []
    for reference in references:
        edits = distance(" ".join(reference.lower().split()), " ".join(prediction.lower().split()))
        longest = max(len(reference), len(prediction))
        similarities.append(1 - edits / longest if longest else 1)
    best = max(similarities)
    assert grade("anls", prediction, *references) == pytest.approx(best if best >= 0.5 else 0)


# Relaxed accuracy


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-105", "-100", 1),
        ("-100", "100", 0),
        ("10%", "0.1", 1),
        ("10.4 %", "10%", 1),
        ("10", "10%", 0),
        ("0.01", "0", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),  # which is compared as text
        ("1,234", "1234", 0),
        ("1,234", "1,234", 1),
        ("1234.", "1234", 1),
        ("5 apples", "5", 0),
        (" Yes\n", "yes", 1),
        ("Yes.", "Yes", 0),
        ("nan", "5", 0),
        ("inf", "5", 0),
        ("", "5", 0),
    ],
)
def test_relaxed_accuracy(prediction, reference, expected):
    assert grade("relaxed_accuracy", prediction, reference) == expected


def test_relaxed_accuracy_of_several_references():
    assert grade("relaxed_accuracy", "20", "10", "21") == 1
    assert grade("relaxed_accuracy", "20", "10", "30") == 0


# VQA


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_vqa(agreeing, expected):
    references = ["Yes"] * agreeing + ["no"] * (10 - agreeing)
    assert grade("vqa", "yes!", *references) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=10))
def test_vqa_is_the_mean_over_those_left_out(references):
    others = list(itertools.combinations(references, len(references) - 1))
    expected = sum(min(1, left.count("b") / 3) for left in others) / len(others)
    assert grade("vqa", "b", *references) == pytest.approx(expected)


def test_vqa_needs_several_people():
    with pytest.raises(EvaluationError, match="^vqa: needs the answers of several people"):
        metric("vqa").measure("", ["yes"], {})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Cat", "cat"),
        ("an apple a day", "apple day"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("ten o clock", "10 o clock"),
        ("oclock", "o'clock"),
        ("dont", "don't"),
        ("shouldnt've", "shouldn't've"),
        ("shouldn'tve", "shouldn't've"),
        ("yall'd've", "y'all'd've"),
        ("shed", "shed"),
        ("the dog's", "dog 's"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("U.S.A.", "usa"),
        ("what? yes!", "what yes"),
        ("a-b", "b"),  # to "a b", of which "a" is an article
        ("c-d", "c d"),
        ("c - d", "c d"),
        ("c - d-e", "c de"),  # one mark next to a space takes the others along
        ("(stop)", "stop"),
        ("$5", "$5"),
        ("line\nbreak\ttab", "line break tab"),
        ("", ""),
    ],
)
def test_vqa_normalizer(answer, expected):
    assert vqa.normalize(answer) == expected


@given(st.text(max_size=30))
def test_vqa_normalizer_takes_any_text(text):
    normalized = vqa.normalize(text)
    assert normalized == " ".join(normalized.split())
    assert not set(normalized) & set(',?;/[]"{}()=+\\_-><@`!')


# Exact and contained


@pytest.mark.parametrize("name", ["exact", "accuracy"])
@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (" Blue  whale.\n", "blue whale", 1),
        ("(A)", "a", 1),
        ("blue", "blue whale", 0),
        ("3.5", "35", 0),
        ("1,000", "1000", 0),
        ("-5", "5", 0),
        ("5%", "5", 1),
        ("$5.", "5", 1),
        ("well-known", "wellknown", 1),
        ("?", "!", 0),
        ("?", "?", 1),
        ("", "x", 0),
        ("", "?", 0),
    ],
)
def test_exact(name, prediction, reference, expected):
    assert grade(name, prediction, "something else", reference) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("It is a Blue\nWhale.", ["blue whale"], 1),
        ("It is blue", ["red", "blue"], 1),
        ("It is blue", ["red"], 0),
        ("", ["red"], 0),
        ("anything", [""], 0),
    ],
)
@pytest.mark.parametrize("name", ["contains", "ocrbench"])
def test_contains(name, prediction, references, expected):
    assert grade(name, prediction, *references) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "formula", "text"),
    [
        ("\\frac {X} {2}", "\\frac{X}{2}", 1, 0),
        ("\\frac{x}{2}", "\\frac{X}{2}", 0, 1),
        ("a +\nb", "a+b", 1, 0),
        ("the answer is a + b", "A + B", 0, 1),
    ],
)
def test_ocrbench_formulas_keep_case_and_lose_spaces(prediction, reference, formula, text):
    assert grade("ocrbench", prediction, reference, dataset="HME100k") == formula
    assert grade("ocrbench", prediction, reference, dataset="IIIT5K") == text
