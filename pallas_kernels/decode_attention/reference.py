"""`decode_attention` in XLA: a loop over the blocks of keys up to the longest row's last."""

import jax
import jax.numpy as jnp

from pallas_kernels import blockwise

BLOCK_SIZE = 512


def decode_attention(
    q: jax.Array,  # [B, N, H]
    k: jax.Array,  # [B, K, S, H]
    v: jax.Array,  # [B, K, S, H]
    lengths: jax.Array,  # [B] int32
    *,
    scale: float,
) -> jax.Array:
    """See `api.decode_attention`."""
    b, n, h = q.shape
    group = n // k.shape[1]
    positions = jnp.broadcast_to(lengths[:, None] - 1, (b, group))
    out = blockwise.attend(q.reshape(b, -1, group, h), positions, k, v, scale=scale, block_size=BLOCK_SIZE)
    return out.reshape(b, n, h).astype(q.dtype)
