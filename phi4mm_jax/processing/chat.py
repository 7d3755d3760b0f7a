"""OpenAI-style conversations to the parts of a prompt: text, control tokens and the places of media.

The released chat template, written out (phi4mm-reference, section 6):

    <|role|>content<|end|> ... <|assistant|>

A system message's tools follow its content as `<|tool|>[...]<|/tool|>`, an assistant's tool calls follow its content as
`<|tool_call|>[...]<|/tool_call|>`, and a tool's result is a message of role `tool`, `<|tool|>result<|end|>`, as the
template gives it.

Media stand where their parts stand in a user's message. If the text of that message holds tags such as `<|image_1|>`,
these are the places of its own media of that kind, in order of appearance; as in the original, the numbers choose
nothing, but each may stand only once in a message. Tags of a message without media parts of their kind take the media
that are given beside the conversation, in order. Tags and media must come out even in every message. Nothing else in
text has a meaning: `<|end|>` in a message is five letters and four signs.

A video stands where its part stands and is as many pictures, one beside the other, as it has frames to show. Tags for
pictures in the same message would leave open whose places they are, and are refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from phi4mm_jax.processing.display import quote, shorten
from phi4mm_jax.processing.media import MediaLimits, decode_base64
from phi4mm_jax.processing.prompt import ChatError
from phi4mm_jax.processing.tokenizer import Control

_ROLES = ("system", "user", "assistant", "tool")

Kind = Literal["image", "audio"]
"""What a place can be of."""
TAG = re.compile(r"(<\|(?:image|audio)_\d+\|>)")
"""The place of a medium in text; the group lets `split` keep the tags."""


def tag_kind(tag: str) -> Kind:
    """Returns what stands at a tag."""
    return "image" if tag.startswith("<|image") else "audio"


@dataclasses.dataclass(frozen=True, eq=False)
class Medium:
    """A picture, recording or video of a conversation, not read yet."""

    kind: Literal["image", "audio", "video"]
    """Which of the three."""
    source: Any
    """Whatever `load_image`, `load_audio` or `load_video` takes."""
    where: str
    """Where it stands in the conversation, for error messages."""

    @property
    def place(self) -> Kind:
        """What its place is of: frames of a video are pictures."""
        return "image" if self.kind == "video" else self.kind


@dataclasses.dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation, ready to be encoded. The parts, joined, are the text that the released template gives."""

    parts: list[str]
    """Text and `Control`; a medium's place is the control `<|image_1|>`, `<|audio_1|>`, ..."""
    images: list[Medium]
    """Pictures and videos, in the order of their places; a video has one."""
    audios: list[Medium]
    """In the order of their places."""


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: str | Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    media: Sequence[Medium] = (),
    limits: MediaLimits | None = None,
) -> Rendered:
    """Renders a conversation.

    Args:
      messages: mappings with `role` (system, user, assistant, tool) and `content`, a string or a list of parts.
      tools: tools of the whole conversation, as JSON or as a list; they go to the system message.
      add_generation_prompt: end with the opening of the assistant's answer; otherwise with the end of text.
      media: media from beside the conversation, for the tags of messages that have no media parts of their kind.
      limits: on the base64 of `input_audio` parts.

    Raises:
      ChatError: the conversation is malformed; the message names the place, such as `messages[0].content[1].image_url`.
      MediaError: an `input_audio` part is not base64 or too large.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatError(f"messages: expected a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ChatError("messages: the list is empty")
    given = {kind: deque(m for m in media if m.kind == kind) for kind in get_args(Kind)}
    placed: dict[Kind, list[Medium]] = {kind: [] for kind in given}
    pieces: list[_Piece] = []
    for where, message in _with_tools([(f"messages[{i}]", message) for i, message in enumerate(messages)], tools):
        own = list(_message(message, where, limits or MediaLimits()))
        for kind in given:
            own, bound = _bind(own, kind, where, given[kind])
            placed[kind] += bound
        pieces += own
    for kind, left in given.items():
        if left:
            raise ChatError(f"{left[0].where}: no place for this {kind}; write <|{kind}_1|> into a user message")
    pieces.append(Control("<|assistant|>" if add_generation_prompt else "<|endoftext|>"))
    return Rendered(_parts(pieces, placed), placed["image"], placed["audio"])


# --- messages to pieces --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tag:
    """A tag in a user's text."""

    text: str
    where: str

    @property
    def kind(self) -> Kind:
        return tag_kind(self.text)


_Piece = str | Medium | _Tag
"""What a message consists of; a string is text or a `Control`."""


def _with_tools(
    messages: list[tuple[str, Mapping[str, Any]]], tools: str | Sequence[Mapping[str, Any]] | None
) -> list[tuple[str, Mapping[str, Any]]]:
    """Puts the conversation's tools into the first system message, or a new one at the beginning."""
    if tools is None or (isinstance(tools, Sequence) and not tools):
        return messages
    tools = _tools_json(tools, "tools")
    for i, (where, message) in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "system":
            if message.get("tools") is not None:
                raise ChatError(f"{where}.tools: tools are given twice, here and for the whole conversation")
            return [*messages[:i], (where, {**message, "tools": tools}), *messages[i + 1 :]]
    return [("tools", {"role": "system", "content": "", "tools": tools}), *messages]


def _message(message: Any, where: str, limits: MediaLimits) -> Iterator[_Piece]:
    if not isinstance(message, Mapping):
        raise ChatError(f"{where}: expected a mapping with role and content, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ChatError(f"{where}.role is {quote(role)}; accepted: {', '.join(_ROLES)}")
    tools, calls = message.get("tools"), message.get("tool_calls")
    if tools is not None and role != "system":
        raise ChatError(f"{where}.tools: only a system message may hold tools")
    if calls and role != "assistant":
        raise ChatError(f"{where}.tool_calls: only an assistant message may hold tool calls")
    yield Control(f"<|{role}|>")
    yield from _content(message, role, where, limits)
    if tools is not None:
        yield from (Control("<|tool|>"), _tools_json(tools, f"{where}.tools"), Control("<|/tool|>"))
    if calls:
        yield from (Control("<|tool_call|>"), _calls_json(calls, f"{where}.tool_calls"), Control("<|/tool_call|>"))
    yield Control("<|end|>")


def _content(message: Mapping[str, Any], role: str, where: str, limits: MediaLimits) -> Iterator[_Piece]:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    where = f"{where}.content"
    if isinstance(content, str):
        yield from _text(content, role, where)
    elif isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)):
        for j, part in enumerate(content):
            yield from _part(part, role, f"{where}[{j}]", limits)
    else:
        raise ChatError(f"{where}: expected a string or a list of parts, got {_kind_of(content)}")


def _text(text: str, role: str, where: str) -> Iterator[_Piece]:
    if role != "user":
        yield text
        return
    for i, piece in enumerate(TAG.split(text)):  # the odd pieces are the tags
        yield _Tag(piece, where) if i % 2 else piece


def _part(part: Any, role: str, where: str, limits: MediaLimits) -> Iterator[_Piece]:
    if not isinstance(part, Mapping):
        raise ChatError(f"{where}: expected a mapping with a type, got {type(part).__name__}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PART_TYPES:
        raise ChatError(f"{where}.type is {quote(kind)}; accepted: {', '.join(_PART_TYPES)}")
    if part.get(kind) is None:
        raise ChatError(f"{where}: a part of type {kind} needs the key {kind!r}")
    value, where = part[kind], f"{where}.{kind}"
    if kind == "text":
        yield from _text(_string(value, where), role, where)
    elif role != "user":
        raise ChatError(f"{where}: media belong in user messages, not in those of role {role}")
    else:
        medium, source_of = _PART_TYPES[kind]
        source = source_of(value, where, limits)
        if isinstance(value, Mapping) and kind in _KEYS:
            where = f"{where}.{_KEYS[kind]}"
        yield Medium(medium, source, where)


def _url(value: Any, where: str, limits: MediaLimits) -> str:
    if isinstance(value, Mapping):
        if "url" not in value:
            raise ChatError(f"{where}: needs the key 'url'")
        value, where = value["url"], f"{where}.url"
    return _string(value, where)


def _input_audio(value: Any, where: str, limits: MediaLimits) -> bytes | str:
    """Returns the bytes; the declared format is not needed, the content tells."""
    if not isinstance(value, Mapping) or "data" not in value:
        raise ChatError(f"{where}: expected a mapping with the key 'data' holding base64")
    data = _string(value["data"], f"{where}.data")
    return data if data.startswith("data:") else decode_base64(data, limits, f"{where}.data")


def _as_it_is(value: Any, where: str, limits: MediaLimits) -> Any:
    return value


_PART_TYPES = {
    "text": None,
    "image_url": ("image", _url),
    "audio_url": ("audio", _url),
    "video_url": ("video", _url),
    "input_audio": ("audio", _input_audio),
    "image": ("image", _as_it_is),
    "audio": ("audio", _as_it_is),
    "video": ("video", _as_it_is),
}
"""What each type of part holds, and how its source is found."""
_KEYS = {"image_url": "url", "audio_url": "url", "video_url": "url", "input_audio": "data"}
"""Where it lies in a part that is a mapping."""


def _tools_json(tools: Any, where: str) -> str:
    """Returns tools as the text that the model knows: plain function descriptions, without OpenAI's wrapping."""
    if isinstance(tools, str):
        return tools
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ChatError(f"{where}: expected a list of function descriptions, or one as a JSON string")
    return _json([tool.get("function", tool) for tool in tools], where)


def _calls_json(calls: Any, where: str) -> str:
    """Returns tool calls as the model writes them, `[{"name": ..., "arguments": {...}}]`."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ChatError(f"{where}: expected a list of calls, got {type(calls).__name__}")
    plain = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(f"{where}[{i}]: expected a mapping with function.name and function.arguments")
        arguments = function.get("arguments", {})
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            raise ChatError(f"{where}[{i}].function.arguments: not valid JSON") from None
        plain.append({"name": function["name"], "arguments": arguments})
    return _json(plain, where)


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{where}: cannot be written as JSON ({shorten(error)})") from None


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ChatError(f"{where}: expected a string, got {_kind_of(value)}")
    return value


def _kind_of(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


# --- pieces to parts and media -------------------------------------------------------------------------------


def _bind(pieces: list[_Piece], kind: Kind, where: str, given: deque[Medium]) -> tuple[list[_Piece], list[Medium]]:
    """Finds the media of one kind for the places of a message.

    Args:
      pieces: the message.
      kind: of media.
      where: the message's name.
      given: media from beside the conversation; those that are used are taken off.

    Returns:
      The message without the parts whose media go to tags, and the media in the order of their places.
    """
    tags = [p for p in pieces if isinstance(p, _Tag) and p.kind == kind]
    own = [p for p in pieces if isinstance(p, Medium) and p.place == kind]
    if not tags:
        return pieces, own
    if videos := [p for p in own if p.kind == "video"]:
        raise ChatError(f"{videos[0].where}: a message with a video has no {kind} tags, but {tags[0].where} has one")
    last = {tag.text: tag for tag in tags}
    if twice := [tag for tag in tags if last[tag.text] is not tag]:
        tag = last[twice[0].text]
        raise ChatError(f"{tag.where}: {tag.text} stands twice; number the {kind} tags of a message 1, 2, ...")
    counts = f"{where} has {len(tags)} {kind} tag(s) and {len(own)} {kind} part(s)"
    if len(own) > len(tags):
        raise ChatError(f"{own[len(tags)].where}: no tag for this {kind}; {counts}")
    media = own or [given.popleft() for _ in tags[: len(given)]]
    if len(media) < len(tags):
        raise ChatError(f"{tags[len(media)].where}: {tags[len(media)].text} has no {kind}; {counts}")
    return [p for p in pieces if not (isinstance(p, Medium) and p.place == kind)], media


def _parts(pieces: list[_Piece], media: Mapping[Kind, list[Medium]]) -> list[str]:
    """Writes media and tags as control tokens, and joins neighbouring text."""
    names = {m: Control(f"<|{kind}_{i}|>") for kind, placed in media.items() for i, m in enumerate(placed, 1)}
    parts: list[str] = []
    for is_text, run in itertools.groupby(pieces, lambda piece: type(piece) is str):
        if is_text:
            parts.append("".join(run))
        else:
            parts += [Control(p.text) if isinstance(p, _Tag) else names.get(p, p) for p in run]
    return [part for part in parts if part]
