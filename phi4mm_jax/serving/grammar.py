"""Structured output: grammars that say with which tokens an answer may go on (by llguidance).

A `Grammar` is compiled and checked once; each answer walks through it with a `Constraint` of its own. Text of a grammar
stands for text: a control token is allowed only where a Lark grammar names it, such as `<|tool_call|>`, and one that
ends answers only where the grammar is complete.

Grammars come from anyone. Their size is limited, llguidance bounds the work and the memory of a step, and they are
compiled on a stack that is deep enough for the longest chain of rules that fits the size.
"""

from __future__ import annotations

import functools
import json
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from phi4mm_jax.processing.display import shorten
from phi4mm_jax.processing.tokenizer import Tokenizer

MAX_TEXT = 16_384
"""Most characters of a regular expression or a Lark grammar; the time to compile grows with its square or faster."""
MAX_SIZE = 131_072
"""Most characters of a definition with its JSON schemas, as compact JSON."""
MAX_MULTIPLE = 100_000
"""Most units of the last decimal in the least common multiple of every `multipleOf`; a digit's choice takes 5 us each,
which no limit of llguidance counts."""

_WHITESPACE = r"\x20|\n(\x20{0,32}|\t{0,8})"
"""Between the parts of JSON: what one line and indented lines need, so that a model cannot go on with it forever."""
_LARK = re.compile(r'"(?:\\.|[^"\\\n])*"|(?://|#)[^\n]*|/(?:\\.|[^/\\\n])+/|(?P<json>%json)\s*(?=\{)')
"""What may hold a brace: strings, comments, regular expressions, schemas."""
_STACK = 256 << 20
"""Bytes; a chain of references in MAX_SIZE characters takes 40 MB."""
_AHEAD = 512
"""Characters of forced text that are encoded; the next token is far from their end."""
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)  # 2 kB a state


class GrammarError(ValueError):
    """A grammar is malformed, not supported, or too large, or an answer cannot go on under it."""


class Grammars:
    """Compiles grammars for one model. May be used by any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]):
        """Begins without work; the first grammar takes a second more, to sort the vocabulary.

        Args:
          tokenizer: of the model.
          vocab_size: the model's, which may exceed the tokenizer's; ids without a token are never allowed.
          eos: ids of the tokens that end an answer.
        """
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, list(eos)
        stack = threading.stack_size(_STACK)
        try:
            self._compiler = ThreadPoolExecutor(1, "phi4mm-grammar")
            self._compiler.submit(int)  # starts its thread
        finally:
            threading.stack_size(stack)

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that is valid under a schema (draft 2020-12), with its properties in the schema's order.

        Between its parts there may be a space, or a line break with up to 32 spaces or 8 tabs of indentation. The key
        `x-guidance` of the schema may set llguidance's options, such as `whitespace_flexible`.

        Raises:
          GrammarError: naming what is wrong or not supported.
        """
        return self._compile({"grammars": [{"json_schema": _with_options(schema)}]})

    def regex(self, pattern: str) -> Grammar:
        """Text that matches a regular expression (Rust's syntax, no look-around) from its first to its last character.

        Raises:
          GrammarError: naming what is wrong or not supported.
        """
        escapes = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
        body = re.sub(r"(?s)\\.|/|\n", lambda match: escapes.get(match[0], match[0]), _checked(pattern))
        return self._compile({"grammars": [{"lark_grammar": f"start: /{body}/"}]})

    def lark(self, text: str, schemas: Mapping[str, Mapping[str, Any]] | None = None) -> Grammar:
        """Text of a Lark grammar in llguidance's dialect.

        Args:
          text: with a rule `start`; `<|name|>` is a control token.
          schemas: JSON schemas, to which the grammar refers as `@name`.

        Raises:
          GrammarError: naming what is wrong or not supported.
        """
        body, inline = _inline_schemas(_checked(text))
        named = {**inline, **(schemas or {})}
        grammars = [{"name": name, "json_schema": _with_options(schema)} for name, schema in named.items()]
        controls = [i for name, i in self._tokenizer.control_ids.items() if name in text]
        return self._compile({"grammars": [{"lark_grammar": body}, *grammars]}, controls)

    def _compile(self, definition: Mapping[str, Any], controls: Iterable[int] = ()) -> Grammar:
        try:
            text = json.dumps(definition, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            text.encode()  # which lone surrogates fail
            multiple = _common_multiple([Decimal(str(number)).normalize() for number in _multiples(definition)])
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"cannot be written as JSON ({shorten(error)})") from None
        if len(text) > MAX_SIZE:
            raise GrammarError(f"has {len(text)} characters as JSON; at most {MAX_SIZE} are accepted")
        if multiple > MAX_MULTIPLE:
            raise GrammarError(f"multipleOf: more than {MAX_MULTIPLE} units of the last decimal, all of them together")
        return self._compiler.submit(self._build, text, controls).result()

    # --- the compiler's thread -------------------------------------------------------------------------------

    def _build(self, definition: str, controls: Iterable[int]) -> Grammar:
        vocabulary, plain = self._vocabulary
        allowed = plain.copy()
        for token in controls:
            allowed[token // 32] |= np.uint32(1 << token % 32)
        grammar = Grammar(LLMatcher(vocabulary, definition, log_level=0, limits=_LIMITS), allowed)
        grammar.constraint().mask()  # some errors show here only
        return grammar

    @functools.cached_property
    def _vocabulary(self) -> tuple[LLTokenizer, np.ndarray]:
        """The tokens in llguidance's order, and the mask of those that are text or end answers."""
        tokens = _Tokens(self._tokenizer, self._vocab_size, self._eos)
        bits = np.zeros(-(-self._vocab_size // 32) * 32, np.bool_)
        bits[: self._vocab_size] = [bool(spelling) for spelling in tokens.tokens]
        bits[tokens.special_token_ids] = False
        bits[self._eos] = True
        return LLTokenizer(tokens, eos_token=self._eos), np.packbits(bits, bitorder="little").view("<u4")


class Grammar:
    """A compiled grammar."""

    def __init__(self, matcher: LLMatcher, allowed: np.ndarray):
        """Wraps a matcher at its beginning.

        Args:
          matcher: of llguidance.
          allowed: mask of the tokens that its answers may hold at all.
        """
        self._matcher, self._allowed = matcher, allowed

    def constraint(self) -> Constraint:
        """Begins one answer; takes microseconds."""
        return Constraint(self._matcher.deep_copy(), self._allowed)


class Constraint:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: LLMatcher, allowed: np.ndarray):
        """Begins an answer; see `Grammar`."""
        self._matcher, self._allowed = matcher, allowed

    def mask(self) -> np.ndarray:
        """The tokens that may come next, [ceil(vocab_size / 32)] uint32: bit i of word w allows token 32 w + i.

        Raises:
          GrammarError: there are none, or finding them takes more than a step may.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), "<u4")[: len(self._allowed)] & self._allowed
        self._check()
        if not words.any():
            raise GrammarError("no token of text fits the grammar here")
        return words

    def accept(self, token_id: int) -> None:
        """Takes the token that was drawn.

        Raises:
          GrammarError: it does not fit, or taking it takes more than a step may.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if error := self._matcher.get_error():
            raise GrammarError(_reason(error))


class _Tokens:
    """A tokenizer as llguidance wants it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]):
        self._tokenizer = tokenizer
        self.eos_token_id = eos[0]
        self.special_token_ids = list(tokenizer.control_ids.values())
        self.tokens = [tokenizer.token_bytes(i, skip_special=False) for i in range(vocab_size)]

    def __call__(self, text: str) -> list[int]:
        """Encodes the beginning of text that a grammar forces, so that it is divided as the model is used to.

        A mask needs the next token only, and all of a long text would be encoded again for every one.
        """
        return self._tokenizer.encode(text[:_AHEAD], allow_special=False)


def _checked(text: Any) -> str:
    """Returns a grammar's text if it is one that can be compiled."""
    if not isinstance(text, str):
        raise GrammarError(f"expected a string, got {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise GrammarError(f"has {len(text)} characters; at most {MAX_TEXT} are accepted")
    return text


def _with_options(schema: Any) -> dict[str, Any]:
    """Returns a schema whose white space is bounded, unless it says itself how it is."""
    options = schema.get("x-guidance", {}) if isinstance(schema, Mapping) else None
    if not isinstance(options, Mapping):
        raise GrammarError("expected a JSON schema, which is a mapping, as is its x-guidance")
    bounded = {} if "whitespace_flexible" in options else {"whitespace_pattern": _WHITESPACE}
    return {**schema, "x-guidance": {**bounded, **options}}


def _inline_schemas(text: str) -> tuple[str, dict[str, Any]]:
    """Moves the schemas of `%json {...}` out of a Lark grammar, where they are treated as any others."""
    body, schemas, end = "", {}, 0
    while found := _LARK.search(text, end):
        body, end = body + text[end : found.start()], found.end()
        if found["json"] is None:
            body += found[0]
            continue
        name = f"inline_schema_{len(schemas)}"
        try:
            schemas[name], end = json.JSONDecoder().raw_decode(text, end)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"%json: {shorten(error)}") from None
        body += f"@{name} "
    return body + text[end:], schemas


def _multiples(value: Any) -> Iterator[int | float]:
    """Every `multipleOf` of a definition."""
    if isinstance(value, Mapping):
        number = value.get("multipleOf")
        if isinstance(number, int | float) and not isinstance(number, bool):
            yield number
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _multiples(item)


def _common_multiple(numbers: Sequence[Decimal]) -> int:
    """In units of the last decimal of any."""
    decimals = max((-number.as_tuple().exponent for number in numbers), default=0)
    return math.lcm(*(int(number.scaleb(max(decimals, 0))) for number in numbers))


def _reason(error: str) -> str:
    """The line of llguidance's message that says what is wrong."""
    if error.startswith("NoExtension"):
        return "nothing fits the grammar"
    lines = error.splitlines()
    return shorten(next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: "), 200)
