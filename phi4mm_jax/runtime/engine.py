"""Drives the compiled steps for a changing set of requests: continuous batching over the rows of one cache.

The host never waits for the device to learn what to do next: results are read one dispatch late, since stop tokens,
limits and the rope switch are all decided on the device. Encoders and prefill run a call at a time between the
dispatches of rows that are decoding.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.counts import Counts, Meter
from phi4mm_jax.runtime.encoding import EncoderCall, EncodingCache, Medium, media_of, plan_encoding
from phi4mm_jax.runtime.limits import RequestError, answer_limit, cache_length
from phi4mm_jax.runtime.prefill import PrefillRow, adapter_for, next_call, run_prefill
from phi4mm_jax.runtime.prefix import NOTHING, WORTH_COPYING, Contents, choose_slot, prompt_keys
from phi4mm_jax.runtime.rows import Constraint, Event, Row
from phi4mm_jax.runtime.sampling import SamplingKind, SamplingParams, SamplingState
from phi4mm_jax.runtime.steps import Drawn, Steps, Weights


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A dispatch whose tokens have not been read."""

    drawn: Drawn
    rows: list[tuple[int, Row]]  # (row of `drawn`, request)
    decodes: bool  # and not the first tokens after a prefill


class Engine:
    """Serves requests on `batch` cache rows of `length` positions. Not thread-safe."""

    def __init__(self, steps: Steps, weights: Weights, batch: int, length: int, counts: Counts | None = None):
        self._steps, self._weights = steps, weights
        self.batch, self.length = batch, length
        self.counts = counts or Counts()
        self._meter = Meter(self.counts)
        self._state = steps.new_state(batch, length)
        self._waiting: deque[Row] = deque()
        self._slots: list[Row | None] = [None] * batch
        self._left: list[Contents] = [NOTHING] * batch  # by rows that have ended
        self._last_used = [0] * batch
        self._clock = itertools.count(1)
        self._encoder_calls: deque[EncoderCall] = deque()
        self._prefills_next = True  # where media and prompts take turns
        self._encodings = EncodingCache(_cached_tokens(steps))
        self._pending: deque[_Pending] = deque()
        self._ids = itertools.count()
        # Both only widen while there is work: a row that ends must not cause another compilation.
        self._adapters: set[str] = set()
        self._kind: SamplingKind = "greedy"

    def submit(self, prompt: Prompt, params: SamplingParams, constraint: Constraint | None = None) -> int:
        """Queues a request and returns its id.

        Raises:
          RequestError: it can never fit.
          Exception: whatever its constraint raises.
        """
        max_tokens = answer_limit(self._steps, prompt, params)
        needed = cache_length(self._steps, prompt, max_tokens)
        if needed > self.length:
            raise RequestError(f"prompt and answer need {needed} cache positions; this engine has {self.length}")
        stop_ids = () if params.ignore_eos else self._steps.model.tokens.eos
        media = media_of(self._steps, prompt)
        use_long = len(prompt.token_ids) > self._steps.model.text.original_max_position_embeddings
        keys = np.concatenate([prompt_keys(prompt, media), np.zeros(max_tokens, np.int64)])
        contents = Contents(keys[: len(prompt.token_ids)], (adapter_for(prompt.mode), use_long))
        row = Row(next(self._ids), prompt, params, max_tokens, stop_ids, constraint, media, contents, keys)
        row.mask = constraint.mask() if constraint else None
        self._waiting.append(row)
        return row.id

    def cancel(self, request: int) -> None:
        """Ends a request; its row is free at once."""
        self._waiting = deque(row for row in self._waiting if row.id != request)
        for row in self._rows:
            if row.id == request:
                self._release(row)

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with a row."""
        return len(self._rows)

    @property
    def used(self) -> int:
        """Positions that they fill, those of their whole prompts included."""
        return sum(row.filled for row in self._rows)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._rows)

    def reset(self) -> None:
        """Drops every request."""
        self._waiting.clear()
        for row in self._rows:
            self._release(row)
        self._pending.clear()

    def resize(self, batch: int, length: int) -> None:
        """Moves to a cache of another shape, with what the old one holds as far as there is room.

        Rows in use stay, so there must be room for them; the old cache is freed once it has been copied.
        """
        order = sorted(range(self.batch), key=lambda slot: (self._slots[slot] is None, -self._last_used[slot]))[:batch]
        order += [-1] * (batch - len(order))
        self._state = self._steps.resize(self._state, np.array(order, np.int32), batch=batch, length=length)
        self._slots = [self._slots[old] if old >= 0 else None for old in order]
        kept = length - 1 - self._steps.runtime.engine.guessed_tokens  # the rest is scratch
        self._left = [self._left[old].first(kept) if old >= 0 else NOTHING for old in order]
        self._last_used = [self._last_used[old] if old >= 0 else 0 for old in order]
        for slot, row in enumerate(self._slots):
            if row:
                row.slot = slot
                if row.work:
                    row.work.slot = slot
        self.batch, self.length = batch, length

    def step(self, max_steps: int, max_calls: int | None = None) -> list[Event]:
        """Admits what fits, prepares it, decodes, and returns what has become known.

        Args:
          max_steps: most tokens of each row to decode.
          max_calls: most calls of encoders and prefill before that, so that rows that are decoding need not wait
            longer; more where the rows that wait for them are several times as many. None for all there are.
        """
        if not self._rows:
            self._adapters, self._kind = set(), "greedy"
        self._admit()
        self._rebuild()
        rows = self._rows
        decoding = sum(row.decoding for row in rows)
        if max_calls and decoding:  # a row alone can wait; several would leave too few that decode
            max_calls *= max(1, 4 * (len(rows) - decoding - 1) // decoding)
        longest = None
        if max_calls is not None and decoding:  # two tokens for each row that waits are no longer than its own step
            longest = max(self._steps.runtime.engine.stream_chunk, 2 * decoding)
        for _ in itertools.islice(self._work(max_calls is not None, longest), max_calls):
            self._meter.wait(leave=1)  # the host stays near, so that a request can end before its prefill does
        in_flight = self._dispatch(max_steps)
        events = []
        while len(self._pending) > in_flight:
            events += self._collect(self._pending.popleft())
        return events

    @property
    def _rows(self) -> list[Row]:
        """Requests with a row, in the order in which they came."""
        return sorted(filter(None, self._slots), key=lambda row: row.id)

    # --- admission -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives free rows of the cache to requests that wait."""
        new = []
        while self._waiting and not all(self._slots):
            row = self._waiting[0]
            if self._steps.runtime.engine.prefix_cache and self._is_being_computed(row):
                break
            new.append(self._waiting.popleft())
            self._take_slot(row)
        missing: dict[bytes, Medium] = {}
        for row in new:
            self.counts.media += len(row.media)
            for medium in row.media:
                if self._encodings.get(medium.key):
                    self.counts.cached_media += 1
                else:
                    missing[medium.key] = medium
        encodings, calls = plan_encoding(self._steps, list(missing.values()))
        found = dict(zip(missing, encodings, strict=True))
        for row in new:
            row.encodings = [found.get(medium.key) or self._encodings.get(medium.key) for medium in row.media]
        for key, encoding in found.items():
            self._encodings.put(key, encoding)
        self._encoder_calls += calls

    def _is_being_computed(self, row: Row) -> bool:
        """Whether another row is about to hold much more of a prompt's beginning than any row does now."""
        held = max(contents.shared(row.contents) for contents in self._held())
        coming = [other.contents.shared(row.contents) for other in self._rows if not other.decoding]
        return max(coming, default=0) >= held + WORTH_COPYING

    def _held(self) -> list[Contents]:
        """What each row of the cache holds."""
        return [row.held() if row else left for row, left in zip(self._slots, self._left, strict=True)]

    def _take_slot(self, row: Row) -> None:
        free = [slot for slot, occupant in enumerate(self._slots) if occupant is None]
        held = self._held() if self._steps.runtime.engine.prefix_cache else [NOTHING] * self.batch
        choice = choose_slot(row.contents, held, free, self._last_used)
        if choice.slot != choice.source:
            indices = np.int32(choice.source), np.int32(choice.slot), np.int32(choice.length)
            caches = self._steps.copy_row(self._state.caches, *indices)
            self._state = dataclasses.replace(self._state, caches=caches)
        row.slot, row.admitted, row.cached, row.reused = choice.slot, time.perf_counter(), choice.length, choice.length
        self._slots[row.slot] = row
        self._last_used[choice.source] = self._last_used[row.slot] = next(self._clock)
        self.counts.prompt_tokens += len(row.prompt.token_ids)
        self.counts.cached_tokens += row.cached
        if row.adapter:
            self._adapters.add(row.adapter)
        if row.kind == "full":
            self._kind = "full"
        # A constraint alone says when its answer may end.
        params = dataclasses.replace(row.params, min_tokens=0) if row.constraint else row.params
        vocab_size = self._steps.model.text.vocab_size
        settings = SamplingState.row(params, row.prompt.token_ids, row.max_tokens, row.stop_ids, vocab_size)
        self._state = self._steps.install(self._state, np.int32(row.slot), settings)

    def _rebuild(self) -> None:
        """Sends rows that have filled the range of the short rope factors through the decoder under the long ones.

        Their cached keys and values all depend on the short factors, so the whole sequence is run again.
        """
        switch = self._steps.model.text.original_max_position_embeddings
        for row in self._rows:
            if row.decoding and not row.use_long and row.tokens and row.filled >= switch:
                row.decoding, row.cached = False, 0
                row.contents = Contents(row.contents.keys, (row.adapter, True))

    # --- encoders and prefill --------------------------------------------------------------------------------

    def _work(self, is_hurried: bool, longest: int | None) -> Iterator[None]:
        """Makes the calls of encoders and prefill that there are, one each time it is advanced.

        In a hurry media and prompts take turns, so that neither keeps the other waiting; otherwise all media are
        encoded first, so that more prompts share a call. `longest` limits the chunks of prompts.
        """
        while True:
            ready = [row for row in self._rows if not row.decoding and row.is_encoded]
            if self._encoder_calls and not (ready and is_hurried and self._prefills_next):
                call = self._encoder_calls.popleft()
                self._meter.made("encode", call.run(self._weights))
                self.counts.add(call.work)
                self._prefills_next = True
            elif ready:
                self._prefill(ready, longest)
                self._prefills_next = False
            else:
                return
            yield

    def _prefill(self, rows: Sequence[Row], longest: int | None) -> None:
        """Runs the next chunk of some rows through the decoder, and draws the next token of those that are complete."""
        for row in rows:
            row.work = row.work or self._prefill_row(row)
        of_work = {row.work.slot: row for row in rows}
        engine = self._steps.runtime.engine
        call = next_call([row.work for row in rows], engine, self.length - 1, longest)
        caches, hidden = run_prefill(self._steps, self._weights, self._state.caches, call)
        self._state = dataclasses.replace(self._state, caches=caches)
        self._meter.made("prefill", hidden)
        self.counts.prefill_tokens += call.real_tokens
        self.counts.prefill_computed += len(call.rows) * call.size
        if call.final:
            drawing = [of_work[slot] for slot in call.slots[: call.count].tolist()]
            slots = np.where(np.arange(len(call.rows)) < call.count, call.slots, self.batch).astype(np.int32)
            kind = "full" if any(row.kind == "full" for row in drawing) else "greedy"
            allowed = self._allowed(drawing + drawing[:1] * (len(call.rows) - call.count))
            self._state, drawn = self._steps.begin(
                self._weights.text,
                self._state,
                slots,
                hidden,
                call.lengths,
                call.use_long,
                kind=kind,
                allowed=allowed,
                history=self._history(call.rows),
            )
            self._pending.append(_Pending(drawn, list(enumerate(drawing)), decodes=False))
            for row in drawing:
                row.work, row.decoding, row.unread = None, True, True
                if row.use_long:  # it will not be run again
                    row.encodings = []

    def _prefill_row(self, row: Row) -> PrefillRow:
        tokens = np.concatenate([row.prompt.token_ids, np.asarray(row.tokens, np.int32)])
        media = zip(row.media, row.encodings, strict=False)
        return PrefillRow(
            slot=row.slot,
            tokens=tokens,
            placements=[p for medium, encoding in media for p in encoding.placements(medium.where, len(tokens))],
            use_long=row.use_long,
            adapter=row.adapter,
            done=row.cached,
        )

    def _history(self, rows: Sequence[PrefillRow]) -> np.ndarray | None:
        """The tokens of rows by position [R, S] int32, if steps guess by them."""
        if not self._steps.runtime.engine.guessed_tokens:
            return None
        history = np.zeros((len(rows), self.length), np.int32)
        for i, row in enumerate(rows):
            history[i, : len(row.tokens)] = row.tokens
        return history

    # --- decoding --------------------------------------------------------------------------------------------

    def _dispatch(self, max_steps: int) -> int:
        """Starts the next decode steps; returns how many dispatches may stay unread: one if this was of use."""
        rows = [row for row in self._rows if row.decoding]
        steps = np.zeros(self.batch, np.int32)
        for row in rows:
            steps[row.slot] = max_steps if row.constraint is None else not row.unread
        if not steps.any():
            return 0
        keep = np.array([row is not None and row.decoding for row in self._slots])
        adapters = {
            name: np.array([row is not None and row.adapter == name for row in self._slots])
            for name in sorted(self._adapters)
        }
        allowed = self._allowed([row if row and steps[row.slot] else None for row in self._slots])
        self._state, drawn = self._steps.decode(
            self._weights.text, self._state, keep, steps, adapters, kind=self._kind, allowed=allowed
        )
        self._meter.made("decode", drawn.tokens)
        drawing = [row for row in rows if steps[row.slot]]
        for row in drawing:
            row.unread = True
        self._pending.append(_Pending(drawn, [(row.slot, row) for row in drawing], decodes=True))
        return 1

    def _allowed(self, rows: Sequence[Row | None]) -> np.ndarray | None:
        """The tokens that each row may draw [R, V / 32] uint32; None if none has a constraint."""
        if not any(row and row.constraint for row in rows):
            return None
        words = -(-self._steps.model.text.vocab_size // 32)
        allowed = np.full((len(rows), words), 0xFFFFFFFF, np.uint32)
        for i, row in enumerate(rows):
            if row and row.constraint:
                allowed[i] = row.mask
        return allowed

    def _collect(self, pending: _Pending) -> list[Event]:
        """Waits for a dispatch and turns its tokens into events."""
        self._meter.wait_for(pending.drawn.tokens)
        drawn = jax.device_get(pending.drawn)
        received, events = time.perf_counter(), []
        if pending.decodes:
            self.counts.decode_computed += len(drawn.tokens) * int(np.any(drawn.tokens >= 0, axis=0).sum())
        for i, row in pending.rows:
            row.unread = False
            columns = np.flatnonzero(drawn.tokens[i] >= 0)
            if not row.live or not len(columns):
                continue
            tokens = drawn.tokens[i, columns].tolist()
            row.keys[len(row.prompt.token_ids) + len(row.tokens) :][: len(tokens)] = tokens
            row.tokens += tokens
            self.counts.decode_tokens += len(tokens) * pending.decodes
            reason = None
            if tokens[-1] in row.stop_ids:
                reason = "stop"
            elif len(row.tokens) >= row.max_tokens:
                reason = "length"
            error = self._constrain(row) if row.constraint and not reason else None
            logprobs = row.logprobs(drawn, i, columns)
            events.append(Event(row.id, tokens, logprobs, reason, row.admitted, received, row.reused, error))
            if reason or error:
                self._release(row)
        return events

    @staticmethod
    def _constrain(row: Row) -> Exception | None:
        """Tells a constraint of the last token; returns what it raises, which is the end of this row alone."""
        try:
            row.constraint.accept(row.tokens[-1])
            row.mask = row.constraint.mask()
        except Exception as error:
            return error
        return None

    def _release(self, row: Row) -> None:
        self._left[row.slot] = row.held()
        row.live, row.decoding, row.encodings, row.work = False, False, [], None
        self._slots[row.slot] = None
        self._drop_unwanted_calls()

    def _drop_unwanted_calls(self) -> None:
        """Leaves out the encoder calls of requests that ended before them."""
        wanted = {encoding for row in self._rows for encoding in row.encodings}
        dropped = [call for call in self._encoder_calls if wanted.isdisjoint(encoding for encoding, _ in call.targets)]
        for call in dropped:
            self._encoder_calls.remove(call)
            for encoding, _ in call.targets:
                self._encodings.drop(encoding)


def _cached_tokens(steps: Steps) -> int:
    """Media tokens whose embeddings may be kept."""
    size = steps.model.text.hidden_size * steps.activation_dtype.itemsize
    return steps.runtime.engine.media_cache_mib * 2**20 // size
