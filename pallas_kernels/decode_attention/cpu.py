"""`decode_attention` on a CPU: the time of reading the live part of the cache once."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu import library
from pallas_kernels.kv import KV, QuantizedKV


def decode_attention(
    q: jax.Array,  # [B, N, H]
    k: KV,  # [B, K, S, H]
    v: KV,  # [B, K, S, H]
    lengths: jax.Array,  # [B] int32
    *,
    scale: float,
) -> jax.Array:
    """See `api.decode_attention`.

    The products take float32 queries and weights, whatever the cache's type is. There is no derivative, and `vmap` is
    a loop. XLA does not partition the call: over several devices see `partition`.

    Raises:
      NotImplementedError: another platform, type or width of the cache, or there are no compiled kernels.
    """
    if k.dtype != v.dtype or k.dtype not in (jnp.float32, jnp.bfloat16, jnp.uint16, jnp.int8):
        types = f"{k.dtype} and {v.dtype}"
        raise NotImplementedError(f"decode_attention on a CPU: float32, bfloat16, uint16 or int8, not {types}")
    if k.shape[3] % 8 or 0 in k.shape:
        raise NotImplementedError(f"decode_attention on a CPU: heads of a multiple of 8, not a cache {k.shape}")
    if jax.default_backend() != "cpu":
        raise NotImplementedError(f"decode_attention on a CPU: the platform is {jax.default_backend()}")
    widest = library.widest_instruction_set()
    if widest is None or not library.available():
        raise NotImplementedError("decode_attention on a CPU: no compiled kernels")
    attend = jax.ffi.ffi_call(
        "phi4mm_decode_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32), vmap_method="sequential"
    )
    operands = (q.astype(jnp.float32), *_parts(k), *_parts(v), lengths)
    return attend(*operands, scale=np.float32(scale), widest=np.int64(widest)).astype(q.dtype)


def _parts(kv: KV) -> tuple[jax.Array, jax.Array]:
    """Values, and scales: none where they are floats."""
    return (kv.values, kv.scales) if isinstance(kv, QuantizedKV) else (kv, jnp.zeros((0,), jnp.float32))
