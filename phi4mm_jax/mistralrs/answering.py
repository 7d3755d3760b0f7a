"""Answers of this project as mistral.rs' responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from phi4mm_jax.answer import Output, Piece
from phi4mm_jax.api import Phi4MM
from phi4mm_jax.mistralrs.requests import CompletionRequest
from phi4mm_jax.mistralrs.responses import (
    CalledFunction,
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
    ToolCallResponse,
    ToolCallType,
    Usage,
)
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.service import Request
from phi4mm_jax.serving.calls import AnswerParser
from phi4mm_jax.serving.tools import Tool


def chat_response(
    model: Phi4MM, outputs: Sequence[Output], tools: Sequence[Tool], head: dict[str, Any]
) -> ChatCompletionResponse:
    """The answers to a conversation.

    Args:
      model: that gave them.
      outputs: one per choice.
      tools: whose calls are taken out of the text; without any it is left as it is.
      head: what is known before the answers.
    """
    tokenizer, choices = model.processor.tokenizer, []
    for i, output in enumerate(outputs):
        content, calls, reason = _Reader(tokenizer, tools).read(output)
        message = ResponseMessage(content=content or (None if calls else ""), role="assistant", tool_calls=calls)
        logprobs = None if output.logprobs is None else Logprobs(_spelled(tokenizer, output))
        choices.append(Choice(finish_reason=reason, index=i, message=message, logprobs=logprobs))
    usage = Usage.of([output.usage for output in outputs])
    return ChatCompletionResponse(choices=choices, usage=usage, object="chat.completion", **head)


def chat_chunks(
    model: Phi4MM, asked: Sequence[Request], tools: Sequence[Tool], head: dict[str, Any]
) -> Iterator[ChatCompletionChunkResponse]:
    """The parts of the answers to a conversation as they come, with one choice each; calls come whole, at the end.

    Arguments are those of `chat_response`, but for `asked`, one request per choice.
    """
    head = {**head, "object": "chat.completion.chunk"}
    tokenizer, usages = model.processor.tokenizer, []
    readers = [_Reader(tokenizer, tools) for _ in asked]
    for i, piece in model.service.pieces(asked):
        usages += [piece.usage] if piece.usage else []
        *silent, entry = (_spelled(tokenizer, piece) if piece.logprobs else None) or [None]
        for one in silent:  # each token has its chunk where log-probabilities are wanted; the last one has the text
            choice = ChunkChoice(None, i, Delta(content="", role="assistant"), one)
            yield ChatCompletionChunkResponse(choices=[choice], **head)
        content, calls, reason = readers[i].read(piece)
        choice = ChunkChoice(reason, i, Delta(content=content, role="assistant", tool_calls=calls), entry)
        usage = Usage.of(usages) if len(usages) == len(asked) else None
        yield ChatCompletionChunkResponse(choices=[choice], usage=usage, **head)


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


class _Reader:
    """Takes the calls of tools out of an answer."""

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Tool]):
        """Begins an answer."""
        self._parser = AnswerParser(tokenizer, tools) if tools else None
        self._calls: list[ToolCallResponse] = []

    def read(self, part: Output | Piece) -> tuple[str, list[ToolCallResponse] | None, str | None]:
        """Returns the text of the next part, and at the end the calls, if there are any, and why it ended."""
        reason = part.finish_reason
        if not self._parser:
            return part.text, None, reason
        delta = self._parser.push(part.text, part.token_ids, last=reason is not None)
        for new in delta.calls:
            if new.id:
                function = CalledFunction(name=new.name, arguments="")
                self._calls.append(ToolCallResponse(new.index, new.id, ToolCallType.Function, function))
            self._calls[new.index].function.arguments += new.arguments
        calls = (self._calls or None) if reason else None
        return delta.content, calls, "tool_calls" if calls and reason == "stop" else reason


def _spelled(tokenizer: Tokenizer, answer: Output | Piece) -> list[ResponseLogprob]:
    return [ResponseLogprob.of(entry, tokenizer) for entry in answer.logprobs]
