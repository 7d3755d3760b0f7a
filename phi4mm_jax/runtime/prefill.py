"""Prefill: how prompts become chunks of bucketed shape, several prompts to a call, media put in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from phi4mm_jax.config import EngineConfig
from phi4mm_jax.models.lora import ADAPTERS
from phi4mm_jax.processing.prompt import InputMode, Prompt
from phi4mm_jax.runtime.buckets import plan_chunks, round_up
from phi4mm_jax.runtime.encoding import Placement, encode_media
from phi4mm_jax.runtime.kv_cache import LayerCache
from phi4mm_jax.runtime.steps import Steps, Weights

_ADAPTER_OF_MODE = {InputMode.VISION: "vision", InputMode.VISION_SPEECH: "vision", InputMode.SPEECH: "speech"}


def adapter_for(mode: InputMode) -> str | None:
    """The LoRA adapter of a sequence, None for the base weights (phi4mm-reference, 3)."""
    return _ADAPTER_OF_MODE.get(mode)


def adapter_rows(adapters: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Marks the rows of each adapter that is in use at all."""
    return {name: np.array([a == name for a in adapters]) for name in ADAPTERS if name in adapters}


@dataclasses.dataclass(eq=False)
class PrefillRow:
    """One sequence on its way through the decoder."""

    slot: int
    """Its cache row."""
    tokens: np.ndarray
    """[T] int32."""
    placements: Sequence[Placement]
    """Its media; positions beyond a placement's index hold none."""
    use_long: bool
    """Its rope regime."""
    adapter: str | None
    """Its LoRA adapter."""
    done: int = 0
    """Tokens that are in the cache, or that calls made so far put there."""

    @property
    def left(self) -> int:
        """Tokens to come."""
        return len(self.tokens) - self.done


def lone_row(steps: Steps, weights: Weights, prompt: Prompt) -> PrefillRow:
    """A whole prompt in the only row of a cache, its media encoded."""
    (placements,) = encode_media(steps, weights, [prompt])
    use_long = len(prompt.token_ids) > steps.model.text.original_max_position_embeddings
    return PrefillRow(0, prompt.token_ids, placements, use_long, adapter_for(prompt.mode))


@dataclasses.dataclass(frozen=True, eq=False)
class PrefillCall:
    """One call of the prefill step: the same chunk length for R rows."""

    rows: list[PrefillRow]
    """R rows; those beyond `count` repeat the first, which writes the same values twice."""
    starts: np.ndarray
    """[R] int32: position of each chunk."""
    size: int
    """Chunk length T."""
    count: int
    """How many rows are real."""
    final: bool
    """Whether these are their rows' last chunks."""

    @property
    def slots(self) -> np.ndarray:
        """[R] int32."""
        return np.array([row.slot for row in self.rows], np.int32)

    @property
    def lengths(self) -> np.ndarray:
        """[R] int32: tokens of each whole sequence."""
        return np.array([len(row.tokens) for row in self.rows], np.int32)

    @property
    def use_long(self) -> np.ndarray:
        """[R] bool."""
        return np.array([row.use_long for row in self.rows])

    @property
    def real_tokens(self) -> int:
        """Tokens that are no padding."""
        return int(np.minimum(self.lengths - self.starts, self.size)[: self.count].sum())


def next_call(rows: Sequence[PrefillRow], engine: EngineConfig, room: int, longest: int | None = None) -> PrefillCall:
    """Cuts the next chunk of the first row, and of further rows up to `prefill_rows` whose next is of the same length.

    Args:
      rows: rows with tokens left; those of the call are advanced.
      engine: for the buckets.
      room: positions of the cache that may be written.
      longest: most tokens of the chunk; at least the smallest bucket is taken.
    """
    buckets = engine.prefill_buckets
    if longest is not None:
        buckets = tuple(b for b in buckets if b <= longest) or buckets[:1]

    def next_chunk(row: PrefillRow) -> tuple[int, bool]:
        size = plan_chunks(row.left, buckets, engine.prefill_call_cost)[0]
        return size, size >= row.left

    size, final = next_chunk(rows[0])
    part = [row for row in rows if next_chunk(row) == (size, final)][: engine.prefill_rows]
    # Padding that would not fit makes a chunk begin earlier, with tokens that are in the cache already.
    starts = [min(row.done, room - size) for row in part]
    for row, start in zip(part, starts, strict=True):
        row.done = min(start + size, len(row.tokens))
    padding = round_up(len(part), engine.batch_buckets) - len(part)
    starts += starts[:1] * padding
    return PrefillCall(part + part[:1] * padding, np.array(starts, np.int32), size, len(part), final)


def plan_prefill(rows: Sequence[PrefillRow], engine: EngineConfig, room: int) -> Iterator[PrefillCall]:
    """Cuts all rows into chunks, `room` being the positions of the cache that may be written."""
    while left := [row for row in rows if row.left]:
        yield next_call(left, engine, room)


def run_prefill(
    steps: Steps, weights: Weights, caches: list[LayerCache], call: PrefillCall, *, all_tokens: bool = False
) -> tuple[list[LayerCache], jax.Array]:
    """Runs one call.

    Returns:
      The caches (the given ones are donated), and hidden states of each last real token [R, 1, D] or of all [R, T, D].
    """
    return steps.prefill(weights.text, caches, *prefill_arguments(steps, call, all_tokens=all_tokens))


def prefill_arguments(steps: Steps, call: PrefillCall, *, all_tokens: bool) -> tuple[Any, ...]:
    """What a call gives to the prefill step, after the weights and the caches; wanted are the last tokens or all."""
    tokens = np.full((len(call.rows), call.size), steps.model.tokens.pad, np.int32)
    for i, (row, start) in enumerate(zip(call.rows, call.starts, strict=True)):
        part = row.tokens[start : start + call.size]
        tokens[i, : len(part)] = part
    media, is_media = _place_media(steps, call)
    wanted = None if all_tokens else np.minimum(call.starts + call.size, call.lengths) - call.starts - 1
    adapters = adapter_rows([row.adapter for row in call.rows])
    return tokens, media, is_media, call.slots, call.starts, wanted, call.use_long, adapters


def _place_media(steps: Steps, call: PrefillCall) -> tuple[jax.Array | None, np.ndarray | None]:
    """The call's media embeddings [R, M, D] and where they count [R, T]; None for rows of text alone.

    M is the longest chunk there is, so that the size of this one compiles nothing. A chunk without media of a row that
    has some gets a blank, so that it runs the same program as the others.
    """
    if not any(row.adapter for row in call.rows):
        return None, None
    shape = len(call.rows), steps.runtime.engine.prefill_buckets[-1]
    indices: dict[int, tuple[jax.Array, np.ndarray]] = {}  # one entry per encoder call, which rows may share
    for i, (row, start) in enumerate(zip(call.rows, call.starts, strict=True)):
        for placement in row.placements:
            part = placement.index[start : start + call.size]
            if np.any(part >= 0):
                blank = np.full(shape, -1, np.int32)
                _, index = indices.setdefault(id(placement.embeddings), (placement.embeddings, blank))
                index[i, : len(part)] = np.maximum(index[i, : len(part)], part)
    media, is_media = steps.empty_media(*shape), np.zeros(shape, np.bool_)
    for embeddings, index in indices.values():
        media = steps.place_media(media, embeddings, index)
        is_media |= index >= 0
    return media, is_media[:, : call.size]
