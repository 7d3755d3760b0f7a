"""Chat completions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request

from phi4mm_jax.answer import Output, Usage
from phi4mm_jax.serving.answers import Answers, while_connected
from phi4mm_jax.serving.backend import Backend, TheBackend
from phi4mm_jax.serving.events import EventStream
from phi4mm_jax.serving.formats import new_id, usage
from phi4mm_jax.serving.schemas import ChatFields

router = APIRouter(tags=["completions"])


@router.post("/v1/chat/completions")
async def chat_completions(fields: ChatFields, request: Request, backend: TheBackend) -> Any:
    """Answers a conversation, whole or streamed."""
    called = time.perf_counter()
    backend.check_model(fields.model)
    params = fields.params(max_tokens=fields.limit, logprobs=fields.num_logprobs)
    prompt = await while_connected(request, backend.prepare(backend.processor.conversation, fields.conversation))
    answers = backend.ask([(prompt, p) for p in params], called=called, streaming=fields.stream)
    head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": backend.model_names[0]}
    if fields.stream:
        chunks = _chunks(fields, backend, answers, head | {"object": "chat.completion.chunk"})
        return EventStream(chunks, answers, backend.metrics)
    with contextlib.closing(answers):
        outputs = await while_connected(request, answers.outputs())
    return head | {
        "object": "chat.completion",
        "choices": [_choice(i, output, backend) for i, output in enumerate(outputs)],
        "usage": usage([output.usage for output in outputs], fields.n),
    }


def _choice(index: int, output: Output, backend: Backend) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": output.text, "refusal": None},
        "logprobs": backend.logprobs.chat(output.logprobs),
        "finish_reason": output.finish_reason,
    }


async def _chunks(
    fields: ChatFields, backend: Backend, answers: Answers, head: dict[str, Any]
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
        if piece.text or piece.logprobs:
            yield chunk(i, {"content": piece.text}, backend.logprobs.chat(piece.logprobs))
        if piece.finish_reason:
            costs[i] = piece.usage
            yield chunk(i, {}, reason=piece.finish_reason)
    if with_usage:
        yield head | {"choices": [], "usage": usage([costs[i] for i in range(fields.n)], fields.n)}
