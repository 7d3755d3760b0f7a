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

_RATE, _FRAME = 16_000, 160
"""Samples a second, and samples of a log-mel frame."""
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

    The decoder has a program for each set of adapters that its rows use and each way of drawing, the encoders have one
    for each size of their calls, and prefill has one for each length.
    """
    text, picture, *clips, both = _prompts(backend)
    mixes = {"text": [text], "picture": [picture], "speech": [clips[0]], "picture beside speech": [picture, clips[0]]}
    for drawing, params in (("greedy", _GREEDY), ("drawn", _DRAWN)):
        for name, prompts in mixes.items():
            yield f"{name}, {drawing}", [Question(prompt=prompt, params=params) for prompt in prompts]
    for prompt in clips[1:]:
        yield f"speech of {prompt.audios[0].num_tokens} tokens", [Question(prompt=prompt, params=_GREEDY)]
    yield "picture and speech", [Question(prompt=both, params=_GREEDY)]
    digits = backend.grammars.regex("[0-9]{9}")
    yield "text, by a grammar", [Question(prompt=text, params=SamplingParams(max_tokens=2), grammar=digits)]
    for i, length in enumerate(backend.engine.prefill_buckets):  # each of other tokens, which no cache holds
        more = np.full(length, 1 + i, np.int32)
        longer = [dataclasses.replace(p, token_ids=np.append(p.token_ids, more)) for p in (picture, clips[0])]
        prompts = [Prompt(more), *longer]
        for prompt in prompts:
            yield f"{length} tokens, {prompt.mode.name.lower()}", [Question(prompt=prompt, params=_GREEDY)]


def _prompts(backend: Backend) -> list[Prompt]:
    """Text; a picture that takes encoder calls of every size; recordings, one for each size; picture and recording."""
    vision = backend.config.vision
    tiles = min(sum(backend.engine.crop_buckets) - 1, vision.max_crops)
    pixels = np.full((vision.image_size, vision.image_size * max(tiles, 1), 3), 255, np.uint8)
    picture = {"type": "image", "image": pixels}
    clips = [
        {"type": "audio", "audio": (np.zeros(frames * _FRAME, np.float32), _RATE)}
        for frames in backend.engine.audio_buckets
    ]
    text = {"type": "text", "text": "Hi"}
    media = [[], [picture], *([clip] for clip in clips), [picture, clips[0]]]
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
