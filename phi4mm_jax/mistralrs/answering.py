"""Answers of this project as mistral.rs' responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from phi4mm_jax.answer import Output, Piece
from phi4mm_jax.api import Phi4MM
from phi4mm_jax.mistralrs.requests import CompletionRequest
from phi4mm_jax.mistralrs.responses import (
    ChatCompletionChunkResponse,
    ChatCompletionResponse,
    Choice,
    ChunkChoice,
    CompletionChoice,
    CompletionResponse,
    Delta,
    Logprobs,
    ResponseLogprob,
    ResponseMessage,
    Usage,
)
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.service import Request


def chat_response(model: Phi4MM, outputs: Sequence[Output], head: dict[str, Any]) -> ChatCompletionResponse:
    """The answers to a conversation; `head` has what is known before them."""
    choices = [
        Choice(
            finish_reason=output.finish_reason,
            index=i,
            message=ResponseMessage(content=output.text, role="assistant", tool_calls=None),
            logprobs=None if output.logprobs is None else Logprobs(_spelled(model.processor.tokenizer, output)),
        )
        for i, output in enumerate(outputs)
    ]
    usage = Usage.of([output.usage for output in outputs])
    return ChatCompletionResponse(choices=choices, usage=usage, object="chat.completion", **head)


def chat_chunks(model: Phi4MM, asked: Sequence[Request], head: dict[str, Any]) -> Iterator[ChatCompletionChunkResponse]:
    """The parts of the answers to a conversation as they come, with one choice each."""
    head |= {"object": "chat.completion.chunk"}
    usages = []
    for i, piece in model.service.pieces(asked):
        usages += [piece.usage] if piece.usage else []
        *before, last = _split(model.processor.tokenizer, i, piece)
        for choice in before:
            yield ChatCompletionChunkResponse(choices=[choice], **head)
        usage = Usage.of(usages) if len(usages) == len(asked) else None
        yield ChatCompletionChunkResponse(choices=[last], usage=usage, **head)


def completion_response(
    request: CompletionRequest, outputs: Sequence[Output], kept: int | None, head: dict[str, Any]
) -> CompletionResponse:
    """The continuations of a raw prompt: the likeliest `kept`, or all, as they were drawn."""
    order = list(range(len(outputs)))
    if kept is not None and len(outputs) > 1:
        order.sort(key=lambda i: -sum(entry.logprob for entry in outputs[i].logprobs))
    start, end = request.prompt if request.echo_prompt else "", request.suffix or ""
    choices = [CompletionChoice(outputs[i].finish_reason, i, start + outputs[i].text + end) for i in order[:kept]]
    usage = Usage.of([output.usage for output in outputs])
    return CompletionResponse(choices=choices, usage=usage, object="text_completion", **head)


def _split(tokenizer: Tokenizer, index: int, piece: Piece) -> list[ChunkChoice]:
    """The parts of a piece: one, or one per token where log-probabilities are wanted, the text being the last's."""
    entries = (_spelled(tokenizer, piece) if piece.logprobs else None) or [None]
    parts = [ChunkChoice(None, index, Delta(content="", role="assistant"), entry) for entry in entries]
    parts[-1].finish_reason, parts[-1].delta.content = piece.finish_reason, piece.text
    return parts


def _spelled(tokenizer: Tokenizer, answer: Output | Piece) -> list[ResponseLogprob]:
    return [ResponseLogprob.of(entry, tokenizer) for entry in answer.logprobs]
