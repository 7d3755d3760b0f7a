"""Text to token ids and back."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from phi4mm_jax.serving.answers import while_connected
from phi4mm_jax.serving.backend import Backend, TheBackend
from phi4mm_jax.serving.errors import ApiError, refuse
from phi4mm_jax.serving.schemas import DetokenizeFields, TokenizeFields

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(fields: TokenizeFields, request: Request, backend: TheBackend) -> dict[str, Any]:
    """Counts and shows the tokens of a prompt, media included."""
    backend.check_model(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise ApiError(400, "prompt: give either prompt or messages", param="prompt")
    ids = await while_connected(request, backend.prepare(_ids, fields, backend))
    answer = {"count": len(ids), "max_model_len": backend.capacity.context, "tokens": ids}
    if fields.return_token_strs:
        answer["token_strs"] = [backend.processor.tokenizer.token_name(i) for i in ids]
    return answer


@router.post("/detokenize")
async def detokenize(fields: DetokenizeFields, request: Request, backend: TheBackend) -> dict[str, Any]:
    """Shows what tokens spell, control tokens included."""
    backend.check_model(fields.model)
    return {"prompt": await while_connected(request, backend.prepare(_text, fields, backend))}


def _text(fields: DetokenizeFields, backend: Backend) -> str:
    vocabulary = backend.config.text.vocab_size
    for i, token in enumerate(fields.tokens):
        if not 0 <= token < vocabulary:
            raise refuse(f"tokens[{i}]", f"{token} is outside the vocabulary of 0 to {vocabulary - 1}")
    return backend.processor.tokenizer.decode(fields.tokens, skip_special=False)


def _ids(fields: TokenizeFields, backend: Backend) -> list[int]:
    if fields.prompt is not None:
        return backend.processor.tokenizer.encode(fields.prompt, allow_special=True, most=backend.capacity.context)
    return backend.processor.conversation(fields.messages, tools=fields.tools).token_ids.tolist()
