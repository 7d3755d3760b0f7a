"""What an answer must be like: the grammar of a request, and the tools that it may call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phi4mm_jax.mistralrs.requests import ChatCompletionRequest, CompletionRequest
from phi4mm_jax.serving.tools import Tool, ToolError, read_tools

if TYPE_CHECKING:  # they need llguidance
    from phi4mm_jax.serving.grammar import Grammar, Grammars

GRAMMAR_TYPES = ("regex", "lark", "json_schema", "llguidance")


def read_grammar(
    request: ChatCompletionRequest | CompletionRequest, grammars: Callable[[], Grammars]
) -> Grammar | None:
    """The grammar of a request, if it has one.

    Args:
      request: what is asked.
      grammars: returns the compiler, if there is something to compile.

    Raises:
      ValueError: the grammar or its type is wrong, or one is missing.
    """
    text, kind = request.grammar, request.grammar_type
    if text is None and kind is None:
        return None
    if kind not in GRAMMAR_TYPES:
        raise ValueError(f"grammar_type = {kind!r}: expected {', '.join(GRAMMAR_TYPES)}")
    if not isinstance(text, str):
        raise ValueError(f"grammar: expected a string, as there is a grammar_type, got {type(text).__name__}")
    if request.ignore_eos:
        raise ValueError("ignore_eos: does not go with a grammar, which says when the answer ends")
    try:
        match kind:
            case "regex":
                return grammars().regex(text)
            case "lark":
                return grammars().lark(text)
            case "json_schema":
                return grammars().json_schema(_json(text))
            case "llguidance":
                return grammars().lark(*_lark_with_schemas(_json(text)))
    except ValueError as error:
        raise ValueError(f"grammar: {error}") from None


def _lark_with_schemas(value: Any) -> tuple[str, dict[str, Any]]:
    """The grammar of `{"grammars": [{"lark_grammar": ...}, {"name": ..., "json_schema": ...}, ...]}`."""
    grammars = value.get("grammars") if isinstance(value, Mapping) else None
    first, *named = grammars if isinstance(grammars, list) and grammars else [None]
    if not isinstance(first, Mapping) or set(first) - {"name"} != {"lark_grammar"}:
        raise ValueError('expected {"grammars": [{"lark_grammar": ...}, ...]}')
    for i, schema in enumerate(named, 1):
        if not isinstance(schema, Mapping) or set(schema) != {"name", "json_schema"}:
            raise ValueError(f"grammars[{i}]: expected name and json_schema")
        if not isinstance(schema["name"], str):
            raise ValueError(f"grammars[{i}].name: expected a string")
    return first["lark_grammar"], {schema["name"]: schema["json_schema"] for schema in named}


def read_tool_schemas(schemas: Sequence[str] | None) -> tuple[list[Any], tuple[Tool, ...]]:
    """The tools of a request, as they stand in a prompt, and as they are called.

    Raises:
      ToolError: naming the field.
    """
    if schemas is None:
        return [], ()
    if not isinstance(schemas, Sequence) or isinstance(schemas, (str, bytes)):
        raise ToolError(f"tool_schemas: expected a list of strings of JSON, got {type(schemas).__name__}")
    values = []
    for i, schema in enumerate(schemas):
        try:
            values.append(_json(schema))
        except (TypeError, ValueError):
            raise ToolError(f"tool_schemas[{i}]: expected a string of JSON") from None
    return values, read_tools(values)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
