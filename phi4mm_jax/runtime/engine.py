"""Drives the compiled steps for a changing set of requests: continuous batching over the rows of one cache.

The host never waits for the device to learn what to do next: results are read one dispatch late, since stop tokens,
limits and the rope switch are all decided on the device.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Sequence

import jax
import numpy as np

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.encoding import Placement, encode_media
from phi4mm_jax.runtime.limits import RequestError, answer_limit, cache_length
from phi4mm_jax.runtime.prefill import PrefillRow, adapter_for, plan_prefill, run_prefill
from phi4mm_jax.runtime.sampling import SamplingKind, SamplingParams, SamplingState
from phi4mm_jax.runtime.steps import Drawn, Steps, Weights


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a token and of the likeliest alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of one request."""

    request: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str | None
    """None while it goes on; "stop" after a stop token, "length" at its limit."""
    admitted: float
    """When its prefill began, `time.perf_counter` seconds."""
    received: float
    """When the host had these tokens, likewise."""


@dataclasses.dataclass(eq=False)
class _Row:
    """Host's view of a request."""

    id: int
    prompt: Prompt
    params: SamplingParams
    max_tokens: int
    stop_ids: tuple[int, ...]
    slot: int = -1
    tokens: list[int] = dataclasses.field(default_factory=list)
    placements: list[Placement] = dataclasses.field(default_factory=list)
    use_long: bool = False
    live: bool = True
    admitted: float = 0.0

    @property
    def cached(self) -> int:
        """Positions in the cache once everything drawn has been read: all but the last token."""
        return len(self.prompt.token_ids) + len(self.tokens) - 1

    @property
    def adapter(self) -> str | None:
        return adapter_for(self.prompt.mode)


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A dispatch whose tokens have not been read."""

    drawn: Drawn
    rows: list[tuple[int, _Row]]  # (row of `drawn`, request)


class Engine:
    """Serves requests on `batch` cache rows of `length` positions. Not thread-safe."""

    def __init__(self, steps: Steps, weights: Weights, batch: int, length: int):
        self._steps, self._weights = steps, weights
        self.batch, self.length = batch, length
        self._state = steps.new_state(batch, length)
        self._waiting: deque[_Row] = deque()
        self._slots: list[_Row | None] = [None] * batch
        self._pending: deque[_Pending] = deque()
        self._ids = itertools.count()
        # Both only widen while there is work: a row that ends must not cause another compilation.
        self._adapters: set[str] = set()
        self._kind: SamplingKind = "greedy"

    def submit(self, prompt: Prompt, params: SamplingParams) -> int:
        """Queues a request and returns its id.

        Raises:
          RequestError: it can never fit.
        """
        max_tokens = answer_limit(self._steps, prompt, params)
        needed = cache_length(self._steps, prompt, max_tokens)
        if needed > self.length:
            raise RequestError(f"prompt and answer need {needed} cache positions; this engine has {self.length}")
        stop_ids = () if params.ignore_eos else self._steps.model.tokens.eos
        row = _Row(next(self._ids), prompt, params, max_tokens, stop_ids)
        self._waiting.append(row)
        return row.id

    def cancel(self, request: int) -> None:
        """Ends a request; its row is free at once."""
        self._waiting = deque(row for row in self._waiting if row.id != request)
        for row in self._slots:
            if row is not None and row.id == request:
                self._release(row)

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting) or any(self._slots)

    def reset(self) -> None:
        """Drops every request."""
        self._waiting.clear()
        self._pending.clear()
        for row in filter(None, list(self._slots)):
            self._release(row)

    def step(self, max_steps: int) -> list[Event]:
        """Admits what fits, decodes up to `max_steps` tokens per row, and returns what has become known."""
        if not any(self._slots):
            self._adapters, self._kind = set(), "greedy"
        self._admit()
        self._rebuild()
        in_flight = self._dispatch(max_steps)
        events = []
        while len(self._pending) > in_flight:
            events += self._collect(self._pending.popleft())
        return events

    # --- admission -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        new = []
        for slot, occupant in enumerate(self._slots):
            if occupant is None and self._waiting:
                row = self._waiting.popleft()
                row.slot, row.admitted, self._slots[slot] = slot, time.perf_counter(), row
                new.append(row)
        if not new:
            return
        self._adapters |= {row.adapter for row in new if row.adapter}
        if any(row.params.kind == "full" for row in new):
            self._kind = "full"
        text = self._steps.model.text
        for row, placements in zip(
            new, encode_media(self._steps, self._weights, [row.prompt for row in new]), strict=True
        ):
            row.placements = placements
            row.use_long = len(row.prompt.token_ids) > text.original_max_position_embeddings
            settings = SamplingState.row(
                row.params, row.prompt.token_ids, row.max_tokens, row.stop_ids, text.vocab_size
            )
            self._state = self._steps.install(self._state, np.int32(row.slot), settings)
        self._prefill(new)

    def _rebuild(self) -> None:
        """Moves rows that have filled the range of the short rope factors to the long ones.

        Their cached keys and values all depend on the short factors, so the whole sequence is run again.
        """
        switch = self._steps.model.text.original_max_position_embeddings
        full = [row for row in self._slots if row and not row.use_long and row.tokens and row.cached >= switch]
        for row in full:
            row.use_long = True
        if full:
            self._prefill(full)

    def _prefill(self, rows: Sequence[_Row]) -> None:
        """Runs the rows' tokens so far through the decoder and draws each row's next token."""
        of_slot = {row.slot: row for row in rows}
        work = [
            PrefillRow(
                slot=row.slot,
                tokens=np.concatenate([row.prompt.token_ids, np.asarray(row.tokens, np.int32)]),
                placements=row.placements,
                use_long=row.use_long,
                adapter=row.adapter,
            )
            for row in rows
        ]
        for row in rows:
            if row.use_long:  # it will not be run again
                row.placements = []
        for call in plan_prefill(work, self._steps.runtime.engine):
            caches, _, hidden = run_prefill(self._steps, self._weights, self._state.caches, call)
            self._state = dataclasses.replace(self._state, caches=caches)
            if call.final:
                drawing = [of_slot[slot] for slot in call.slots[: call.count].tolist()]
                kind = "full" if any(row.params.kind == "full" for row in drawing) else "greedy"
                slots = np.where(np.arange(len(call.rows)) < call.count, call.slots, self.batch).astype(np.int32)
                self._state, drawn = self._steps.begin(
                    self._weights.text, self._state, slots, hidden, call.lengths, call.use_long, kind=kind
                )
                self._pending.append(_Pending(drawn, list(enumerate(drawing))))

    # --- decoding --------------------------------------------------------------------------------------------

    def _dispatch(self, max_steps: int) -> int:
        """Starts the next decode steps; returns how many dispatches may stay unread: one if this was of use."""
        if not any(self._slots):
            return 0
        keep = np.array([row is not None for row in self._slots])
        adapters = {
            name: np.array([row is not None and row.adapter == name for row in self._slots])
            for name in sorted(self._adapters)
        }
        self._state, drawn = self._steps.decode(
            self._weights.text, self._state, keep, np.int32(max_steps), adapters, kind=self._kind
        )
        self._pending.append(_Pending(drawn, [(row.slot, row) for row in self._slots if row]))
        return 1

    def _collect(self, pending: _Pending) -> list[Event]:
        """Waits for a dispatch and turns its tokens into events."""
        drawn = jax.device_get(pending.drawn)
        received, events = time.perf_counter(), []
        for i, row in pending.rows:
            columns = np.flatnonzero(drawn.tokens[i] >= 0)
            if not row.live or not len(columns):
                continue
            tokens = drawn.tokens[i, columns].tolist()
            row.tokens += tokens
            reason = None
            if tokens[-1] in row.stop_ids:
                reason = "stop"
            elif len(row.tokens) >= row.max_tokens:
                reason = "length"
            logprobs = _logprobs(row, drawn, i, columns)
            events.append(Event(row.id, tokens, logprobs, reason, row.admitted, received))
            if reason:
                self._release(row)
        return events

    def _release(self, row: _Row) -> None:
        row.live, row.placements = False, []
        self._slots[row.slot] = None


def _logprobs(row: _Row, drawn: Drawn, i: int, columns: np.ndarray) -> list[TokenLogprob] | None:
    if row.params.logprobs is None:
        return None
    found, count = drawn.logprobs, row.params.logprobs
    return [
        TokenLogprob(
            token_id=int(drawn.tokens[i, c]),
            logprob=float(found.chosen[i, c]),
            top=tuple(zip(found.top_ids[i, c, :count].tolist(), found.top[i, c, :count].tolist(), strict=True)),
        )
        for c in columns
    ]
