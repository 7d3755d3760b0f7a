"""Which option an answer means, on cases worked out by hand from the rules."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.metrics.choices import last_option, option_by_letter_or_text
from phi4mm_jax.evaluation.metrics.open_questions import is_right
from phi4mm_jax.evaluation.metrics.registry import metric

OPTIONS = {"A": "red fox", "B": "blue whale", "C": "cat", "D": "DNA"}


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        (" B. blue whale", 1),
        ("B blue whale", 0),
        ("The answer is B.", 0),
        ("A. not B", 0),
        ("", 0),
    ],
)
def test_letter(prediction, expected):
    assert metric("letter").measure(prediction, ["B"], {}) == (expected, 1)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("I think it must be B.", "B"),
        ("B, the one that lives in water", None),
        ("B is the one", "B"),  # the fourth word from the end is the first that counts
        ("B it is the one", None),
        ("A or B", None),
        ("The correct answer is **B**. A is a fox, as everybody knows", "B"),
        ("The answer is because of A, or so says B of the fox", None),
        ("the answer is Q or the answer is c; A and B are not it at all", "C"),
        ("It is the Blue Whale", "B"),
        ("It is the Blue Whale and not the red fox", None),
        ("the cat " + "is on the mat " * 10, None),  # more than twice as long as all the options
        ("Z", None),
        ("Z, so no cat", None),
        ("Cannot determine the answer", None),
        ("I can't process this file. B", None),
        ("", None),
    ],
)
def test_mmbench(answer, expected):
    assert option_by_letter_or_text(answer, OPTIONS) == expected
    facts = {"options": OPTIONS}
    found = metric("mmbench")
    assert found.measure(answer, ["B"], facts) == (expected == "B", 1)
    assert found.extras[0].measure(answer, ["B"], facts) == (expected is None, 1)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        (".B.", "B"),
        ("(A) is wrong, (B) is right", "B"),
        ("(B) is right, not A ", "B"),  # parentheses come first
        ("A is wrong and B is right", "B"),
        ("B because of the DNA ", "B"),  # the end of a word is no letter
        ("DNA", "A"),  # but of nothing else it is
        ("B.", "B"),
        ("A.x or B.x", "B"),
        ("it is clearly the big blue whale", "B"),
        ("blue whale", None),  # of more than five words
        ("not a blue whale but a red fox", "A"),
        ("I do not know that at all", None),
        ("", None),
    ],
)
def test_mmmu_multiple_choice(answer, expected):
    assert last_option(answer, OPTIONS) == expected
    facts = {"options": OPTIONS}
    found = metric("mmmu")
    assert found.measure(answer, ["B"], facts) == (expected == "B", 1)
    assert found.extras[0].measure(answer, ["B"], facts) == (expected is None, 1)


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("3.14", ["3.14159"], True),  # to two decimals
        ("3.15", ["3.14159"], False),
        ("1,000", ["1000"], True),
        ("The answer is 1,000 kg.", ["1000"], True),
        ("x = 2 + 3 = 5", ["5"], True),
        ("x = 5\nso we see it is 7", ["5"], False),  # "=" concludes in the last line only
        ("5 is too small, so it must be 7", ["5"], False),
        ("2e3", ["2000"], True),
        ("-5", ["5"], False),
        ("The result is Apple Pie", ["apple pie"], True),
        ("apple", ["apple pie"], False),
        ("pineapple", ["apple"], True),
        ("x", ["x"], True),
        ("axe", ["x"], False),  # a single letter is a word of its own
        ("pears", ["apples", "pears"], True),
        ("", ["apples"], False),
        ("", ["5"], False),
        ("anything", [""], False),
    ],
)
def test_mmmu_open_questions(answer, references, expected):
    assert is_right(answer, references) is expected
    found = metric("mmmu")
    assert found.measure(answer, references, {"options": {}}) == (expected, 1)
    assert found.extras[0].measure(answer, references, {"options": {}}) == (0, 1)


@pytest.mark.parametrize(
    ("name", "facts", "message"),
    [
        ("mmbench", {}, r"^mmbench: the item has no 'options' among its facts, which are \[\]$"),
        ("mmmu", {"dataset": "x"}, r"^mmmu: the item has no 'options' among its facts, which are \['dataset'\]$"),
        ("mmbench", {"options": ["x"]}, r"^mmbench: the item's options must be texts by letter, not \['x'\]$"),
    ],
)
def test_missing_facts(name, facts, message):
    with pytest.raises(EvaluationError, match=message):
        metric(name).measure("", ["A"], facts)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*"ABCD", "(A)", "(B)", "C.", "is", "answer", "red fox", "cat", "DNA", "\n"])).map(
        " ".join
    )
)
def test_an_option_or_none(answer):
    for extract in (option_by_letter_or_text, last_option):
        assert extract(answer, OPTIONS) in (*OPTIONS, None)
        assert extract(answer, {}) is None


@pytest.mark.parametrize("letter", OPTIONS)
@pytest.mark.parametrize("form", ["{0}", "({0})", "{0}.", "The answer is {0}", "The answer is ({0}).", "{0}\n"])
def test_plain_answers_are_understood_by_both(letter, form):
    answer = form.format(letter)
    assert option_by_letter_or_text(answer, OPTIONS) == last_option(answer, OPTIONS) == letter
