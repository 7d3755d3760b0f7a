"""Recordings to text, part after part."""

from __future__ import annotations

import asyncio
import dataclasses
import zlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from phi4mm_jax.answer import Output, Piece
from phi4mm_jax.processing.audio import load_audio
from phi4mm_jax.processing.media import MediaLimits
from phi4mm_jax.processing.prompt import MediaError, Prompt
from phi4mm_jax.processing.segments import split_at_silences
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.service import QueueFullError
from phi4mm_jax.serving.answers import Question
from phi4mm_jax.serving.backend import Backend

LANGUAGES = {
    "en": "English",
    "zh": "Chinese",
    "de": "German",
    "fr": "French",
    "it": "Italian",
    "ja": "Japanese",
    "es": "Spanish",
    "pt": "Portuguese",
}
"""What the model was trained to hear, by ISO 639-1."""
_WITHOUT_SPACES = ("zh", "ja")
_PATIENCE_S = 0.2
"""Time between two attempts to queue the next parts of a recording that has been begun."""


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """What is to be heard."""

    samples: np.ndarray
    """[n] float32."""
    rate: int
    """In Hz."""
    parts: Sequence[tuple[int, int]]
    """First sample of each part, and the one after its last."""

    @classmethod
    def decode(cls, data: bytes, limits: MediaLimits, longest_s: float) -> Recording:
        """Reads a file and cuts it.

        Raises:
          MediaError: it is no recording that can be used.
        """
        try:
            samples, rate = load_audio(data, limits)
        except MediaError as error:
            raise MediaError(f"file: {error}") from error
        return cls(samples, rate, split_at_silences(samples, rate, longest_s))

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples) / self.rate


def transcribe_instruction(language: str | None) -> str:
    """The prompt that the model was trained with; `language` is one of `LANGUAGES`."""
    name = f"{LANGUAGES[language]} " if language not in (None, "en") else ""
    return f"Transcribe the {name}audio clip into text."


TRANSLATE_INSTRUCTION = "Translate the audio to English."


class Transcription:
    """The parts of a recording, as many at once as the cache has rows. Closing it ends what is under way."""

    def __init__(
        self, backend: Backend, recording: Recording, instruction: str, params: SamplingParams, *, called: float
    ):
        """Asks nothing yet.

        Args:
          backend: answers.
          recording: what is to be heard.
          instruction: what is to be done with every part.
          params: how.
          called: when the caller asked, `time.perf_counter` seconds.
        """
        self._backend, self._recording, self._instruction = backend, recording, instruction
        self._params, self._called = params, called
        self._asked = 0
        self._answers = None

    async def begin(self, *, streaming: bool) -> None:
        """Asks for the first parts.

        Raises:
          QueueFullError, RequestError, SamplingError, MediaError: it cannot be begun.
        """
        self._streaming = streaming
        await self._ask()

    def close(self) -> None:
        """Ends what is under way."""
        if self._answers:
            self._answers.close()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of the text in their order, each with the index of its part."""
        at = 0
        while True:
            waiting = {i: deque[Piece]() for i in range(at, self._asked)}
            first = at
            async for i, piece in self._answers:
                waiting[first + i].append(piece)
                while at < self._asked and waiting[at]:
                    piece = waiting[at].popleft()
                    yield at, piece
                    at += piece.finish_reason is not None
            if at == len(self._recording.parts):
                return
            await self._ask_patiently()

    async def outputs(self) -> list[Output]:
        """The text of every part."""
        pieces: list[list[Piece]] = [[] for _ in self._recording.parts]
        async for i, piece in self.pieces():
            pieces[i].append(piece)
        return [Output.of(parts) for parts in pieces]

    async def _ask(self) -> None:
        capacity, settings = self._backend.capacity, self._backend.settings
        parts = self._recording.parts[self._asked :][: min(capacity.rows, settings.max_waiting)]
        prompts = await self._backend.prepare(self._prompts, parts)
        questions = [Question(prompt=prompt, params=self._params) for prompt in prompts]
        self._answers = self._backend.ask(questions, called=self._called, streaming=self._streaming)
        self._asked += len(parts)

    async def _ask_patiently(self) -> None:
        """Asks for the next parts when there is room: what has been begun is not given up for others."""
        while True:
            try:
                return await self._ask()
            except QueueFullError:
                await asyncio.sleep(_PATIENCE_S)

    def _prompts(self, parts: Sequence[tuple[int, int]]) -> list[Prompt]:
        return [self._prompt(*part) for part in parts]

    def _prompt(self, start: int, end: int) -> Prompt:
        sound = {"type": "audio", "audio": (self._recording.samples[start:end], self._recording.rate)}
        content = [sound, {"type": "text", "text": self._instruction}]
        return self._backend.processor.conversation([{"role": "user", "content": content}])


def joint(language: str | None) -> str:
    """What stands between the texts of two parts."""
    return "" if language in _WITHOUT_SPACES else " "


def segments(recording: Recording, outputs: Sequence[Output], temperature: float) -> list[dict[str, Any]]:
    """The parts in OpenAI's form, but for how likely there is speech, which the model does not tell."""
    found = []
    for i, ((start, end), output) in enumerate(zip(recording.parts, outputs, strict=True)):
        raw = output.text.encode()
        found.append(
            {
                "id": i,
                "seek": round(100 * start / recording.rate),
                "start": round(start / recording.rate, 3),
                "end": round(end / recording.rate, 3),
                "text": output.text,
                "tokens": output.token_ids,
                "temperature": temperature,
                "avg_logprob": sum(entry.logprob for entry in output.logprobs) / len(output.logprobs),
                "compression_ratio": len(raw) / len(zlib.compress(raw)),
            }
        )
    return found


def srt(recording: Recording, texts: Sequence[str]) -> str:
    """The texts of the parts as SubRip subtitles."""
    spans = _spans(recording, ",")
    return "\n".join(f"{i}\n{span}\n{text}\n" for i, (span, text) in enumerate(zip(spans, texts, strict=True), 1))


def vtt(recording: Recording, texts: Sequence[str]) -> str:
    """The texts of the parts as WebVTT subtitles."""
    spans = _spans(recording, ".")
    return "WEBVTT\n\n" + "\n".join(f"{span}\n{text}\n" for span, text in zip(spans, texts, strict=True))


def _spans(recording: Recording, point: str) -> list[str]:
    return [" --> ".join(_clock(at / recording.rate, point) for at in part) for part in recording.parts]


def _clock(seconds: float, point: str) -> str:
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
