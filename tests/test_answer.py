"""Tokens to streamed text: whole characters, and never a stop string."""

from pathlib import Path

import numpy as np
import pytest

from phi4mm_jax.answer import Answer, Output
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.runtime.rows import Event, TokenLogprob
from phi4mm_jax.runtime.sampling import SamplingParams

PROMPT = Prompt(np.arange(7, dtype=np.int32))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(Path(__file__).parent / "golden")


@pytest.fixture(scope="module")
def token_of(tokenizer):
    """The token of each single byte."""
    found = {tokenizer.token_bytes(i): i for i in range(500)}
    return {byte: found[bytes([byte])] for byte in range(256)}


def event(token_ids, reason=None, *, logprobs=False, received=2.0):
    entries = [TokenLogprob(t, -0.5, ((t, -0.5),)) for t in token_ids] if logprobs else None
    return Event(0, list(token_ids), entries, reason, 1.0, received)


def serve(tokenizer, chunks, stop=(), reason="length", **settings):
    """Pushes chunks of tokens until the answer ends; returns the pieces and the whole answer."""
    answer = Answer(tokenizer, PROMPT, SamplingParams(stop=stop, **settings), 0.0)
    pieces = []
    for i, chunk in enumerate(chunks):
        last = reason if i == len(chunks) - 1 else None
        pieces.append(answer.push(event(chunk, last, logprobs=settings.get("logprobs") is not None, received=2.0 + i)))
        if answer.finish_reason:
            break
    return pieces, Output.of(pieces)


def letters(token_of, text):
    return [token_of[byte] for byte in text.encode()]


def one_by_one(token_of, text):
    return [[token] for token in letters(token_of, text)]


def test_text_without_stop_strings_is_shown_at_once(tokenizer, token_of):
    pieces, output = serve(tokenizer, one_by_one(token_of, "abc"))
    assert [piece.text for piece in pieces] == ["a", "b", "c"]
    assert [piece.finish_reason for piece in pieces] == [None, None, "length"]
    assert output.text == "abc"
    assert output.token_ids == letters(token_of, "abc")


def test_a_stop_string_over_several_tokens(tokenizer, token_of):
    pieces, output = serve(tokenizer, one_by_one(token_of, "one END two"), stop="END")
    assert [piece.text for piece in pieces] == ["o", "n", "e", " ", "", "", ""]
    assert pieces[-1].finish_reason == output.finish_reason == "stop"
    assert output.text == "one "
    assert output.token_ids == letters(token_of, "one END")


def test_what_only_begins_like_a_stop_string_is_shown_after_all(tokenizer, token_of):
    pieces, output = serve(tokenizer, one_by_one(token_of, "ENENx"), stop="ENDS")
    assert [piece.text for piece in pieces] == ["", "", "EN", "", "ENx"]
    pieces, output = serve(tokenizer, one_by_one(token_of, "xEN"), stop="END")
    assert [piece.text for piece in pieces] == ["x", "", "EN"]  # the answer ends, so nothing can follow
    assert output.finish_reason == "length"


def test_overlapping_beginnings(tokenizer, token_of):
    """The held back text is searched anew: `aab` after `aaab` was begun by the first `aa`."""
    assert serve(tokenizer, one_by_one(token_of, "xaaab!"), stop="aab")[1].text == "xa"
    assert serve(tokenizer, one_by_one(token_of, "ababc!"), stop=["abc", "babd"])[1].text == "ab"


def test_the_first_stop_string_counts(tokenizer, token_of):
    text = letters(token_of, "one two three")
    for stop in (["two", "one two"], ["three", "two", "e t"]):
        _, output = serve(tokenizer, [text], stop=stop)
        expected = min("one two three".find(s) for s in stop)
        assert output.text == "one two three"[:expected]


def test_tokens_after_a_stop_string_are_dropped(tokenizer, token_of):
    """Also where one dispatch brought them along; their log-probabilities go with them."""
    tokens = letters(token_of, "ab.cdef")
    pieces, output = serve(tokenizer, [tokens[:5], tokens[5:]], stop=".", logprobs=1)
    assert len(pieces) == 1
    assert pieces[0].token_ids == output.token_ids == tokens[:3]
    assert [entry.token_id for entry in pieces[0].logprobs] == tokens[:3]
    assert output.logprobs == pieces[0].logprobs
    assert output.usage.completion_tokens == 3


def test_a_character_is_shown_whole(tokenizer, token_of):
    pieces, output = serve(tokenizer, one_by_one(token_of, "é你🙂!"))
    assert [piece.text for piece in pieces] == ["", "é", "", "", "你", "", "", "", "🙂", "!"]
    assert output.text == "é你🙂!"


def test_a_character_that_stays_incomplete(tokenizer, token_of):
    pieces, output = serve(tokenizer, one_by_one(token_of, "a你")[:-1])
    assert [piece.text for piece in pieces] == ["a", "", "\ufffd"]
    assert output.text == "a\ufffd"


def test_a_stop_string_of_split_characters(tokenizer, token_of):
    for stop in ("你", "é你"):
        _, output = serve(tokenizer, one_by_one(token_of, "aé你b"), stop=stop)
        assert output.text == "aé你b".split(stop)[0]


def test_the_stop_token_is_counted_and_not_shown(tokenizer, token_of):
    end = tokenizer.control_ids["<|end|>"]
    pieces, output = serve(tokenizer, [letters(token_of, "hi"), [end]], reason="stop")
    assert [piece.text for piece in pieces] == ["hi", ""]
    assert (output.text, output.finish_reason) == ("hi", "stop")
    assert output.token_ids == [*letters(token_of, "hi"), end]
    assert output.usage.completion_tokens == 3


def test_a_stop_string_with_the_last_token_wins(tokenizer, token_of):
    """The limit is reached by the very token that completes a stop string."""
    _, output = serve(tokenizer, [letters(token_of, "abc.")], stop=".")
    assert (output.text, output.finish_reason) == ("abc", "stop")


def test_usage(tokenizer, token_of):
    pieces, output = serve(tokenizer, one_by_one(token_of, "abc"))
    assert [piece.usage is None for piece in pieces] == [True, True, False]
    usage = output.usage
    assert usage == pieces[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.image_tokens, usage.audio_tokens) == (7, 3, 0, 0)
    # Called at 0 s, admitted at 1 s, tokens at 2, 3 and 4 s.
    assert (usage.time_to_first_token, usage.seconds) == (2.0, 4.0)
    assert (usage.prefill_tokens_per_second, usage.decode_tokens_per_second) == (7.0, 1.0)
    alone = serve(tokenizer, [letters(token_of, "a")])[1].usage
    assert alone.decode_tokens_per_second == 0.0


def test_without_logprobs_there_are_none(tokenizer, token_of):
    pieces, output = serve(tokenizer, one_by_one(token_of, "ab"))
    assert output.logprobs is None
    assert all(piece.logprobs is None for piece in pieces)


@pytest.mark.parametrize("seed", range(200))
def test_pieces_add_up_and_never_show_a_stop_string(tokenizer, token_of, seed):
    """Random texts over few letters, random stop strings, random dispatches."""
    random = np.random.default_rng(seed)
    word = lambda low, high: "".join(random.choice(list("abé"), random.integers(low, high)))  # noqa: E731
    text, stops = word(0, 40), [word(1, 6) for _ in range(random.integers(0, 4))]
    tokens = letters(token_of, text) + [tokenizer.control_ids["<|end|>"]]
    cuts = np.sort(random.integers(0, len(tokens), random.integers(0, 10)))
    chunks = [part.tolist() for part in np.split(tokens, cuts) if len(part)]
    pieces, output = serve(tokenizer, chunks, stop=stops, reason="stop")
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    read = text[: min(ends)] if ends else text  # up to where the first stop string is complete
    expected = min((read.split(stop)[0] for stop in stops), key=len, default=read)
    assert "".join(piece.text for piece in pieces) == output.text == expected
    assert output.finish_reason == "stop"
    assert [token for piece in pieces for token in piece.token_ids] == output.token_ids
