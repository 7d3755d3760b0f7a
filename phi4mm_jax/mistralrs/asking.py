"""Requests of mistral.rs as this project's: how each choice is drawn, and from which prompt."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from phi4mm_jax.api import Phi4MM
from phi4mm_jax.mistralrs.requests import ChatCompletionRequest, CompletionRequest
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.limits import RequestError, answer_limit, check_length
from phi4mm_jax.runtime.sampling import SamplingError, SamplingParams
from phi4mm_jax.service import Request

AnyRequest = ChatCompletionRequest | CompletionRequest
_SAME_NAME = (
    *("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "max_tokens"),
)


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
    choices = range(at_least_one("n_choices", request.n_choices))
    return [SamplingParams(seed=seeds.getrandbits(63) if seeds else None, **settings) for _ in choices]


def at_least_one(name: str, value: Any) -> int:
    """Checks a number of things.

    Raises:
      SamplingError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SamplingError(f"{name} = {value!r}: expected an integer of at least 1")
    return value


def to_answer(model: Phi4MM, prompt: Prompt, request: AnyRequest, choices: Sequence[SamplingParams]) -> list[Request]:
    """One request per choice, once they are known to fit the context.

    Raises:
      RequestError, SamplingError: they do not.
    """
    if request.truncate_sequence:
        prompt = _truncated(prompt, check_length(model.steps, 1), request.max_tokens or 1)
    for params in choices:
        answer_limit(model.steps, prompt, params)
    streaming = isinstance(request, ChatCompletionRequest) and request.stream
    return [Request(prompt=prompt, params=params, streaming=streaming) for params in choices]


def _truncated(prompt: Prompt, limit: int, max_tokens: int) -> Prompt:
    """The end of a prompt that leaves room for an answer."""
    excess = len(prompt.token_ids) + max_tokens - limit
    if excess <= 0:
        return prompt
    if prompt.images or prompt.audios:
        raise RequestError(f"truncate_sequence: the prompt is {excess} tokens too long and has media, which stay whole")
    return dataclasses.replace(prompt, token_ids=prompt.token_ids[excess:])
