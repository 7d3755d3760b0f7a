import json
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from phi4mm_jax.processing.tokenizer import Control, Tokenizer
from phi4mm_jax.serving.calls import AnswerParser, CallDelta, parse_answer
from phi4mm_jax.serving.tools import read_tools

TOOLS = read_tools([{"function": {"name": name}} for name in ("add", "say")])
OPEN, CLOSE = Control("<|tool_call|>"), Control("<|/tool_call|>")


def call(name: str = "add", **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


PAIR = f"[{call(a=1, b=2)}, {call('say', text='Hé: {]} 😀')}]"
PAIR_OF_CALLS = [("add", {"a": 1, "b": 2}), ("say", {"text": "Hé: {]} 😀"})]
ADD = [("add", {"a": 1})]

ANSWERS: dict[str, tuple[list[str], str, list[tuple[str, Any]]]] = {
    "text": (["Hello, [world] {x}"], "Hello, [world] {x}", []),
    "nothing": ([], "", []),
    "white space": ([" \n"], " \n", []),
    "calls": ([OPEN, PAIR, CLOSE], "", PAIR_OF_CALLS),
    "no end": ([OPEN, PAIR], "", PAIR_OF_CALLS),
    "text around": (["Let me see.", OPEN, f"[{call(a=1)}]", CLOSE, "Done."], "Let me see.Done.", ADD),
    "single call": ([OPEN, call(a=1), CLOSE], "", ADD),
    "lines": ([OPEN, f"\n{call(a=1)}\n{call('say', text='x')}\n", CLOSE], "", [*ADD, ("say", {"text": "x"})]),
    "two lists": ([OPEN, f"[{call(a=1)}]", CLOSE, OPEN, f"[{call(b=2)}]", CLOSE], "", [*ADD, ("add", {"b": 2})]),
    "two openings": ([OPEN, call(a=1), OPEN, call(b=2)], "", [*ADD, ("add", {"b": 2})]),
    "parameters": ([OPEN, '[{"name": "add", "parameters": {"a": 1}}]', CLOSE], "", ADD),
    "other order": ([OPEN, '[{"arguments": {"a": 1}, "name": "add"}]', CLOSE], "", ADD),
    "as in the API": (
        [OPEN, '[{"type": "function", "id": "x", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}]', CLOSE],
        "",
        ADD,
    ),
    "more keys": ([OPEN, '[{"name": "add", "arguments": {"a": 1}, "id": [{"x": "}"}]}]', CLOSE], "", ADD),
    "no arguments": ([OPEN, '[{"name": "add"}, {"name": "say", "arguments": null}]'], "", [("add", {}), ("say", {})]),
    "indented": ([OPEN, json.dumps([{"name": "add", "arguments": {"a": 1}}], indent=4), CLOSE], "", ADD),
    "escapes": ([OPEN, r'[{"name": "\u0061dd", "arguments": {"a\"}": "\\"}}]', CLOSE], "", [("add", {'a"}': "\\"})]),
    "unknown function": ([OPEN, call("fly"), CLOSE], "", [("fly", {})]),
    "functools": ([f"functools[{call(a=1)}]"], "", ADD),
    "functools in control tokens": ([OPEN, f"functools[{call(a=1)}]", CLOSE], "", ADD),
    "bare list": ([f"\n{PAIR}"], "", PAIR_OF_CALLS),
    "bare call": ([call(a=1)], "", ADD),
    "bare call with parameters": (['{"name": "add", "parameters": {"a": 1}}'], "", ADD),
    "bare calls, then text": ([f"[{call(a=1)}]\n\nThat is all: [1]"], "That is all: [1]", ADD),
    "bare call of an unknown function": ([call("fly", a=1)], call("fly", a=1), []),
    "bare call after text": ([f"Yes: {call(a=1)}"], f"Yes: {call(a=1)}", []),
    "other JSON": (['[{"name": "Ada", "age": 36}]'], '[{"name": "Ada", "age": 36}]', []),
    "begins like functools": (["functional"], "functional", []),
    "spelled": ([f"<|tool_call|>[{call(a=1)}]<|/tool_call|>"], f"<|tool_call|>[{call(a=1)}]<|/tool_call|>", []),
    "spelled among arguments": ([OPEN, call(a="<|/tool_call|>"), CLOSE], "", [("add", {"a": "<|/tool_call|>"})]),
    "empty list": ([OPEN, "[]", CLOSE], "", []),
    "not JSON": ([OPEN, "[add(1)]", CLOSE], "[add(1)]", []),
    "no name": ([OPEN, '[{"arguments": {"a": 1}}]', CLOSE], '[{"arguments": {"a": 1}}]', []),
    "arguments that are no object": (
        [OPEN, '{"name": "add", "arguments": [1]}'],
        '{"name": "add", "arguments": [1]}',
        [],
    ),
    "arguments that are no JSON": (
        [OPEN, '{"name": "add", "arguments": "1 + 1"}', CLOSE],
        '{"name": "add", "arguments": "1 + 1"}',
        [],
    ),
    "cut before arguments": ([OPEN, '[{"name": "ad'], '[{"name": "ad', []),
    "cut bare": (['[{"name": "ad'], '[{"name": "ad', []),
    "second is none": ([OPEN, f'[{call(a=1)}, {{"x": 1}}]', CLOSE], '{"x": 1}]', ADD),
    "other control tokens": ([Control("<|tool|>"), "x", Control("<|/tool|>"), CLOSE, "y"], "xy", []),
}
"""What the model writes, the content of it, and the calls."""


def read(deltas: Sequence[CallDelta]) -> list[tuple[str, str]]:
    """Joins the parts of calls as clients do."""
    joined: list[list[str]] = []
    for delta in deltas:
        if delta.index == len(joined):
            assert delta.id.startswith("call_") and delta.name
            joined.append([delta.name, ""])
        else:
            assert delta.index == len(joined) - 1 and delta.id is None and delta.name is None
        joined[-1][1] += delta.arguments
    return [(name, arguments) for name, arguments in joined]


@pytest.mark.parametrize("name", ANSWERS)
def test_whole_answer(name: str, tokenizer: Tokenizer) -> None:
    parts, content, calls = ANSWERS[name]
    ids = tokenizer.encode_parts(parts)
    answer = parse_answer(tokenizer, TOOLS, tokenizer.decode(ids), ids)
    assert answer.content == content
    assert [(call, json.loads(arguments)) for call, arguments in read(answer.calls)] == calls
    assert len({call.id for call in answer.calls}) == len(calls)


@pytest.mark.parametrize("name", ANSWERS)
def test_streamed_answer_is_the_same(name: str, tokenizer: Tokenizer) -> None:
    parts, content, calls = ANSWERS[name]
    ids = [*tokenizer.encode_parts(parts), tokenizer.control_ids["<|end|>"]]
    for seed in range(8):
        generator = random.Random(seed)
        cuts = sorted(
            {0, len(ids), *generator.choices(range(len(ids)), k=generator.choice([0, 2, len(ids), 4 * len(ids)]))}
        )
        parser, stream = AnswerParser(tokenizer, TOOLS), tokenizer.stream()
        texts, deltas, lag = [], [], ""
        for start, end in pairwise(cuts):
            lag += "".join(stream.push(i) for i in ids[start:end])
            last = end == len(ids)
            ready = len(lag) if last else generator.randint(0, len(lag))  # text may lag behind its tokens
            delta = parser.push(lag[:ready], ids[start:end], last=last)
            lag = lag[ready:]
            texts.append(delta.content)
            deltas += delta.calls
        assert "".join(texts) == content
        assert [(call, json.loads(arguments)) for call, arguments in read(deltas)] == calls


def test_arguments_come_as_they_are_written(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_parts([OPEN, f"[{call('say', text='a b c d')}]", CLOSE])
    parser = AnswerParser(tokenizer, TOOLS)
    deltas = [parser.push(tokenizer.decode([i]), [i]) for i in ids]
    parts = [delta.calls[0] for delta in deltas if delta.calls]
    assert (parts[0].name, parts[0].arguments) == ("say", "{")
    assert "".join(part.arguments for part in parts) == '{"text": "a b c d"}'
    assert len(parts) > 10
    assert not any(delta.content for delta in deltas)


def test_text_is_not_held_back(tokenizer: Tokenizer) -> None:
    parser = AnswerParser(tokenizer, TOOLS)
    for text in ('{"', "answer", '": 1', "}", " functools", "[{"):
        ids = tokenizer.encode(text, allow_special=False)
        held = parser.push(text, ids)
        assert held.content == ("" if text == '{"' else text if text != "answer" else '{"answer')
    parser = AnswerParser(tokenizer, ())  # without tools nothing is a call but what control tokens say
    assert parser.push('{"', tokenizer.encode('{"', allow_special=False)).content == '{"'


@pytest.mark.parametrize("end", range(9, 40))
def test_cut_among_arguments(end: int, tokenizer: Tokenizer) -> None:
    text = '[{"name": "say", "arguments": {"text": "a b c"}}]'
    ids = tokenizer.encode_parts([OPEN, text[: len(text) - end]])
    answer = parse_answer(tokenizer, TOOLS, tokenizer.decode(ids), ids)
    begun = text[30 : len(text) - end]
    assert read(answer.calls) == ([("say", begun)] if begun else [])
    assert answer.content == ("" if begun else text[: len(text) - end])


def test_stop_string_that_cuts_the_markup(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_parts(["Hi", OPEN])
    for shown in ("Hi", "Hi<|", "Hi<|tool_"):
        assert parse_answer(tokenizer, TOOLS, shown, ids).content == "Hi"


def test_half_a_character_before_a_call(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("é", allow_special=False)[:1], *tokenizer.encode_parts([OPEN, call(a=1)])]
    answer = parse_answer(tokenizer, TOOLS, tokenizer.decode(ids), ids)
    assert answer.content == "\ufffd"
    assert read(answer.calls) == [("add", '{"a": 1}')]


def test_nothing_is_lost(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    pieces = [OPEN, CLOSE, *'[]{}":, ', '"name"', '"arguments"', '"add"', "\\", "functools", "x", call()]
    found = 0
    for _ in range(2000):
        parts = generator.choices(pieces, k=generator.randint(1, 12))
        ids = tokenizer.encode_parts(parts)
        answer = parse_answer(tokenizer, TOOLS, tokenizer.decode(ids), ids)
        assert "tool_call" not in answer.content
        if answer.calls:
            found += 1
            continue
        written = "".join(part for part in parts if not isinstance(part, Control))
        kept = str.maketrans("", "", "[], ")  # of which lists without calls consist
        assert answer.content.translate(kept) == written.translate(kept)
    assert found > 50
