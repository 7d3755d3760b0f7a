"""Parts that several kinds of answers have, in OpenAI's form."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from phi4mm_jax.answer import Usage
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.runtime.rows import TokenLogprob

_LEAST = -9999.0
"""Stands for the logarithm of nothing, which JSON cannot hold."""


def new_id(kind: str) -> str:
    """Returns a name for an answer, such as `chatcmpl-...`."""
    return f"{kind}-{uuid.uuid4().hex}"


def usage(answers: Sequence[Usage], n: int = 1) -> dict[str, Any]:
    """What answers cost together; of `n` in a row the prompt is the same and counts once."""
    prompts = answers[::n]
    prompt_tokens = sum(u.prompt_tokens for u in prompts)
    completion_tokens = sum(u.completion_tokens for u in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(u.cached_tokens for u in prompts),
            "audio_tokens": sum(u.audio_tokens for u in prompts),
            "image_tokens": sum(u.image_tokens for u in prompts),
            "video_frames": sum(u.video_frames for u in prompts),
        },
    }


class LogprobsFormat:
    """Log-probabilities in the forms of chat and of plain completions; the token that ends an answer has none."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int]):
        """Remembers how tokens are spelled, and which end an answer."""
        self._tokenizer, self._ends = tokenizer, frozenset(ends)

    def chat(self, entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        """The form of chat completions; None if none were asked for."""
        if entries is None:
            return None
        content = [
            self._token(e.token_id, e.logprob) | {"top_logprobs": [self._token(*pair) for pair in e.top]}
            for e in entries
            if e.token_id not in self._ends
        ]
        return {"content": content, "refusal": None}

    def plain(self, entries: Sequence[TokenLogprob] | None, offset: int) -> dict[str, Any] | None:
        """The form of plain completions; `offset` is where their text begins."""
        if entries is None:
            return None
        entries = [e for e in entries if e.token_id not in self._ends]
        tokens = [self._spelled(e.token_id) for e in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [max(e.logprob, _LEAST) for e in entries],
            "top_logprobs": [{self._spelled(id): max(value, _LEAST) for id, value in e.top} for e in entries],
            "text_offset": list(accumulate(map(len, tokens), initial=offset))[:-1],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id, skip_special=False)
        return {"token": self._spelled(token_id), "logprob": max(logprob, _LEAST), "bytes": list(raw)}

    def _spelled(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id, skip_special=False).decode(errors="replace")
