"""Plain completions: prompts without a chat template."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request

from phi4mm_jax.answer import Usage
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.serving.answers import Answers, Question, while_connected
from phi4mm_jax.serving.backend import Backend, TheBackend
from phi4mm_jax.serving.events import EventStream
from phi4mm_jax.serving.formats import new_id, usage
from phi4mm_jax.serving.grammar import Grammar
from phi4mm_jax.serving.schemas import CompletionFields
from phi4mm_jax.serving.structure import read_grammar

router = APIRouter(tags=["completions"])


@router.post("/v1/completions")
async def completions(fields: CompletionFields, request: Request, backend: TheBackend) -> Any:
    """Goes on with each prompt, whole or streamed; choice `i * n + j` is the j-th answer to prompt i."""
    called = time.perf_counter()
    backend.check_model(fields.model)
    backend.check_count(len(fields.prompts) * fields.n)
    params = fields.params(max_tokens=fields.max_tokens, logprobs=fields.logprobs)
    prompts, grammar = await while_connected(request, backend.prepare(_prepare, fields, backend))
    questions = [Question(prompt=prompt, params=p, grammar=grammar) for prompt in prompts for p in params]
    answers = backend.ask(questions, called=called, streaming=fields.stream)
    head = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": backend.model_names[0],
    }
    echoes = [_echo(prompt, fields, backend) for prompt in fields.prompts for _ in params]
    if fields.stream:
        return EventStream(_chunks(fields, backend, answers, echoes, head), answers, backend.metrics)
    with contextlib.closing(answers):
        outputs = await while_connected(request, answers.outputs())
    choices = [
        {
            "index": i,
            "text": echo + output.text,
            "logprobs": backend.logprobs.plain(output.logprobs, 0),
            "finish_reason": output.finish_reason,
        }
        for i, (echo, output) in enumerate(zip(echoes, outputs, strict=True))
    ]
    return head | {"choices": choices, "usage": usage([output.usage for output in outputs], fields.n)}


def _prepare(fields: CompletionFields, backend: Backend) -> tuple[list[Prompt], Grammar | None]:
    return [backend.processor.raw(prompt) for prompt in fields.prompts], read_grammar(fields, backend.grammars)


def _echo(prompt: str | list[int], fields: CompletionFields, backend: Backend) -> str:
    if not fields.echo:
        return ""
    return prompt if isinstance(prompt, str) else backend.processor.tokenizer.decode(prompt, skip_special=False)


async def _chunks(
    fields: CompletionFields, backend: Backend, answers: Answers, echoes: list[str], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    with_usage = fields.stream_options is not None and fields.stream_options.include_usage
    tail = {"usage": None} if with_usage else {}
    costs: dict[int, Usage] = {}
    said = [0] * len(echoes)  # characters so far, where the next tokens begin
    async for i, piece in answers:
        logprobs = backend.logprobs.plain(piece.logprobs, said[i])
        said[i] += sum(map(len, logprobs["tokens"])) if logprobs else 0
        text, echoes[i] = echoes[i] + piece.text, ""
        if text or logprobs or piece.finish_reason:
            choice = {"index": i, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
            yield head | {"choices": [choice]} | tail
        if piece.finish_reason:
            costs[i] = piece.usage
    if with_usage:
        yield head | {"choices": [], "usage": usage([costs[i] for i in range(len(echoes))], fields.n)}
