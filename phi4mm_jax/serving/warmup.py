"""Runs small requests through the service, so that no user waits for a compiler."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.limits import RequestError
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.service import QueueFullError
from phi4mm_jax.serving.answers import Answers, Question
from phi4mm_jax.serving.backend import Backend
from phi4mm_jax.serving.metrics import Metrics

_GREEDY = SamplingParams(max_tokens=2, ignore_eos=True)
_DRAWN = dataclasses.replace(_GREEDY, temperature=1.0, seed=0)


async def warm_up(backend: Backend, say: Callable[[str], None]) -> None:
    """Answers one batch of each kind.

    Args:
      backend: whose programs are to be compiled.
      say: is told of every batch.
    """
    began = time.perf_counter()
    batches = list(_batches(backend))
    for i, (name, questions) in enumerate(batches, start=1):
        at = time.perf_counter()
        with contextlib.suppress(RequestError):  # longer than this server's context: nobody can ask it, either
            await _answer(backend, questions)
        say(f"warm-up {i}/{len(batches)}: {name}, {time.perf_counter() - at:.1f} s")
    backend.ready = True
    say(f"ready after {time.perf_counter() - began:.1f} s")


def _batches(backend: Backend) -> Iterator[tuple[str, list[Question]]]:
    """What is answered together, and its name.

    The decoder has a program for each set of adapters that its rows use and each way of drawing; prefill has one for
    each length of its calls.
    """
    text, picture, speech = _prompts(backend)
    mixes = {"text": [text], "picture": [picture], "speech": [speech], "picture and speech": [picture, speech]}
    for drawing, params in (("greedy", _GREEDY), ("drawn", _DRAWN)):
        for name, prompts in mixes.items():
            yield f"{name}, {drawing}", [Question(prompt=prompt, params=params) for prompt in prompts]
    digits = backend.grammars.regex("[0-9]{9}")
    yield "text, by a grammar", [Question(prompt=text, params=SamplingParams(max_tokens=2), grammar=digits)]
    for i, length in enumerate(backend.engine.prefill_buckets):  # each of other tokens, which no cache holds
        yield f"{length} tokens", [Question(prompt=backend.processor.raw([1 + i] * length), params=_GREEDY)]


def _prompts(backend: Backend) -> list[Prompt]:
    """Text, a picture, speech."""
    media = [
        [],
        [{"type": "image", "image": np.full((64, 64, 3), 255, np.uint8)}],
        [{"type": "audio", "audio": (np.zeros(16_000, np.float32), 16_000)}],
    ]
    text = {"type": "text", "text": "Hi"}
    return [backend.processor.conversation([{"role": "user", "content": [*medium, text]}]) for medium in media]


async def _answer(backend: Backend, questions: Sequence[Question]) -> None:
    while True:
        try:
            answers = Answers(
                backend.service,
                Metrics(backend.service),  # of its own: users shall not be shown the compiler's times
                questions,
                called=time.perf_counter(),
                timeout=backend.settings.request_timeout_s,
                streaming=False,
            )
            break
        except QueueFullError:  # users were faster, and warm the server up themselves
            await asyncio.sleep(0.1)
    with contextlib.closing(answers):
        await answers.outputs()
