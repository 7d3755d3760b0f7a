"""`decode_attention` in XLA: a loop over the blocks of keys up to the longest row's last."""

import jax
import jax.numpy as jnp

from pallas_kernels import blockwise
from pallas_kernels.kv import KV

# Keys that are read at once. On a CPU a block should stay in the caches; an accelerator wants few steps.
_BLOCK_SIZE = {"cpu": 256}
_DEFAULT_BLOCK_SIZE = 1024


def decode_attention(
    q: jax.Array,  # [B, N, H]
    k: KV,  # [B, K, S, H]
    v: KV,  # [B, K, S, H]
    lengths: jax.Array,  # [B] int32
    *,
    scale: float,
) -> jax.Array:
    """See `api.decode_attention`."""
    b, n, h = q.shape
    group = n // k.shape[1]
    positions = jnp.broadcast_to(lengths[:, None] - 1, (b, group))
    block_size = _BLOCK_SIZE.get(jax.default_backend(), _DEFAULT_BLOCK_SIZE)
    out = blockwise.attend(q.reshape(b, -1, group, h), positions, k, v, None, scale=scale, block_size=block_size)
    return out.reshape(b, n, h).astype(q.dtype)
