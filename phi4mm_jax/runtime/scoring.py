"""Logits of every position of one prompt."""

from __future__ import annotations

import numpy as np

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.buckets import round_up
from phi4mm_jax.runtime.limits import cache_length, check_length
from phi4mm_jax.runtime.memory import GIB, MemoryPlanError, available_memory, host_memory, plan_memory
from phi4mm_jax.runtime.prefill import lone_row, plan_prefill, run_prefill
from phi4mm_jax.runtime.steps import Steps, Weights


def score(steps: Steps, weights: Weights, prompt: Prompt) -> np.ndarray:
    """Runs a prompt in a cache of its own.

    Returns:
      float32 [T, V].

    Raises:
      RequestError: the prompt is longer than the context.
      MemoryPlanError: the logits do not fit the host's memory.
    """
    text, engine = steps.model.text, steps.runtime.engine
    length = len(prompt.token_ids)
    check_length(steps, length)
    size, free = length * text.vocab_size * 4, host_memory()
    if free is not None and size > free:
        raise MemoryPlanError(
            f"logits of {length} tokens take {size / GIB:.1f} GiB and the host has {free / GIB:.1f} left; score a "
            "shorter prompt"
        )
    positions = round_up(cache_length(steps, prompt, max_tokens=0), engine.cache_buckets)
    plan_memory(steps, 1, positions).check(available_memory(steps.mesh.devices.flat[0]), weights_loaded=True)
    row = lone_row(steps, weights, prompt)
    caches = steps.new_state(1, positions).caches
    logits = np.empty((length, text.vocab_size), np.float32)
    for call in plan_prefill([row], engine, positions - 1):
        caches, hidden = run_prefill(steps, weights, caches, call, all_tokens=True)
        chunk = logits[call.starts[0] : call.starts[0] + call.size]
        chunk[:] = np.asarray(steps.logits(weights.text, hidden))[0, : len(chunk)]
    return logits
