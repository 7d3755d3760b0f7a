"""Tools as in the OpenAI API: what a request says about them, and the grammar that forces a call."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from phi4mm_jax.processing.display import quote

if TYPE_CHECKING:
    from phi4mm_jax.serving.grammar import Grammar, Grammars

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class ToolError(ValueError):
    """A tool or a tool choice is malformed; the message names the field and what is accepted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call."""

    name: str
    """1 to 64 letters, digits, underscores and dashes."""
    parameters: Mapping[str, Any]
    """JSON schema of its arguments, which are an object."""
    strict: bool
    """Whether what a grammar cannot express in the schema is an error."""
    where: str
    """Where it stands in the request, for error messages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """Whether the model calls tools."""

    mode: Literal["none", "auto", "required"]
    """Never, as it likes, or at least once."""
    tools: tuple[Tool, ...]
    """Those that it may call."""


def read_tools(tools: Any) -> tuple[Tool, ...]:
    """Reads the `tools` of a request; None is none.

    Raises:
      ToolError: naming the field, such as `tools[0].function.name`.
    """
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise ToolError(f"tools: expected a list of tools, got {type(tools).__name__}")
    if len(tools) > MAX_TOOLS:
        raise ToolError(f"tools: has {len(tools)} tools; at most {MAX_TOOLS} are accepted")
    read: dict[str, Tool] = {}
    for i, tool in enumerate(tools):
        one = _tool(tool, f"tools[{i}]")
        if one.name in read:
            raise ToolError(f"tools[{i}].function.name: there are two tools named {quote(one.name)}")
        read[one.name] = one
    return tuple(read.values())


def _tool(tool: Any, where: str) -> Tool:
    function = _of_function(tool, where)
    where = f"{where}.function"
    name, description = function.get("name"), function.get("description")
    parameters, strict = function.get("parameters"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ToolError(f"{where}.name is {quote(name)}; expected 1 to 64 letters, digits, underscores and dashes")
    if not isinstance(description, str | None):
        raise ToolError(f"{where}.description: expected a string, got {type(description).__name__}")
    if not isinstance(strict, bool | None):
        raise ToolError(f"{where}.strict is {quote(strict)}; expected true or false")
    if parameters is None:
        parameters = {"properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise ToolError(f"{where}.parameters: expected a JSON schema, got {type(parameters).__name__}")
    if parameters.get("type", "object") != "object":
        raise ToolError(f"{where}.parameters.type is {quote(parameters['type'])}; expected 'object'")
    return Tool(name=name, parameters={"type": "object", **parameters}, strict=bool(strict), where=where)


def read_choice(choice: Any, tools: Sequence[Tool]) -> ToolChoice:
    """Reads the `tool_choice` of a request: none, auto, required, or one function; None is auto.

    Raises:
      ToolError: it is none of these, or a tool that is not there.
    """
    if isinstance(choice, Mapping):
        name = _of_function(choice, "tool_choice").get("name")
        chosen = tuple(tool for tool in tools if tool.name == name)
        if not chosen:
            known = ", ".join(tool.name for tool in tools) or "none"
            raise ToolError(f"tool_choice.function.name: there is no tool {quote(name)}; there are {known}")
        return ToolChoice(mode="required", tools=chosen)
    choice = "auto" if choice is None else choice
    if choice not in ("none", "auto", "required"):
        accepted = "none, auto, required, or a mapping with the name of a function"
        raise ToolError(f"tool_choice is {quote(choice)}; accepted: {accepted}")
    if choice == "required" and not tools:
        raise ToolError("tool_choice: there are no tools to call")
    return ToolChoice(mode=choice if tools else "none", tools=() if choice == "none" else tuple(tools))


def _of_function(value: Any, where: str) -> Mapping[str, Any]:
    """The function of `{"type": "function", "function": {...}}`."""
    if not isinstance(value, Mapping):
        raise ToolError(f"{where}: expected a mapping with type and function, got {type(value).__name__}")
    if value.get("type", "function") != "function":
        raise ToolError(f"{where}.type is {quote(value['type'])}; expected 'function'")
    if not isinstance(value.get("function"), Mapping):
        raise ToolError(f"{where}.function: expected a mapping, got {type(value.get('function')).__name__}")
    return value["function"]


def call_grammar(grammars: Grammars, tools: Sequence[Tool], *, parallel: bool = True) -> Grammar:
    """The grammar of an answer that calls tools with arguments that are valid under their schemas, and says no more.

    Args:
      grammars: of the model.
      tools: those that may be called, at least one.
      parallel: whether there may be several calls.

    Raises:
      ToolError: a tool's parameters cannot be expressed; for tools that are not strict, what cannot is left out.
    """
    functions = [f'"{tool.name}\\", \\"arguments\\": " @arguments_{i}' for i, tool in enumerate(tools)]
    text = f"""
        start: <|tool_call|> "[" call {'(", " call)*' if parallel else ""} "]" <|/tool_call|>
        call: "{{\\"name\\": \\"" ({" | ".join(functions)}) "}}"
    """  # written as the prompt writes earlier calls
    schemas = [
        tool.parameters if tool.strict else {**tool.parameters, "x-guidance": {"lenient": True}} for tool in tools
    ]
    try:
        return grammars.lark(text, {f"arguments_{i}": schema for i, schema in enumerate(schemas)})
    except ValueError as error:
        for tool, schema in zip(tools, schemas, strict=True):  # whose fault it is
            try:
                grammars.json_schema(schema)
            except ValueError as own:
                raise ToolError(f"{tool.where}.parameters: {own}") from None
        raise ToolError(f"tools: {error}") from None
