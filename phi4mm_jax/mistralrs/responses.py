"""What comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import Enum
from typing import Any, Self

from phi4mm_jax import answer
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.runtime.rows import TokenLogprob


@dataclasses.dataclass
class PromptTokensDetails:
    """What became of the prompt."""

    cached_tokens: int
    """Tokens that earlier requests had left in the cache."""


@dataclasses.dataclass
class Usage:
    """What an answer cost; with several choices, all of them together."""

    completion_tokens: int
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None
    avg_tok_per_sec: float
    avg_prompt_tok_per_sec: float
    avg_compl_tok_per_sec: float
    total_time_sec: float
    """From the call to the last token."""
    total_prompt_time_sec: float
    """From when there was room for the prompt to the first token."""
    total_completion_time_sec: float
    """From the first token to the last."""

    @classmethod
    def of(cls, choices: Sequence[answer.Usage]) -> Self:
        """The usage of an answer's choices, which have one prompt."""
        prompt, completion = choices[0].prompt_tokens, sum(usage.completion_tokens for usage in choices)
        cached = choices[0].cached_tokens
        total_time = max(usage.seconds for usage in choices)
        prompt_speed = choices[0].prefill_tokens_per_second
        completion_time = max(usage.seconds - usage.time_to_first_token for usage in choices)
        return cls(
            completion_tokens=completion,
            prompt_tokens=prompt,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached) if cached else None,
            avg_tok_per_sec=_ratio(prompt + completion, total_time),
            avg_prompt_tok_per_sec=prompt_speed,
            avg_compl_tok_per_sec=_ratio(completion, completion_time),
            total_time_sec=total_time,
            total_prompt_time_sec=_ratio(prompt, prompt_speed),
            total_completion_time_sec=completion_time,
        )


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


class ToolCallType(Enum):
    """What a call is of."""

    Function = "function"


@dataclasses.dataclass
class CalledFunction:
    """A function's name, and its arguments as JSON."""

    name: str
    arguments: str


@dataclasses.dataclass
class ToolCallResponse:
    """A call that the model wants made."""

    index: int
    id: str
    tp: ToolCallType
    function: CalledFunction


@dataclasses.dataclass
class TopLogprob:
    """A token that could have been drawn."""

    token: int
    logprob: float
    bytes: str | None
    """Its text."""


@dataclasses.dataclass
class ResponseLogprob:
    """The token that was drawn."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]

    @classmethod
    def of(cls, entry: TokenLogprob, tokenizer: Tokenizer) -> Self:
        """Spells the tokens of an entry."""

        def spelled(token: int) -> bytes:
            return tokenizer.token_bytes(token, skip_special=False)

        def text(token: int) -> str:
            return spelled(token).decode("utf-8", "replace")

        top = [TopLogprob(token, logprob, text(token)) for token, logprob in entry.top]
        return cls(text(entry.token_id), entry.logprob, list(spelled(entry.token_id)), top)


@dataclasses.dataclass
class Logprobs:
    """One entry per token."""

    content: list[ResponseLogprob] | None


@dataclasses.dataclass
class ResponseMessage:
    """An answer."""

    content: str | None
    role: str
    tool_calls: list[ToolCallResponse] | None
    reasoning_content: str | None = None


@dataclasses.dataclass
class Choice:
    """One of the answers."""

    finish_reason: str
    """"stop", "length" or "tool_calls"."""
    index: int
    message: ResponseMessage
    logprobs: Logprobs | None = None


@dataclasses.dataclass
class ChatCompletionResponse:
    """The answers to a conversation."""

    id: str
    choices: list[Choice]
    created: int
    model: str
    system_fingerprint: str
    object: str
    usage: Usage
    adapter_generation: str | None = None
    agentic_tool_calls: list[Any] | None = None
    files: list[Any] | None = None
    session_id: str | None = None


@dataclasses.dataclass
class Delta:
    """The next part of an answer."""

    content: str | None
    role: str
    tool_calls: list[ToolCallResponse] | None = None
    reasoning_content: str | None = None


@dataclasses.dataclass
class ChunkChoice:
    """The next part of one of the answers."""

    finish_reason: str | None
    index: int
    delta: Delta
    logprobs: ResponseLogprob | None


@dataclasses.dataclass
class ChatCompletionChunkResponse:
    """The next part of the answers to a conversation."""

    id: str
    choices: list[ChunkChoice]
    created: int
    model: str
    system_fingerprint: str
    object: str
    usage: Usage | None = None
    """On the last."""
    adapter_generation: str | None = None
    session_id: str | None = None


@dataclasses.dataclass
class CompletionChoice:
    """One of the continuations."""

    finish_reason: str
    index: int
    text: str
    logprobs: Logprobs | None = None


@dataclasses.dataclass
class CompletionResponse:
    """The continuations of a raw prompt."""

    id: str
    choices: list[CompletionChoice]
    created: int
    model: str
    system_fingerprint: str
    object: str
    usage: Usage
    adapter_generation: str | None = None
