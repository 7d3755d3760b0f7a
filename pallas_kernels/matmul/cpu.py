"""`matmul` on a CPU for few rows and a weight of 16 bits: the time of reading the weight once."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu import library

# Beyond, arithmetic is the limit and XLA is as good: with AVX2 from 16 rows on, with AVX-512 after 32.
MAX_ROWS = 16


def matmul(
    x: jax.Array,  # [..., K]
    w: jax.Array,  # [N, K]
    *,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """See `api.matmul`.

    There is no derivative, and `vmap` is a loop. XLA does not partition the call: a weight that is sharded over devices
    would be gathered, so such a program chooses other backends, see `dispatch.prefer`.

    Raises:
      NotImplementedError: another platform, type of weight or number of rows, or there are no compiled kernels.
    """
    rows = math.prod(x.shape[:-1])
    widest = library.widest_instruction_set()
    if w.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"matmul on a CPU: bfloat16 or float16 weights, not {w.dtype}")
    if not 1 <= rows <= MAX_ROWS or 0 in w.shape:
        raise NotImplementedError(f"matmul on a CPU: 1 to {MAX_ROWS} rows and a weight, not {rows} and {w.shape}")
    if jax.default_backend() != "cpu":
        raise NotImplementedError(f"matmul on a CPU: the platform is {jax.default_backend()}")
    if widest is None or not library.available():
        raise NotImplementedError("matmul on a CPU: no compiled kernels")
    out = jax.ShapeDtypeStruct((rows, w.shape[0]), jnp.float32)
    product = jax.ffi.ffi_call("phi4mm_matmul", out, vmap_method="sequential")
    y = product(x.reshape(rows, -1).astype(w.dtype), w, widest=np.int64(widest))
    return y.astype(out_dtype).reshape(*x.shape[:-1], w.shape[0])
