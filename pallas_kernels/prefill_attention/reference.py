"""`prefill_attention` in XLA: a map over blocks of queries, each looping over the blocks of keys up to its last."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import blockwise
from pallas_kernels.kv import KV


def prefill_attention(
    q: jax.Array,  # [B, T, N, H]
    k: KV,  # [C, K, S, H]
    v: KV,  # [C, K, S, H]
    q_start: jax.Array,  # [B] int32
    slots: jax.Array | None,  # [B] int32
    *,
    scale: float,
    block_size: int,
) -> jax.Array:
    """See `api.prefill_attention`."""
    b, t, n, h = q.shape
    kv_heads = k.shape[1]
    group = n // kv_heads
    size = min(block_size, t)
    blocks = -(-t // size)

    def one(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, offset = block  # [B, size, N, H], [size]
        rows = queries.reshape(b, size, kv_heads, group, h).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, h)
        # Queries that only fill the last block see what the last real one sees.
        positions = q_start[:, None] + jnp.tile(jnp.minimum(offset, t - 1), group)[None, :]
        out = blockwise.attend(rows, positions, k, v, slots, scale=scale, block_size=block_size)
        out = out.reshape(b, kv_heads, group, size, h).transpose(0, 3, 1, 2, 4)
        return out.reshape(b, size, n, h).astype(q.dtype)

    if blocks == 1:
        return one((q, jnp.arange(size, dtype=jnp.int32)))
    padded = jnp.pad(q, ((0, 0), (0, blocks * size - t), (0, 0), (0, 0)))
    queries = padded.reshape(b, blocks, size, n, h).swapaxes(0, 1)
    offsets = jnp.arange(blocks * size, dtype=jnp.int32).reshape(blocks, size)
    out = lax.map(one, (queries, offsets))  # [blocks, B, size, N, H]
    return out.swapaxes(0, 1).reshape(b, blocks * size, n, h)[:, :t]
