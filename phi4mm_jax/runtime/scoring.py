"""Logits of every position of one prompt."""

from __future__ import annotations

import numpy as np

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.buckets import round_up
from phi4mm_jax.runtime.encoding import encode_media
from phi4mm_jax.runtime.prefill import PrefillRow, adapter_of, plan_prefill, run_prefill
from phi4mm_jax.runtime.steps import Steps, Weights


def score(steps: Steps, weights: Weights, prompt: Prompt) -> np.ndarray:
    """Runs a prompt in a cache of its own.

    Returns:
      float32 [T, V].
    """
    text, engine = steps.model.text, steps.runtime.engine
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
