"""How long sequences may be, and how much cache a request needs."""

from __future__ import annotations

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.buckets import plan_chunks
from phi4mm_jax.runtime.sampling import DEFAULT_MAX_TOKENS, SamplingError, SamplingParams
from phi4mm_jax.runtime.steps import Steps


class RequestError(ValueError):
    """A request cannot be served as it stands; the message says what would fit."""


def check_length(steps: Steps, length: int) -> int:
    """Returns the most tokens of one sequence.

    Raises:
      RequestError: a prompt of `length` tokens is empty or longer.
    """
    if length == 0:
        raise RequestError("prompt: has no tokens; at least one is needed")
    own = steps.model.text.max_position_embeddings
    limit = min(steps.runtime.engine.max_seq_len, own)
    if length > limit:
        raise RequestError(
            f"prompt: {length} tokens leave no room; engine.max_seq_len allows {limit} in all (the model itself {own})"
        )
    return limit


def answer_limit(steps: Steps, prompt: Prompt, params: SamplingParams) -> int:
    """Returns the most tokens that the answer may have.

    Raises:
      RequestError: prompt and answer do not fit the context.
      SamplingError: `logit_bias` names a token outside the vocabulary.
    """
    vocab_size = steps.model.text.vocab_size
    for token in params.logit_bias:
        if not 0 <= token < vocab_size:
            raise SamplingError(f"logit_bias names token {token}; the vocabulary has ids 0 to {vocab_size - 1}")
    length = len(prompt.token_ids)
    limit = check_length(steps, length)
    if length == limit:
        raise RequestError(f"prompt: {length} tokens leave no room for an answer; the context has {limit} in all")
    for name in ("min_tokens", "max_tokens"):
        if length + (getattr(params, name) or 0) > limit:
            raise RequestError(
                f"{name} = {getattr(params, name)}: with a prompt of {length} tokens it passes the context of {limit};"
                f" at most {limit - length} fit"
            )
    if params.max_tokens is not None:
        return params.max_tokens
    return max(params.min_tokens, min(DEFAULT_MAX_TOKENS, limit - length))


def cache_length(steps: Steps, prompt: Prompt, max_tokens: int) -> int:
    """Cache positions that a request needs, padding of its prefills and the scratch position included."""
    engine, switch = steps.runtime.engine, steps.model.text.original_max_position_embeddings
    length = len(prompt.token_ids)
    prefills = [length]
    if length <= switch < length + max_tokens - 1:
        prefills.append(switch + 1)
    padded = (sum(plan_chunks(n, engine.prefill_buckets, engine.prefill_call_cost)) for n in prefills)
    return max(*padded, length + max_tokens) + 1 + engine.guessed_tokens
