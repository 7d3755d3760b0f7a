"""Guesses at the next tokens, which a decode step checks all at once: prompt lookup, without a second model.

What followed the latest earlier occurrence of the last two or three tokens is likely to follow again, where an answer
quotes its prompt or itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def guess(
    history: jax.Array,  # [B, S] int32: tokens by position
    lengths: jax.Array,  # [B] int32: position of each row's last token
    count: int,
) -> jax.Array:
    """The tokens [B, count] int32 that may follow each row's last one, -1 where there is no guess.

    An occurrence of the last three tokens is preferred to one of two, a late one to an early one.
    """
    positions = jnp.arange(history.shape[1], dtype=jnp.int32)[None, :]
    end = lengths[:, None]

    def matches(back: int) -> jax.Array:
        """Where the token that lies `back` before a position is that which lies as far before the last one."""
        wanted = jnp.take_along_axis(history, jnp.maximum(end - back, 0), axis=1)
        return (jnp.roll(history, back, axis=1) == wanted) & (positions >= back)

    pairs = matches(0) & matches(1) & (positions < end)
    score = jnp.where(pairs & matches(2), history.shape[1] + positions, jnp.where(pairs, positions, -1))
    found = jnp.argmax(score, axis=1).astype(jnp.int32)[:, None]
    following = found + 1 + jnp.arange(count, dtype=jnp.int32)[None, :]
    guesses = jnp.take_along_axis(history, jnp.minimum(following, end), axis=1)
    return jnp.where((jnp.max(score, axis=1, keepdims=True) >= 0) & (following <= end), guesses, -1)
