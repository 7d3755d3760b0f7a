"""Causal attention over a key/value cache, one block of keys at a time (online softmax).

The loop ends with the last block that any row may see: the time does not depend on the size of the cache, the
memory is that of one block of scores, and the dead part of the cache is never read.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import einsum


def attend(
    q: jax.Array,  # [B, K, R, H]: the R query rows that read kv head k
    positions: jax.Array,  # [B, R] int32: a row sees the keys 0..position
    k: jax.Array,  # [C, K, S, H] float, or uint16 bits of bfloat16
    v: jax.Array,  # [C, K, S, H]
    slots: jax.Array | None,  # [B] int32: the cache row of each row; None where they are the same
    *,
    scale: float,
    block_size: int,
) -> jax.Array:
    """Returns the attention output [B, K, R, H] in float32; products take the cache's type."""
    block_size = min(block_size, k.shape[2])
    last_start = k.shape[2] - block_size
    dtype = jnp.dtype(jnp.bfloat16) if k.dtype == jnp.uint16 else k.dtype
    q = q.astype(dtype)
    last = positions.max(axis=1)[:, None, None, None]
    positions = positions[:, None, :, None]

    def step(index, carry):
        largest, total, output = carry
        # The last block moves back to end with the cache; the keys that it then repeats are masked.
        start = jnp.minimum(index * block_size, last_start)
        scores = scale * einsum("bkrh,bksh->bkrs", q, _block(k, slots, start, block_size))
        keys = start + jnp.arange(block_size, dtype=jnp.int32)[None, None, None, :]
        scores = jnp.where((keys <= positions) & (keys >= index * block_size), scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_largest)
        decay = jnp.exp(largest - new_largest)
        total = total * decay + weights.sum(axis=-1, keepdims=True)
        # A weight of 0 does not silence what an earlier user of the row may have left there: 0 x NaN is NaN.
        values = _block(v, slots, start, block_size, live=keys.reshape(1, 1, -1, 1) <= last)
        output = output * decay + einsum("bkrs,bksh->bkrh", weights.astype(dtype), values)
        return new_largest, total, output

    rows = q.shape[:3]
    init = (
        jnp.full((*rows, 1), jnp.finfo(jnp.float32).min),
        jnp.zeros((*rows, 1), jnp.float32),
        jnp.zeros((*rows, q.shape[-1]), jnp.float32),
    )
    _, total, output = lax.fori_loop(0, jnp.max(positions) // block_size + 1, step, init)
    return output / total


def _block(
    cache: jax.Array, slots: jax.Array | None, start: jax.Array, size: int, live: jax.Array | None = None
) -> jax.Array:
    """Keys or values `start` to `start + size` of each row, zero where not `live`: [B, K, size, H]."""
    if slots is None:
        block = lax.dynamic_slice_in_dim(cache, start, size, axis=2)
    else:
        zero, shape = jnp.zeros_like(start), (1, cache.shape[1], size, cache.shape[3])
        starts = ((slots[i].astype(start.dtype), zero, start, zero) for i in range(slots.shape[0]))
        block = jnp.concatenate([lax.dynamic_slice(cache, at, shape) for at in starts])
    if live is not None:
        block = jnp.where(live, block, jnp.zeros_like(block))
    return lax.bitcast_convert_type(block, jnp.bfloat16) if block.dtype == jnp.uint16 else block
