"""The compiled kernels of attention over a cache."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu import library
from pallas_kernels.kv import KV, QuantizedKV


def attend(operator: str, q: jax.Array, k: KV, v: KV, *rows: jax.Array, scale: float) -> jax.Array:
    """Calls the kernel of an operator.

    There is no derivative, and `vmap` is a loop. XLA does not partition the call: over several devices see
    `partition`.

    Args:
      operator: "decode_attention" or "prefill_attention".
      q: its queries, any float type.
      k: [C, K, S, H] cached keys, see `kv`.
      v: [C, K, S, H] cached values.
      *rows: its int32 operands.
      scale: factor on the scores.

    Returns:
      The output, of q's shape and type.

    Raises:
      NotImplementedError: another platform, type or width of the cache, or there are no compiled kernels.
    """
    if k.dtype != v.dtype or k.dtype not in (jnp.float32, jnp.bfloat16, jnp.uint16, jnp.int8):
        types = f"{k.dtype} and {v.dtype}"
        raise NotImplementedError(f"{operator} on a CPU: float32, bfloat16, uint16 or int8, not {types}")
    if k.shape[3] % 8 or 0 in k.shape:
        raise NotImplementedError(f"{operator} on a CPU: heads of a multiple of 8, not a cache {k.shape}")
    if jax.default_backend() != "cpu":
        raise NotImplementedError(f"{operator} on a CPU: the platform is {jax.default_backend()}")
    widest = library.widest_instruction_set()
    if widest is None or not library.available():
        raise NotImplementedError(f"{operator} on a CPU: no compiled kernels")
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    kernel = jax.ffi.ffi_call(f"phi4mm_{operator}", out, vmap_method="sequential")
    operands = (q.astype(jnp.float32), *_parts(k), *_parts(v), *rows)
    return kernel(*operands, scale=np.float32(scale), widest=np.int64(widest)).astype(q.dtype)


def _parts(kv: KV) -> tuple[jax.Array, jax.Array]:
    """Values, and scales: none where they are floats."""
    return (kv.values, kv.scales) if isinstance(kv, QuantizedKV) else (kv, jnp.zeros((0,), jnp.float32))
