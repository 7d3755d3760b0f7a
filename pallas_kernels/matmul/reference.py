"""`matmul` in XLA."""

import math

import jax
import jax.numpy as jnp
from jax import lax


def matmul(
    x: jax.Array,  # [..., K]
    w: jax.Array,  # [N, K]
    *,
    out_dtype: jax.typing.DTypeLike,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """See `api.matmul`."""
    # The dot itself gives float32: XLA:CPU has a bfloat16 kernel for that only, anything else converts all of w.
    # It has none for a single row either, so a row of zeros joins it: 10x faster there, and free elsewhere
    # (a TPU tile has 8 rows).
    lone_row = math.prod(x.shape[:-1]) == 1 and w.dtype == jnp.bfloat16
    rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0))) if lone_row else x
    y = lax.dot_general(
        rows.astype(w.dtype),
        w,
        (((rows.ndim - 1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    if lone_row:
        y = y[:1].reshape(*x.shape[:-1], -1)
    return y.astype(out_dtype)
