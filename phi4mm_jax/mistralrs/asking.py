"""Requests of mistral.rs as this project's: the conversation, how each choice is drawn, and what is submitted."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from phi4mm_jax.api import Phi4MM
from phi4mm_jax.mistralrs.requests import ChatCompletionRequest, CompletionRequest
from phi4mm_jax.processing.chat import TAG, Kind, tag_kind
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.limits import RequestError, answer_limit, check_length
from phi4mm_jax.runtime.sampling import SamplingError, SamplingParams
from phi4mm_jax.service import Request

if TYPE_CHECKING:
    from phi4mm_jax.serving.grammar import Grammar

Message = Mapping[str, Any]
AnyRequest = ChatCompletionRequest | CompletionRequest
_SAME_NAME = (
    *("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "max_tokens"),
)


def conversation(messages: Sequence[Message] | str) -> Sequence[Message]:
    """The messages of a request; a string is a user's message.

    Where a message does not say with tags where its media stand, they stand before its text, pictures before
    recordings, as mistral.rs has it and the model was trained.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        return messages  # whoever reads it says what is wrong
    return [_with_tags(message) if isinstance(message, Mapping) else message for message in messages]


def _with_tags(message: Message) -> Message:
    """The message with a tag for each medium of a kind that its text has no tag of."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)) or not all(isinstance(part, Mapping) for part in content):
        return message
    given = {tag_kind(tag) for part in content for tag in TAG.findall(str(part.get("text")))}
    tags = ""
    for kind in (kind for kind in get_args(Kind) if kind not in given):
        media = [part for part in content if kind in str(part.get("type"))]
        tags += "".join(f"<|{kind}_{i + 1}|>" for i in range(len(media)))
    if not tags:
        return message
    first = next((i for i, part in enumerate(content) if isinstance(part.get("text"), str)), len(content))
    text = content[first]["text"] if first < len(content) else ""
    return {**message, "content": [*content[:first], {"type": "text", "text": tags + text}, *content[first + 1 :]]}


def how_to_draw(request: AnyRequest, logprobs: int | None, seeds: random.Random | None) -> list[SamplingParams]:
    """How each choice is drawn.

    Args:
      request: what is asked.
      logprobs: alternatives to report per token, None for no report.
      seeds: source of the choices' seeds, None for fresh ones.

    Raises:
      SamplingError: a setting is out of range.
    """
    given = {name: getattr(request, name) for name in _SAME_NAME} | {"stop": request.stop_seqs}
    settings = {"temperature": 1.0} | {name: value for name, value in given.items() if value is not None}
    settings |= {"logprobs": logprobs, "ignore_eos": request.ignore_eos}
    choices = range(at_least(1, "n_choices", request.n_choices))
    return [SamplingParams(seed=seeds.getrandbits(63) if seeds else None, **settings) for _ in choices]


def at_least(least: int, name: str, value: Any) -> int:
    """Checks a number of things.

    Raises:
      SamplingError: it is none, or less.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SamplingError(f"{name} = {value!r}: expected an integer of at least {least}")
    return value


def to_answer(
    model: Phi4MM, prompt: Prompt, request: AnyRequest, choices: Sequence[SamplingParams], grammar: Grammar | None
) -> list[Request]:
    """One request per choice, once they are known to fit the context.

    Raises:
      RequestError, SamplingError: they do not.
    """
    if request.truncate_sequence:
        prompt = _truncated(prompt, check_length(model.steps, 1), request.max_tokens or 1)
    for params in choices:
        answer_limit(model.steps, prompt, params)
    streaming = isinstance(request, ChatCompletionRequest) and request.stream
    return [
        Request(prompt=prompt, params=params, constraint=grammar and grammar.constraint(), streaming=streaming)
        for params in choices
    ]


def _truncated(prompt: Prompt, limit: int, max_tokens: int) -> Prompt:
    """The end of a prompt that leaves room for an answer."""
    excess = len(prompt.token_ids) + max_tokens - limit
    if excess <= 0:
        return prompt
    if prompt.images or prompt.audios:
        raise RequestError(f"truncate_sequence: the prompt is {excess} tokens too long and has media, which stay whole")
    return dataclasses.replace(prompt, token_ids=prompt.token_ids[excess:])
