"""What an answer must be like: the fields of a request that constrain it, and the tools that it may call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from phi4mm_jax.serving.errors import refuse
from phi4mm_jax.serving.grammar import Grammar, GrammarError, Grammars
from phi4mm_jax.serving.schemas import AnswerFields, ChatFields
from phi4mm_jax.serving.tools import Tool, call_grammar, read_choice, read_tools


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """What is asked of an answer."""

    grammar: Grammar | None = None
    """What its tokens must follow."""
    tools: Sequence[Tool] = ()
    """What it may call."""
    descriptions: Sequence[Mapping[str, Any]] | None = None
    """The tools as the prompt shows them."""


def read_structure(fields: ChatFields, grammars: Grammars) -> Structure:
    """Reads what a chat completion asks for; compiling a grammar may take seconds.

    Raises:
      ApiError, ToolError: naming the field.
    """
    tools = read_tools(fields.tools)
    choice = read_choice(fields.tool_choice, tools)
    formatted = fields.response_format is not None and fields.response_format.type != "text"
    if formatted + (fields.grammar is not None) + bool(choice.tools) > 1:
        name = "response_format" if formatted else "grammar"
        raise refuse(name, "only one of response_format, grammar and tools can shape an answer (tool_choice: none)")
    if not choice.tools:
        return Structure(grammar=_format(fields, grammars) if formatted else read_grammar(fields, grammars))
    grammar = None
    if choice.mode == "required":
        _check_alone(fields, "tool_choice")
        grammar = call_grammar(grammars, choice.tools, parallel=fields.parallel_tool_calls)
    return Structure(grammar=grammar, tools=choice.tools, descriptions=fields.tools)


def read_grammar(fields: AnswerFields, grammars: Grammars) -> Grammar | None:
    """Compiles the `grammar` of a request, if there is one.

    Raises:
      ApiError: it is malformed.
    """
    if fields.grammar is None:
        return None
    _check_alone(fields, "grammar")
    compile_grammar = {"regex": grammars.regex, "lark": grammars.lark, "json_schema": grammars.json_schema}
    try:
        return compile_grammar[fields.grammar.type](fields.grammar.value)
    except GrammarError as error:
        raise refuse("grammar.value", str(error)) from None


def _format(fields: ChatFields, grammars: Grammars) -> Grammar:
    _check_alone(fields, "response_format")
    wanted = fields.response_format
    if wanted.type == "json_object":
        return grammars.json_object()
    if wanted.json_schema is None:
        raise refuse("response_format.json_schema", "is missing")
    schema, options = wanted.json_schema.definition, {} if wanted.json_schema.strict else {"lenient": True}
    try:
        return grammars.json_schema({"x-guidance": options, **schema})
    except GrammarError as error:
        raise refuse("response_format.json_schema.schema", str(error)) from None


def _check_alone(fields: AnswerFields, name: str) -> None:
    """A grammar alone says when an answer may end."""
    for other in ("min_tokens", "ignore_eos"):
        if getattr(fields, other):
            raise refuse(other, f"does not go with {name}, which says when the answer ends")
