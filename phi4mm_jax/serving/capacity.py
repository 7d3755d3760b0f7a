"""How many requests a server answers together, and how long they may be."""

from __future__ import annotations

import dataclasses

from phi4mm_jax.config import ConfigError, EngineConfig
from phi4mm_jax.runtime.buckets import plan_chunks, round_up
from phi4mm_jax.runtime.memory import available_memory, plan_memory
from phi4mm_jax.runtime.steps import Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """The shape of a server's cache."""

    rows: int
    """Requests that are answered together."""
    context: int
    """Most tokens of a prompt and its answer."""
    length: int
    """Positions of a row, padding included."""


def choose_capacity(steps: Steps, rows: int, context: int) -> Capacity:
    """Chooses what is left open, so that the cache fits the memory that the weights, which are placed, have left.

    Args:
      steps: of the model.
      rows: as asked for; 0 for as many as the configuration has.
      context: as asked for; 0 for the longest that fits.

    Raises:
      ConfigError: the model has no such context.
      MemoryPlanError: it does not fit.
    """
    engine = steps.runtime.engine
    rows = rows or engine.max_batch
    own = min(engine.max_seq_len, steps.model.text.max_position_embeddings)
    if context > own:
        raise ConfigError(f"context = {context}: the model's own, or engine.max_seq_len, is {own}")
    padding = _padding(engine)
    available = available_memory(steps.mesh.devices.flat[0])
    if context:
        length = round_up(context + padding, engine.cache_buckets)
        plan_memory(steps, rows, length).check(available, weights_loaded=True)
        return Capacity(rows=rows, context=context, length=length)
    longest = round_up(own + padding, engine.cache_buckets)
    lengths = [bucket for bucket in engine.cache_buckets if bucket < longest] + [longest]
    for length in reversed(lengths):
        plan = plan_memory(steps, rows, length)
        if available is None or plan.total - plan.weights <= available * _share(steps):
            break
    plan.check(available, weights_loaded=True)
    return Capacity(rows=rows, context=min(own, length - padding), length=length)


def _share(steps: Steps) -> float:
    """Of the memory that is left; a host has more to do with it than a device."""
    return 0.5 if steps.mesh.devices.flat[0].platform == "cpu" else 0.9


def _padding(engine: EngineConfig) -> int:
    """Positions beyond a sequence's own: what prefilling it may pad at most, and scratch."""
    lengths = range(1, engine.prefill_buckets[-1] + 1)
    return (
        1
        + engine.guessed_tokens
        + max(sum(plan_chunks(n, engine.prefill_buckets, engine.prefill_call_cost)) - n for n in lengths)
    )
