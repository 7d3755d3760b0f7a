"""Logits of every position of one prompt."""

from __future__ import annotations

import jax
import numpy as np

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.buckets import round_up
from phi4mm_jax.runtime.encoding import encode_media
from phi4mm_jax.runtime.limits import check_length
from phi4mm_jax.runtime.memory import GIB, MemoryPlanError, available_memory
from phi4mm_jax.runtime.prefill import PrefillRow, adapter_of, plan_prefill, run_prefill
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
    size, free = length * text.vocab_size * 4, available_memory(jax.devices("cpu")[0])
    if free is not None and size > free:
        raise MemoryPlanError(
            f"logits of {length} tokens take {size / GIB:.1f} GiB and the host has {free / GIB:.1f} left; score a "
            "shorter prompt"
        )
    (placements,) = encode_media(steps, weights, [prompt])
    tokens = prompt.token_ids
    use_long = len(tokens) > text.original_max_position_embeddings
    row = PrefillRow(0, tokens, placements, use_long, adapter_of(prompt.mode))
    calls = plan_prefill([row], engine)
    caches = steps.new_state(1, round_up(sum(call.size for call in calls) + 1, engine.cache_buckets)).caches
    logits = np.empty((len(tokens), text.vocab_size), np.float32)
    for call in calls:
        caches, hidden, _ = run_prefill(steps, weights, caches, call)
        chunk = logits[call.starts[0] : call.starts[0] + call.size]
        chunk[:] = np.asarray(steps.logits(weights.text, hidden))[0, : len(chunk)]
    return logits
