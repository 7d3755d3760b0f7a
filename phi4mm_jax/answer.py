"""Turns an answer's tokens into text, piece by piece: stop strings never show, characters are never split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.runtime.rows import Event, TokenLogprob
from phi4mm_jax.runtime.sampling import SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What an answer cost."""

    prompt_tokens: int
    """Tokens of the prompt, media included."""
    completion_tokens: int
    """Tokens of the answer, the stop token included."""
    image_tokens: int
    """Tokens of the prompt that are pictures."""
    audio_tokens: int
    """Tokens of the prompt that are speech."""
    cached_tokens: int
    """Tokens of the prompt that earlier requests had left in the cache."""
    video_frames: int
    """Pictures of the prompt that are frames of videos."""
    time_to_first_token: float
    """Seconds from the call to the first token."""
    prefill_tokens_per_second: float
    """Prompt tokens over the seconds from admission to the first token; encoders and rows admitted along count in."""
    decode_tokens_per_second: float
    """Further tokens over the seconds from the first token to the last; 0 where there are none."""
    seconds: float
    """From the call to the last token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """The next part of a streamed answer."""

    text: str
    """May be empty: a token can be half a character, or the possible beginning of a stop string."""
    token_ids: list[int]
    """The tokens that this piece is of."""
    logprobs: list[TokenLogprob] | None
    """One per token, where asked for."""
    finish_reason: str | None
    """None but on the last piece."""
    usage: Usage | None
    """None but on the last piece."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """A whole answer."""

    text: str
    """Without stop token and stop string."""
    token_ids: list[int]
    """As drawn, the stop token included."""
    finish_reason: str
    """"stop" after a stop token or stop string, "length" at the limit."""
    logprobs: list[TokenLogprob] | None
    """One per token, where asked for."""
    usage: Usage
    """Counts and times."""

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Self:
        """Joins all pieces of an answer."""
        last = pieces[-1]
        return cls(
            text="".join(piece.text for piece in pieces),
            token_ids=[token for piece in pieces for token in piece.token_ids],
            finish_reason=last.finish_reason,
            logprobs=None if last.logprobs is None else [entry for piece in pieces for entry in piece.logprobs],
            usage=last.usage,
        )


class Answer:
    """One request's answer as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, params: SamplingParams, called: float):
        """Begins an answer.

        Args:
          tokenizer: of the model.
          prompt: what is being answered.
          params: for the stop strings.
          called: when the caller asked, `time.perf_counter` seconds.
        """
        self._stream, self._stops = tokenizer.stream(), params.stop
        self._prompt, self._called = prompt, called
        self._first = self._last = called
        self._admitted = called
        self._cached_tokens = 0
        self._held = ""  # text that may turn out to be the beginning of a stop string
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None

    def push(self, event: Event) -> Piece:
        """Takes the next tokens; after a stop string `finish_reason` is set and the rest is dropped."""
        if not self.token_ids:
            self._admitted, self._first, self._cached_tokens = event.admitted, event.received, event.cached
        self._last = event.received
        text, used = "", 0
        for token in event.token_ids:
            used += 1
            ends = event.finish_reason is not None and used == len(event.token_ids)
            text += self._release(self._stream.push(token))
            if self.finish_reason:
                break
            if ends:
                text += self._finish()
                self.finish_reason = self.finish_reason or event.finish_reason
        reason = self.finish_reason
        token_ids = event.token_ids[:used]
        logprobs = None if event.logprobs is None else event.logprobs[:used]
        self.token_ids += token_ids
        usage = self.usage() if reason else None
        return Piece(text=text, token_ids=token_ids, logprobs=logprobs, finish_reason=reason, usage=usage)

    def usage(self) -> Usage:
        """Counts and times so far."""
        prompt_tokens, more = len(self._prompt.token_ids), len(self.token_ids) - 1
        prefill, decode = self._first - self._admitted, self._last - self._first
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=len(self.token_ids),
            image_tokens=sum(image.num_tokens for image in self._prompt.images),
            audio_tokens=sum(clip.num_tokens for clip in self._prompt.audios),
            cached_tokens=self._cached_tokens,
            video_frames=self._prompt.video_frames,
            time_to_first_token=self._first - self._called,
            prefill_tokens_per_second=prompt_tokens / prefill if prefill > 0 else 0.0,
            decode_tokens_per_second=more / decode if more > 0 and decode > 0 else 0.0,
            seconds=self._last - self._called,
        )

    def _release(self, text: str) -> str:
        """Adds text; returns what can be shown, which ends before anything that may become a stop string."""
        self._held += text
        ends = [self._held.find(stop) for stop in self._stops]
        if any(end >= 0 for end in ends):
            shown, self._held = self._held[: min(end for end in ends if end >= 0)], ""
            self.finish_reason = "stop"
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def _finish(self) -> str:
        """What is left at the end of the answer."""
        shown = self._release(self._stream.finish())
        shown, self._held = shown + self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
