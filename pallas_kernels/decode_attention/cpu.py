"""`decode_attention` on a CPU: the time of reading the live part of the cache once."""

import jax

from pallas_kernels.cpu.attention import attend
from pallas_kernels.kv import KV


def decode_attention(
    q: jax.Array,  # [B, N, H]
    k: KV,  # [B, K, S, H]
    v: KV,  # [B, K, S, H]
    lengths: jax.Array,  # [B] int32
    *,
    scale: float,
) -> jax.Array:
    """See `api.decode_attention`, and `cpu.attention.attend` for what it raises.

    The products take float32 queries and weights, whatever the cache's type is.
    """
    return attend("decode_attention", q, k, v, lengths, scale=scale)
