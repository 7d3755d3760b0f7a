"""Text to token ids and back (phi4mm-reference, section 6).

Control tokens such as `<|end|>` are kept apart from text: the byte-pair encoder below knows none of them, so text that
spells one is encoded letter by letter. A control token is written only where a `Control` asks for it.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import tokenizers

from phi4mm_jax.processing.display import quote, shorten
from phi4mm_jax.processing.prompt import PromptError, TooLongError

# Unicode's White_Space, which Python's \s exceeds by U+001C to U+001F
_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_UNSUPPORTED = ("lstrip", "single_word", "normalized")
"""Properties that no control token of the released tokenizer has."""
_BLOCK = 1 << 14
"""Characters that are counted at once, of text that is likely to be too long."""
_CUT = 32
"""Tokens by which the count of a block may exceed its share of the whole text."""
_LEADING_SPACE = re.compile(f"^[{_SPACES}]+")


class Control(str):
    """The name of a control token, as opposed to text that spells the same."""

    __slots__ = ()


class Tokenizer:
    """The byte-level BPE of a checkpoint."""

    def __init__(self, definition: str, name: str = "tokenizer.json") -> None:
        """Builds the tokenizer.

        Args:
          definition: content of a `tokenizer.json` with a ByteLevel decoder.
          name: where it comes from, for error messages.

        Raises:
          PromptError: it is not such a file, or has a control token of a kind that is not supported.
        """
        try:
            data = json.loads(definition)
            added = _added_tokens(data)
            self._bpe = tokenizers.Tokenizer.from_str(json.dumps(data | {"added_tokens": []}, ensure_ascii=False))
        except Exception as error:  # the tokenizers package raises bare Exceptions
            raise PromptError(f"{name}: not a usable tokenizer ({shorten(error, 200)})") from None
        self.control_ids: dict[str, int] = {t["content"]: t["id"] for t in added}
        self._control_names = {i: name for name, i in self.control_ids.items()}
        self._swallows_space = {t["content"] for t in added if t["rstrip"]}
        self._special_ids = frozenset(t["id"] for t in added if t["special"])
        names = sorted(self.control_ids, key=len, reverse=True)  # the longest that matches wins
        self._control_pattern = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
        self._byte_of = {letter: byte for byte, letter in _byte_alphabet().items()}

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> Self:
        """Reads `tokenizer.json` of a checkpoint directory."""
        path = Path(directory) / "tokenizer.json"
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise PromptError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise PromptError(f"{path}: is not UTF-8 text") from None

    def encode(self, text: str, *, allow_special: bool, most: int | None = None) -> list[int]:
        """Encodes text; with `allow_special`, control tokens that it spells become control tokens.

        Raises:
          TooLongError: see `encode_parts`.
        """
        live = allow_special and self._control_pattern is not None
        pieces = self._control_pattern.split(text) if live else [text]  # the odd ones are control tokens
        return self.encode_parts((Control(piece) if i % 2 else piece for i, piece in enumerate(pieces)), most)

    def encode_parts(self, parts: Iterable[str], most: int | None = None) -> list[int]:
        """Encodes text and `Control` parts in a row.

        Parts are encoded apart from each other, so join text that belongs together. Some control tokens swallow the
        white space that follows them.

        Args:
          parts: in a row.
          most: tokens that there may be; of more, not much is encoded.

        Raises:
          PromptError: a control token that this tokenizer does not have.
          TooLongError: there are more than `most`.
        """
        ids: list[int] = []
        swallow = False
        for part in parts:
            if isinstance(part, Control):
                if part not in self.control_ids:
                    raise PromptError(f"this tokenizer has no control token {str(part)}")
                ids.append(self.control_ids[part])
                swallow = part in self._swallows_space
            elif text := _LEADING_SPACE.sub("", part) if swallow else part:
                ids += self._encode_text(text, most)
                swallow = False
            if most is not None and len(ids) > most:
                raise _too_long(most)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decodes ids; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing.

        Args:
          ids: token ids.
          skip_special: leave out control tokens that are flagged special. Those of tool calls are not, and stay.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """Starts decoding one token at a time."""
        return TextStream(self, skip_special)

    def token_name(self, token_id: int) -> str | None:
        """Returns a token as the vocabulary spells it, or None if there is none."""
        return self._control_names.get(token_id) or self._bpe.id_to_token(token_id)

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """Returns what a token adds to the text."""
        if skip_special and token_id in self._special_ids:
            return b""
        name = self.token_name(token_id) or ""
        try:
            return bytes([self._byte_of[letter] for letter in name])
        except KeyError:  # not a piece of the byte-level alphabet
            return name.encode()

    def _encode_text(self, text: str, most: int | None = None) -> list[int]:
        if most is not None and len(text) > 4 * most:
            self._check_length(text, most)
        try:
            return self._bpe.encode_batch([text])[0].ids  # `encode` would stop all other threads meanwhile
        except TypeError:  # what the package says to a string that UTF-8 cannot hold
            raise PromptError("text holds lone surrogates, which are not Unicode characters") from None

    def _check_length(self, text: str, most: int) -> None:
        """Raises a TooLongError as soon as the beginning of a text has too many tokens."""
        count = 0
        for start in range(0, len(text), _BLOCK):
            count += len(self._encode_text(text[start : start + _BLOCK])) - _CUT
            if count > most:
                raise _too_long(most)


def _too_long(most: int) -> TooLongError:
    return TooLongError(f"prompt: takes more than the {most} tokens that there may be")


def _added_tokens(data: Any) -> list[dict[str, Any]]:
    """Returns the control tokens of a tokenizer.json; a ValueError says what is wrong with one."""
    if not isinstance(data, dict) or not isinstance(data.get("added_tokens"), list):
        raise ValueError("added_tokens: expected a list")
    fields = {"content": str, "id": int, **dict.fromkeys(("special", "rstrip", *_UNSUPPORTED), bool)}
    for i, token in enumerate(data["added_tokens"]):
        if not isinstance(token, dict):
            raise ValueError(f"added_tokens[{i}]: expected an object, got {quote(token)}")
        for field, kind in fields.items():
            if type(token.get(field)) is not kind:
                raise ValueError(f"added_tokens[{i}].{field}: expected {kind.__name__}, got {quote(token.get(field))}")
        for field in _UNSUPPORTED:
            if token[field]:
                raise ValueError(f"added_tokens[{i}].{field}: is not supported")
    return data["added_tokens"]


class TextStream:
    """Decodes token by token; a character is given out when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        """Starts at the beginning of a text."""
        self._token_bytes = functools.partial(tokenizer.token_bytes, skip_special=skip_special)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is now complete."""
        return self._decoder.decode(self._token_bytes(int(token_id)))

    def finish(self) -> str:
        """Ends the text; returns U+FFFD for a character that was left incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)


@functools.cache
def _byte_alphabet() -> dict[int, str]:
    """GPT-2's letter for each byte: itself if it is printable Latin-1, else one from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
