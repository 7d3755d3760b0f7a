"""What the engine knows of a request, and what it says of it."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.encoding import Encoding, Medium
from phi4mm_jax.runtime.prefill import PrefillRow
from phi4mm_jax.runtime.prefix import Contents
from phi4mm_jax.runtime.sampling import SamplingKind, SamplingParams
from phi4mm_jax.runtime.steps import Drawn


class Constraint(Protocol):
    """What the tokens of one answer must be like."""

    def mask(self) -> np.ndarray:
        """The tokens that may come next: [ceil(V / 32)] uint32, bit i of word w for token 32 w + i."""
        ...

    def accept(self, token_id: int) -> None:
        """Takes the token that came."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a token and of the likeliest alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of one request, or the error that ends it."""

    request: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str | None
    """None while it goes on; "stop" after a stop token, "length" at its limit."""
    admitted: float
    """When its prefill began, `time.perf_counter` seconds."""
    received: float
    """When the host had these tokens, likewise."""
    cached: int = 0
    """Tokens of the prompt that were not computed anew."""
    error: Exception | None = None
    """What its constraint raised."""


@dataclasses.dataclass(eq=False)
class Row:
    """A request, as the host sees it."""

    id: int
    prompt: Prompt
    params: SamplingParams
    max_tokens: int
    stop_ids: tuple[int, ...]
    constraint: Constraint | None
    media: list[Medium]
    contents: Contents
    """Of the whole prompt."""
    keys: np.ndarray
    """[T] int64: those of the prompt and of its answer so far, with room for the rest."""
    slot: int = -1
    encodings: list[Encoding] = dataclasses.field(default_factory=list)
    """Of its media, as long as it may have to be run again."""
    work: PrefillRow | None = None
    """What is left to prefill; None while it waits for its media, and once it is decoding."""
    decoding: bool = False
    unread: bool = False
    """Whether a token has been drawn that its constraint has not seen."""
    mask: np.ndarray | None = None
    """The tokens that its constraint allows next."""
    live: bool = True
    tokens: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0
    """Positions that were in the cache when it got its row."""
    reused: int = 0
    """The same, whatever became of it."""
    admitted: float = 0.0

    @property
    def adapter(self) -> str | None:
        return self.contents.kind[0]

    @property
    def use_long(self) -> bool:
        return self.contents.kind[1]

    @property
    def kind(self) -> SamplingKind:
        return "full" if self.constraint else self.params.kind

    @property
    def is_encoded(self) -> bool:
        """Whether all of its media have been."""
        return not any(encoding.missing for encoding in self.encodings)

    @property
    def filled(self) -> int:
        """Positions in the cache, of what the host knows: all but the last token."""
        return len(self.prompt.token_ids) + len(self.tokens) - 1

    def held(self) -> Contents:
        """What its row of the cache holds for certain."""
        known = len(self.prompt.token_ids) + max(len(self.tokens) - 1, 0)
        length = known if self.decoding else min(self.work.done, known) if self.work else self.cached
        return Contents(self.keys[:length], self.contents.kind)

    def logprobs(self, drawn: Drawn, i: int, columns: np.ndarray) -> list[TokenLogprob] | None:
        """Those of the tokens in some columns of row `i` of what was drawn, if it asked for them."""
        if self.params.logprobs is None:
            return None
        found, count = drawn.logprobs, self.params.logprobs
        return [
            TokenLogprob(
                token_id=int(drawn.tokens[i, c]),
                logprob=float(found.chosen[i, c]),
                top=tuple(zip(found.top_ids[i, c, :count].tolist(), found.top[i, c, :count].tolist(), strict=True)),
            )
            for c in columns
        ]
