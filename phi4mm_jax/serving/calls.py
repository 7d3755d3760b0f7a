"""Takes an answer apart: its text, and the calls of tools among it.

The model calls tools by `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>`, where the two are control
tokens; text that merely spells them is text. Between them there may also be a single call, or several without a list,
the end may be missing, and arguments may be named parameters. An answer may also begin with calls of known tools
without control tokens, with or without `functools` before them, as Phi-4-mini writes them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serving.tools import Tool

_BETWEEN = " \t\r\n,[]"
"""What may stand around the calls of a list."""
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""A call up to its arguments, as it is usually written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallDelta:
    """The next part of a call."""

    index: int
    """Which call of the answer."""
    id: str | None
    """Made up; None but on a call's first part."""
    name: str | None
    """Of the function; None but on a call's first part."""
    arguments: str
    """The next characters of the arguments, which are JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """The next part of an answer."""

    content: str
    """Text, without the markup of calls."""
    calls: tuple[CallDelta, ...]
    """In order, each call at most once."""


def parse_answer(tokenizer: Tokenizer, tools: Iterable[Tool], text: str, token_ids: Sequence[int]) -> Delta:
    """Takes a whole answer apart, as an `AnswerParser` does; every call is whole."""
    return AnswerParser(tokenizer, tools).push(text, token_ids, last=True)


class AnswerParser:
    """Takes an answer apart as it comes.

    A call has begun when its name and the brace that opens its arguments have come; from there on its arguments are
    handed on as they are, and stay incomplete if the answer ends among them. What turns out to be no call before that
    is given back as content.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Iterable[Tool]):
        """Begins an answer.

        Args:
          tokenizer: of the model.
          tools: those whose calls are found without control tokens, too.
        """
        self._controls = _Controls(tokenizer)
        self._openings = [  # white space aside
            f'{prefix}{bracket}{{"name":"{tool.name}","{key}":{{'
            for tool in tools
            for prefix in ("", "functools")
            for bracket in ("", "[")
            for key in ("arguments", "parameters")
        ]
        self._read = self._read_opening
        self._held = ""  # text of which it cannot be told yet what it is
        self._brackets, self._scanned = _Brackets(), 0
        self._content = ""
        self._calls: list[CallDelta] = []
        self._count = 0
        self._listing = False  # whether a call of the present list has been read

    def push(self, text: str, token_ids: Sequence[int], *, last: bool = False) -> Delta:
        """Takes the next piece of the answer.

        Args:
          text: of the piece, which may lag behind its tokens.
          token_ids: of the piece.
          last: whether the answer ends with it.
        """
        for part, is_control in self._controls.split(text, token_ids):
            if is_control:
                self._give_up()
                self._read = self._read_between if part == "<|tool_call|>" else self._read_content
                self._listing = False
            else:
                self._held += part
                while self._held and self._read():
                    pass
        if last:
            self._give_up()
        delta = Delta(content=self._content, calls=tuple(self._calls))
        self._content, self._calls = "", []
        return delta

    # --- readers: each takes what it can of the held text, and tells whether the next may go on with the rest ---

    def _read_opening(self) -> bool:
        """At the beginning, where calls may stand without control tokens."""
        begun = "".join(self._held.split())
        if any(opening.startswith(begun) for opening in self._openings):
            return False
        is_call = any(begun.startswith(opening) for opening in self._openings)
        self._read = self._read_between if is_call else self._read_content
        return True

    def _read_content(self) -> bool:
        self._give_up()
        return False

    def _read_between(self) -> bool:
        """Before, between and after the calls of a list."""
        rest = self._held.lstrip(_BETWEEN)
        if not self._listing:
            rest = rest.removeprefix("functools").lstrip(_BETWEEN)
            if "functools".startswith(rest):
                return False
        if not rest:
            self._held = ""
            return False
        if self._listing:
            self._held = rest
        self._read = self._read_call if rest.startswith("{") else self._read_content
        self._brackets, self._scanned = _Brackets(), len(self._held) - len(rest)
        return True

    def _read_call(self) -> bool:
        """A call whose arguments have not begun."""
        start = self._held.index("{")  # what is before it is given back, too, if this is no call
        if head := _HEAD.match(self._held, start):
            name = _decoded(head[1])
            if name is None:
                return self._fail()
            self._begin(name, "")
            self._held = self._held[head.end() :]
            self._brackets, self._read = _Brackets(), self._read_arguments
            return True
        end = self._brackets.read(self._held, self._scanned)
        if end is None:
            self._scanned = len(self._held)
            return False
        call = _call_of(_decoded(self._held[start:end]))
        if call is None:
            return self._fail()
        self._begin(*call)
        self._held = self._held[end:]
        self._read = self._read_between
        return True

    def _read_arguments(self) -> bool:
        end = self._brackets.read(self._held)
        part, self._held = self._held[:end], "" if end is None else self._held[end:]
        if self._calls and self._calls[-1].index == self._count - 1:
            begun = self._calls.pop()
            self._calls.append(dataclasses.replace(begun, arguments=begun.arguments + part))
        else:
            self._calls.append(CallDelta(index=self._count - 1, id=None, name=None, arguments=part))
        if end is not None:
            self._brackets, self._read = _Brackets(depth=1), self._read_end
        return end is not None

    def _read_end(self) -> bool:
        """After the arguments, to the brace that closes the call."""
        end = self._brackets.read(self._held)
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._read = self._read_between
        return end is not None

    def _begin(self, name: str, arguments: str) -> None:
        call_id = f"call_{secrets.token_hex(12)}"
        self._calls.append(CallDelta(index=self._count, id=call_id, name=name, arguments=arguments))
        self._count += 1
        self._listing = True

    def _fail(self) -> bool:
        """What looked like a call is content, and so is what follows."""
        self._read = self._read_content
        return True

    def _give_up(self) -> None:
        """Whatever is held is content, but for a list without calls."""
        if self._read != self._read_between or self._held.strip(_BETWEEN):
            self._content += self._held
        self._held = ""


class _Brackets:
    """Follows brackets through JSON."""

    def __init__(self, depth: int = 0):
        """Begins so many brackets deep."""
        self._depth, self._in_string, self._escaped = depth, False, False

    def read(self, text: str, start: int = 0) -> int | None:
        """Goes on with `text[start:]`; returns the position behind the outermost bracket if it closes."""
        for i in range(start, len(text)):
            character = text[i]
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None


class _Controls:
    """Tells the control tokens in an answer's text from text that spells them."""

    def __init__(self, tokenizer: Tokenizer):
        """Begins an answer."""
        self._stream = tokenizer.stream()
        self._names = {i: name for name, i in tokenizer.control_ids.items() if tokenizer.token_bytes(i)}
        self._decoded = 0  # characters that the tokens so far are
        self._given = 0  # characters that have been given out
        self._ahead: deque[tuple[int, str]] = deque()  # where control tokens begin
        self._held = ""  # the beginning of one

    def split(self, text: str, token_ids: Iterable[int]) -> Iterator[tuple[str, bool]]:
        """Yields the parts of text that has come, and whether each is a control token."""
        for token in token_ids:
            self._decoded += len(self._stream.push(token))
            if name := self._names.get(token):
                self._ahead.append((self._decoded - len(name), name))
        text = self._held + text
        while text:
            start, name = self._ahead[0] if self._ahead else (self._given + len(text), "")
            before = start - self._given
            if not before and len(text) < len(name):
                break
            part = text[: before or len(name)]
            if not before:
                self._ahead.popleft()
            yield part, not before
            self._given += len(part)
            text = text[len(part) :]
        self._held = text


def _decoded(text: str) -> Any:
    """The value that JSON stands for, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call_of(value: Any) -> tuple[str, str] | None:
    """Name and arguments of a call that is written in one of the ways there are."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        return None
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _decoded(arguments)
        if arguments is None:
            return None
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)
