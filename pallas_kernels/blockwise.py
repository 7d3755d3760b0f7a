"""Causal attention over a key/value cache, one block of keys at a time (online softmax).

The loop ends with the last block that any row may see: the time does not depend on the size of the cache, the
memory is that of one block of scores, and the dead part of the cache is never read.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv import KV, dot_keys, product_dtype, sum_values


def attend(
    q: jax.Array,  # [B, K, R, H]: the R query rows that read kv head k
    positions: jax.Array,  # [B, R] int32: a row sees the keys 0..position
    k: KV,  # [C, K, S, H]
    v: KV,  # [C, K, S, H]
    slots: jax.Array | None,  # [B] int32: the cache row of each row; None where they are the same
    *,
    scale: float,
    block_size: int,
) -> jax.Array:
    """Returns the attention output [B, K, R, H] in float32; products take the cache's `product_dtype`."""
    block_size = min(block_size, k.shape[2])
    last_start = k.shape[2] - block_size
    q = q.astype(product_dtype(k))
    last = positions.max(axis=1)[:, None, None]
    positions = positions[:, None, :, None]

    def step(index, carry):
        largest, total, output = carry
        # The last block moves back to end with the cache; the keys that it then repeats are masked.
        start = jnp.minimum(index * block_size, last_start)
        scores = scale * dot_keys(q, _block(k, slots, start, block_size))
        keys = start + jnp.arange(block_size, dtype=jnp.int32)[None, None, None, :]
        scores = jnp.where((keys <= positions) & (keys >= index * block_size), scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_largest)
        decay = jnp.exp(largest - new_largest)
        total = total * decay + weights.sum(axis=-1, keepdims=True)
        live = keys.reshape(1, 1, -1) <= last
        output = output * decay + sum_values(weights, _block(v, slots, start, block_size), live)
        return new_largest, total, output

    rows = q.shape[:3]
    init = (
        jnp.full((*rows, 1), jnp.finfo(jnp.float32).min),
        jnp.zeros((*rows, 1), jnp.float32),
        jnp.zeros((*rows, q.shape[-1]), jnp.float32),
    )
    _, total, output = lax.fori_loop(0, jnp.max(positions) // block_size + 1, step, init)
    return output / total


def _block(cache: KV, slots: jax.Array | None, start: jax.Array, size: int) -> KV:
    """Keys or values `start` to `start + size` of each row: [B, K, size, H]."""

    def cut(array: jax.Array) -> jax.Array:
        if slots is None:
            return lax.dynamic_slice_in_dim(array, start, size, axis=2)
        zero, shape = jnp.zeros_like(start), (1, array.shape[1], size, *array.shape[3:])
        starts = ((slots[i].astype(start.dtype), zero, start, zero) for i in range(slots.shape[0]))
        return jnp.concatenate([lax.dynamic_slice(array, at[: array.ndim], shape) for at in starts])

    return jax.tree.map(cut, cache)
