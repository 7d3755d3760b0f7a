"""Answers of a given form, and tools."""

import json
import re

import httpx
import openai
import pytest

SUM = [{"role": "user", "content": "What is 21 plus 84?"}]
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}, "word": {"enum": ["moon", "sun"]}},
    "required": ["sum", "word"],
    "additionalProperties": False,
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 21]}, "b": {"enum": [2, 84]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
LOOK = {"type": "function", "function": {"name": "look"}}


def ask(client, messages=SUM, **fields):
    return client.chat.completions.create(model="nano", messages=messages, max_tokens=120, **fields)


def text(client, **fields):
    return ask(client, **fields).choices[0].message.content


def joined(chunks):
    """The message of a stream, its calls put together, and what ended it."""
    content, calls, reason = "", {}, None
    for chunk in chunks:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for part in choice.delta.tool_calls or []:
            call = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
            assert part.id in (None, call["id"])
            call["arguments"] += part.function.arguments or ""
    return content, [calls[i] for i in sorted(calls)], reason


def test_json_schema(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    answer = ask(client, response_format=wanted)
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"sum", "word"} and 0 <= found["sum"] <= 999 and found["word"] in ("moon", "sun")
    assert answer.choices[0].finish_reason == "stop"
    assert joined(ask(client, response_format=wanted, stream=True))[0] == answer.choices[0].message.content


def test_json_object(client):
    assert text(client, response_format={"type": "json_object"}).startswith("{")
    assert text(client, response_format={"type": "text"}) == "105"


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ({"type": "regex", "value": "[a-c]{4}"}, "[a-c]{4}"),
        ({"type": "lark", "value": 'start: "It is " NUMBER\nNUMBER: /[0-9]{3}/'}, "It is [0-9]{3}"),
        ({"type": "json_schema", "value": {"enum": ["left", "right"]}}, '"(left|right)"'),
    ],
)
def test_grammars(client, grammar, pattern):
    assert re.fullmatch(pattern, text(client, extra_body={"grammar": grammar}))
    both = ask(client, n=2, temperature=30, seed=1, extra_body={"grammar": grammar})
    assert all(re.fullmatch(pattern, choice.message.content) for choice in both.choices)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call(client, choice, stream):
    fields = {"tools": [ADD, LOOK] if isinstance(choice, dict) else [ADD], "tool_choice": choice}
    answer = ask(client, **fields, parallel_tool_calls=False, stream=stream)
    if stream:
        content, (call,), reason = joined(answer)
        name, arguments, id = call["name"], call["arguments"], call["id"]
    else:
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        (call,), content = message.tool_calls, message.content
        name, arguments, id = call.function.name, call.function.arguments, call.id
        assert call.type == "function"
    assert (name, reason, content or None) == ("add", "tool_calls", None)
    assert set(json.loads(arguments)) == {"a", "b"}
    assert id


def test_a_call_and_its_result_in_the_conversation(client, server):
    call = ask(client, tools=[ADD], tool_choice="required", parallel_tool_calls=False).choices[0].message
    messages = [*SUM, call.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": "x", "content": "105"}]
    body = {"messages": messages, "tools": [ADD]}
    ids = httpx.post(f"{server}/tokenize", json=body).json()["tokens"]
    shown = httpx.post(f"{server}/detokenize", json={"tokens": ids}).json()["prompt"]
    arguments = json.dumps(json.loads(call.tool_calls[0].function.arguments))
    assert f'<|tool_call|>[{{"name": "add", "arguments": {arguments}}}]<|/tool_call|>' in shown
    assert "<|tool|>105<|end|>" in shown and '"description": "Adds."' in shown


def test_tools_that_are_left_alone(client):
    assert text(client, tools=[ADD], tool_choice="none") == "105"
    answer = ask(client, tools=[ADD])
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert joined(ask(client, tools=[ADD], stream=True))[0] == answer.choices[0].message.content


def test_a_call_that_is_cut_short(client):
    fields = {"tools": [ADD], "tool_choice": "required"}
    whole = ask(client, **fields).usage.completion_tokens
    answer = client.chat.completions.create(model="nano", messages=SUM, max_tokens=whole // 2, **fields)
    assert answer.choices[0].finish_reason == "length"


REFUSED = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "wizard"}}}},
        "response_format.json_schema.schema",
    ),
    ({"grammar": {"type": "regex", "value": "("}}, "grammar.value"),
    ({"grammar": {"type": "regex", "value": {"a": 1}}}, "grammar.value"),
    ({"grammar": {"type": "json_schema", "value": "{}"}}, "grammar.value"),
    ({"grammar": {"type": "yacc", "value": ""}}, "grammar.type"),
    ({"grammar": {"type": "regex", "value": "a"}, "tools": [ADD]}, "grammar"),
    ({"grammar": {"type": "regex", "value": "a"}, "response_format": {"type": "json_object"}}, "response_format"),
    ({"grammar": {"type": "regex", "value": "a"}, "min_tokens": 2}, "min_tokens"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [ADD], "tool_choice": "perhaps"}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice.function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[str(case[0])[:60] for case in REFUSED])
def test_what_cannot_be_had_is_refused(server, fields, param):
    answer = httpx.post(f"{server}/v1/chat/completions", json={"model": "nano", "messages": SUM, **fields}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_an_error_is_openais(client):
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        ask(client, tool_choice="required")
