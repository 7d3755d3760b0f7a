"""Chat completions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request

from phi4mm_jax.answer import Output, Usage
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.serving.answers import Answers, Question, while_connected
from phi4mm_jax.serving.backend import Backend, TheBackend
from phi4mm_jax.serving.calls import AnswerParser, CallDelta, Delta
from phi4mm_jax.serving.events import EventStream
from phi4mm_jax.serving.formats import new_id, usage
from phi4mm_jax.serving.schemas import ChatFields
from phi4mm_jax.serving.structure import Structure, read_structure

router = APIRouter(tags=["completions"])


@router.post("/v1/chat/completions")
async def chat_completions(fields: ChatFields, request: Request, backend: TheBackend) -> Any:
    """Answers a conversation, whole or streamed."""
    called = time.perf_counter()
    backend.check_model(fields.model)
    backend.check_count(fields.n)
    params = fields.params(max_tokens=fields.limit, logprobs=fields.num_logprobs)
    prompt, structure = await while_connected(request, backend.prepare(_prepare, fields, backend))
    questions = [Question(prompt=prompt, params=p, grammar=structure.grammar) for p in params]
    answers = backend.ask(questions, called=called, streaming=fields.stream)
    parsers = [_Parser(fields, structure, backend) for _ in params]
    head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": backend.model_names[0]}
    if fields.stream:
        chunks = _chunks(fields, backend, answers, parsers, head | {"object": "chat.completion.chunk"})
        return EventStream(chunks, answers, backend.metrics)
    with contextlib.closing(answers):
        outputs = await while_connected(request, answers.outputs())
    return head | {
        "object": "chat.completion",
        "choices": [
            _choice(i, output, parser, backend) for i, (output, parser) in enumerate(zip(outputs, parsers, strict=True))
        ],
        "usage": usage([output.usage for output in outputs], fields.n),
    }


def _prepare(fields: ChatFields, backend: Backend) -> tuple[Prompt, Structure]:
    structure = read_structure(fields, backend.grammars)
    return backend.processor.conversation(fields.messages, tools=structure.descriptions), structure


class _Parser:
    """Finds the calls of one answer, if there are tools."""

    def __init__(self, fields: ChatFields, structure: Structure, backend: Backend):
        self._parser = AnswerParser(backend.processor.tokenizer, structure.tools) if structure.tools else None
        self._parallel = fields.parallel_tool_calls
        self._has_called = False

    def push(self, text: str, token_ids: list[int], last: bool) -> Delta:
        if self._parser is None:
            return Delta(content=text, calls=())
        delta = self._parser.push(text, token_ids, last=last)
        calls = tuple(call for call in delta.calls if self._parallel or call.index == 0)
        self._has_called |= bool(calls)
        return Delta(content=delta.content, calls=calls)

    def finish_reason(self, reason: str) -> str:
        """What ended the answer, once all of it has been pushed."""
        return "tool_calls" if self._has_called and reason == "stop" else reason


def _choice(index: int, output: Output, parser: _Parser, backend: Backend) -> dict[str, Any]:
    delta = parser.push(output.text, output.token_ids, last=True)
    message = {"role": "assistant", "content": delta.content, "refusal": None}
    if delta.calls:
        message |= {"content": delta.content or None, "tool_calls": [_call(call) for call in delta.calls]}
    return {
        "index": index,
        "message": message,
        "logprobs": backend.logprobs.chat(output.logprobs),
        "finish_reason": parser.finish_reason(output.finish_reason),
    }


def _call(call: CallDelta) -> dict[str, Any]:
    """A call, or its next part."""
    if call.id is None:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


async def _chunks(
    fields: ChatFields, backend: Backend, answers: Answers, parsers: list[_Parser], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    with_usage = fields.stream_options is not None and fields.stream_options.include_usage
    tail = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head | {"choices": [choice]} | tail

    for i in range(fields.n):
        yield chunk(i, {"role": "assistant", "content": "", "refusal": None})
    costs: dict[int, Usage] = {}
    async for i, piece in answers:
        found = parsers[i].push(piece.text, piece.token_ids, last=piece.finish_reason is not None)
        delta: dict[str, Any] = {"content": found.content} if found.content else {}
        if found.calls:
            delta["tool_calls"] = [{"index": call.index, **_call(call)} for call in found.calls]
        logprobs = backend.logprobs.chat(piece.logprobs)
        if delta or (logprobs and logprobs["content"]):
            yield chunk(i, delta, logprobs)
        if piece.finish_reason:
            costs[i] = piece.usage
            yield chunk(i, {}, reason=parsers[i].finish_reason(piece.finish_reason))
    if with_usage:
        yield head | {"choices": [], "usage": usage([costs[i] for i in range(fields.n)], fields.n)}
