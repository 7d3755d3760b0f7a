import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serving.grammar import Grammar, Grammars
from phi4mm_jax.serving.tools import Tool, ToolError, call_grammar, read_choice, read_tools

Draw = Callable[[Grammar, int], list[int]]


def tool(name: str = "look_up", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TOOLS = [
    tool(
        "weather",
        description="Now.",
        parameters=schema(city={"$ref": "#/$defs/city"}) | {"$defs": {"city": {"enum": ["Paris", "Köln"]}}},
    ),
    tool("weather_at", parameters=schema(days={"type": "integer"}, unit={"enum": ["C", "F"]}), strict=True),
    tool("time"),
]


def test_tools_are_read() -> None:
    weather, at, clock = read_tools(TOOLS)
    assert (weather.name, weather.strict, weather.where) == ("weather", False, "tools[0].function")
    assert (at.parameters, at.strict) == (TOOLS[1]["function"]["parameters"], True)
    assert clock.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert read_tools(None) == read_tools([]) == ()
    assert read_tools([tool(parameters={})])[0].parameters == {"type": "object"}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("[]", r"tools: expected a list"),
        ({}, r"tools: expected a list"),
        ([1], r"tools\[0\]: expected a mapping"),
        ([tool(), {"type": "retrieval"}], r"tools\[1\]\.type is 'retrieval'"),
        ([{"type": "function"}], r"tools\[0\]\.function: expected a mapping"),
        ([tool(name="")], r"tools\[0\]\.function\.name is ''"),
        ([tool(name="a b")], r"tools\[0\]\.function\.name is 'a b'; expected 1 to 64 letters"),
        ([tool(name="a\n")], r"tools\[0\]\.function\.name"),
        ([tool(name="x" * 65)], r"tools\[0\]\.function\.name"),
        ([tool(name=3)], r"tools\[0\]\.function\.name is 3"),
        ([tool(), tool()], r"tools\[1\]\.function\.name: there are two tools named 'look_up'"),
        ([tool(description=1)], r"tools\[0\]\.function\.description"),
        ([tool(parameters="{}")], r"tools\[0\]\.function\.parameters: expected a JSON schema"),
        ([tool(parameters={"type": "array"})], r"tools\[0\]\.function\.parameters\.type is 'array'"),
        ([tool(strict="yes")], r"tools\[0\]\.function\.strict is 'yes'"),
        ([tool(name=f"t{i}") for i in range(129)], r"at most 128"),
    ],
)
def test_bad_tools(tools: Any, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        read_tools(tools)


def test_choice() -> None:
    tools = read_tools(TOOLS)
    for choice in (None, "auto"):
        assert (read_choice(choice, tools).mode, read_choice(choice, tools).tools) == ("auto", tools)
        assert read_choice(choice, ()).mode == "none"
    assert (read_choice("none", tools).mode, read_choice("none", tools).tools) == ("none", ())
    assert (read_choice("required", tools).mode, read_choice("required", tools).tools) == ("required", tools)
    named = read_choice({"type": "function", "function": {"name": "time"}}, tools)
    assert (named.mode, named.tools) == ("required", tools[2:])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("any", "tool_choice is 'any'; accepted: none, auto, required"),
        (1, "tool_choice is 1"),
        (["auto"], "tool_choice is"),
        ({"type": "function"}, r"tool_choice\.function: expected"),
        ({"type": "tool", "function": {"name": "time"}}, r"tool_choice\.type is 'tool'"),
        ({"type": "function", "function": {"name": "date"}}, "no tool 'date'; there are weather, weather_at, time"),
    ],
)
def test_bad_choice(choice: Any, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        read_choice(choice, read_tools(TOOLS))


def test_required_without_tools() -> None:
    with pytest.raises(ToolError, match="no tools"):
        read_choice("required", ())


def calls(tokenizer: Tokenizer, drawn: list[int]) -> list[dict[str, Any]]:
    """The calls that an answer consists of, with control tokens around them and none among them."""
    opening, *body, closing = drawn
    assert (opening, closing) == (tokenizer.control_ids["<|tool_call|>"], tokenizer.control_ids["<|/tool_call|>"])
    assert set(tokenizer.control_ids.values()).isdisjoint(body)
    return json.loads(tokenizer.decode(body))


@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_valid(parallel: bool, grammars: Grammars, draw: Draw, tokenizer: Tokenizer) -> None:
    tools = {tool.name: tool for tool in read_tools(TOOLS)}
    grammar = call_grammar(grammars, tuple(tools.values()), parallel=parallel)
    counts, names = set(), set()
    for seed in range(60):
        answer = calls(tokenizer, draw(grammar, seed))
        counts.add(len(answer))
        for call in answer:
            assert list(call) == ["name", "arguments"]
            jsonschema.Draft202012Validator(tools[call["name"]].parameters).validate(call["arguments"])
            names.add(call["name"])
    assert names == set(tools)
    assert counts == {1} if not parallel else len(counts) > 1


def test_forced_function(grammars: Grammars, draw: Draw, tokenizer: Tokenizer) -> None:
    chosen = read_choice({"type": "function", "function": {"name": "time"}}, read_tools(TOOLS)).tools
    assert calls(tokenizer, draw(call_grammar(grammars, chosen, parallel=False), 0)) == [
        {"name": "time", "arguments": {}}
    ]


def test_only_strict_tools_need_a_schema_that_is_supported(
    grammars: Grammars, draw: Draw, tokenizer: Tokenizer
) -> None:
    parameters = schema(tags={"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True})
    loose = read_tools([tool(parameters=parameters)])
    (call, *_) = calls(tokenizer, draw(call_grammar(grammars, loose), 1))
    assert set(call["arguments"]["tags"]) <= {"a", "b"}
    strict = read_tools([tool("time"), tool(parameters=parameters, strict=True)])
    with pytest.raises(ToolError, match=r"tools\[1\]\.function\.parameters: .*uniqueItems"):
        call_grammar(grammars, strict)


def test_schemas_that_are_too_large_together(grammars: Grammars) -> None:
    tools = [
        Tool(name=f"t{i}", parameters={"type": "object", "description": "x" * 2000}, strict=True, where=f"tools[{i}]")
        for i in range(100)
    ]
    with pytest.raises(ToolError, match="tools: has .* characters"):
        call_grammar(grammars, tools)


def test_as_many_tools_as_there_may_be(grammars: Grammars, draw: Draw, tokenizer: Tokenizer) -> None:
    tools = read_tools([tool("f" * 60 + str(i), parameters=schema(n={"const": i})) for i in range(128)])
    for call in calls(tokenizer, draw(call_grammar(grammars, tools), 2)):
        assert call["name"] == "f" * 60 + str(call["arguments"]["n"])
