"""`prefill_attention` on a CPU: two products of matrices for each tile of queries and block of keys."""

import jax
import jax.numpy as jnp

from pallas_kernels.cpu.attention import attend
from pallas_kernels.kv import KV


def prefill_attention(
    q: jax.Array,  # [B, T, N, H]
    k: KV,  # [C, K, S, H]
    v: KV,  # [C, K, S, H]
    q_start: jax.Array,  # [B] int32
    slots: jax.Array | None,  # [B] int32
    *,
    scale: float,
    block_size: int,  # XLA's; the kernel has its own
) -> jax.Array:
    """See `api.prefill_attention`, and `cpu.attention.attend` for what it raises.

    With a cache in fewer bits than 32 the products take bfloat16 where the processor multiplies it, and else float32.
    """
    rows = jnp.arange(q.shape[0], dtype=jnp.int32) if slots is None else slots
    return attend("prefill_attention", q, k, v, q_start, rows, scale=scale)
