"""What an engine has done: tokens, media and device time, with what was computed in vain."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Literal

import jax

from phi4mm_jax.runtime.compilation import clock

Kind = Literal["encode", "prefill", "decode"]


@dataclasses.dataclass
class Counts:
    """What an engine has done since it began. Where things are computed together, padding is what was in vain."""

    prompt_tokens: int = 0
    """Tokens of the prompts that were admitted."""
    cached_tokens: int = 0
    """Those of them that the cache held."""
    media: int = 0
    """Pictures and recordings of these prompts."""
    cached_media: int = 0
    """Those whose embeddings were at hand."""
    crops: int = 0
    """Crops of pictures that were encoded."""
    patches: int = 0
    """Patches of these crops that show the picture."""
    patches_computed: int = 0
    """All their patches."""
    audio_frames: int = 0
    """Log-mel frames, 10 ms each, of recordings that were encoded."""
    audio_frames_computed: int = 0
    """The same with padding."""
    prefill_tokens: int = 0
    """Tokens that were prefilled."""
    prefill_computed: int = 0
    """The same with padding."""
    decode_tokens: int = 0
    """Tokens that decode steps drew, those that came after the end of an answer left out."""
    decode_computed: int = 0
    """Rows, used or not, times decode steps."""
    encode_seconds: float = 0.0
    """Device time of the encoders, as `Meter` tells it."""
    prefill_seconds: float = 0.0
    """Likewise."""
    decode_seconds: float = 0.0
    """Likewise."""

    def add(self, work: Mapping[str, float]) -> None:
        """Adds to some of the fields."""
        for name, amount in work.items():
            setattr(self, name, getattr(self, name) + amount)


class Meter:
    """Charges device time to kinds of work, without making the device wait.

    Calls run in the order in which they are made. One takes the time from when the one before was ready, or when it was
    made itself if that is later, until it is seen to be ready, which is when the host comes to need it. The time of
    compilations does not count.
    """

    def __init__(self, counts: Counts):
        self._counts = counts
        self._calls: deque[tuple[Kind, jax.Array, float]] = deque()
        self._ready = 0.0

    def made(self, kind: Kind, result: jax.Array) -> jax.Array:
        """Notes a call by its result, which is returned."""
        self._calls.append((kind, result, clock()))
        return result

    def wait(self, leave: int) -> None:
        """Waits until at most `leave` calls may be unfinished."""
        while len(self._calls) > leave:
            kind, result, made = self._calls.popleft()
            result.block_until_ready()
            ready = clock()
            self._counts.add({f"{kind}_seconds": ready - max(self._ready, made)})
            self._ready = ready

    def wait_for(self, result: jax.Array) -> None:
        """Waits for a call, and thereby for those before it."""
        calls = [call is result for _, call, _ in self._calls]
        if any(calls):
            self.wait(len(calls) - 1 - calls.index(True))
