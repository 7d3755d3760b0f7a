"""Runs small requests through the service, so that no user waits for a compiler."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from phi4mm_jax.runtime.limits import RequestError
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.service import QueueFullError
from phi4mm_jax.serving.answers import Answers
from phi4mm_jax.serving.backend import Backend
from phi4mm_jax.serving.metrics import Metrics

_TEXT = {"type": "text", "text": "Hi"}
_PICTURE = {"type": "image", "image": np.full((64, 64, 3), 255, np.uint8)}
_SPEECH = {"type": "audio", "audio": (np.zeros(16_000, np.float32), 16_000)}
_BATCHES = {"text": [[_TEXT]], "picture": [[_PICTURE]], "speech": [[_SPEECH]], "both": [[_PICTURE], [_SPEECH]]}
"""Messages that are answered together: the decoder has a program for each set of adapters that its rows use."""
_DRAWS = {"likeliest": SamplingParams(max_tokens=2), "drawn": SamplingParams(max_tokens=2, temperature=1.0, seed=0)}
"""And one for each kind of sampling."""


async def warm_up(backend: Backend, say: Callable[[str], None]) -> None:
    """Answers one batch of each kind.

    Args:
      backend: whose programs are to be compiled.
      say: is told of every batch.
    """
    began = time.perf_counter()
    batches = [
        (f"{name}, {draw}", messages, params) for draw, params in _DRAWS.items() for name, messages in _BATCHES.items()
    ]
    batches += [(f"{length} tokens", [length], _DRAWS["likeliest"]) for length in _lengths(backend)]
    for i, (name, contents, params) in enumerate(batches, start=1):
        at = time.perf_counter()
        with contextlib.suppress(RequestError):  # longer than this server's context: nobody can ask it, either
            await _answer(backend, contents, dataclasses.replace(params, ignore_eos=True))
        say(f"warm-up {i}/{len(batches)}: {name}, {time.perf_counter() - at:.1f} s")
    backend.ready = True
    say(f"ready after {time.perf_counter() - began:.1f} s")


def _lengths(backend: Backend) -> list[int]:
    """Lengths of prompts that take one prefill call of each size."""
    return [n for n in backend.engine.prefill_buckets if n < backend.capacity.context]


async def _answer(backend: Backend, contents: list[Any], params: SamplingParams) -> None:
    prompts = [
        backend.processor.raw([1] * content)
        if isinstance(content, int)
        else backend.processor.conversation([{"role": "user", "content": content}])
        for content in contents
    ]
    while True:
        try:
            answers = Answers(
                backend.service,
                Metrics(backend.service),  # of its own: users shall not be shown the compiler's times
                [(prompt, params) for prompt in prompts],
                called=time.perf_counter(),
                timeout=backend.settings.request_timeout_s,
                streaming=False,
            )
            break
        except QueueFullError:  # users were faster, and warm the server up themselves
            await asyncio.sleep(0.1)
    with contextlib.closing(answers):
        await answers.outputs()
