"""`matmul` in XLA."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized import QuantizedArray

_FEW_ROWS = 128
"""Up to so many, XLA:CPU is faster with the weight as the first factor, for it packs the second: 1.1 to 2 times, in
float32 up to 4."""


def matmul(
    x: jax.Array,  # [..., K]
    w: jax.Array | QuantizedArray,  # [N, K]
    *,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """See `api.matmul`."""
    # The rows are one axis: otherwise jax 0.10 transposes w inside a loop, and hoists the copy out of it.
    rows = x.reshape(-1, x.shape[-1])
    if not isinstance(w, QuantizedArray):
        y = _dot(rows.astype(w.dtype), w, jnp.float32)
    elif w.activations == "int8":
        y = _integer_product(rows, w)
    elif w.scales.shape[1] == 1:
        # One scale per row moves out of the sum, and values of 8 bits are exact in any float.
        y = _dot(rows.astype(w.dtype), w.values.astype(w.dtype), jnp.float32) * _row(w.scales[:, 0])
    else:
        y = _dot(rows.astype(w.dtype), w.dequantize(), jnp.float32)
    return y.astype(out_dtype).reshape(*x.shape[:-1], w.shape[0])


def _dot(x: jax.Array, w: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x [M, K] @ w [N, K].T, both of one type, accumulated in `dtype`."""
    # XLA:CPU has one kernel each for bfloat16 with float32 sums and int8 with int32 sums; any other dot converts all of
    # w. Neither takes a lone row, so a row of zeros joins it: 10x faster, and free on a TPU, whose tiles have 8 rows.
    lone_row = x.shape[0] == 1 and w.dtype != jnp.float32
    padded = jnp.pad(x, ((0, 1), (0, 0))) if lone_row else x
    dot = partial(lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=dtype)
    if jax.default_backend() == "cpu" and x.shape[0] <= _FEW_ROWS:
        y = lax.optimization_barrier(dot(w, padded)).T  # without the barrier XLA would exchange them again
    else:
        y = dot(padded, w)
    return y[: x.shape[0]]


def _integer_product(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """The product with x rounded to int8: float32 [M, N]."""
    count = w.scales.shape[1]
    rounded, scales = round_groups(x, count)
    values = w.values.reshape(w.shape[0], count, -1).astype(jnp.int8)
    weight_scales = w.scales.astype(jnp.float32)
    y = jnp.zeros((x.shape[0], w.shape[0]), jnp.float32)
    for group in range(count):
        part = _dot(rounded[:, group], values[:, group], jnp.int32).astype(jnp.float32)
        y += part * scales[:, group, None] * _row(weight_scales[:, group])
    return y


def round_groups(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Rounds activations to int8, with a scale for each row and group of columns.

    Args:
      x: [M, K], any float type.
      count: groups of a row; divides K.

    Returns:
      Values [M, count, K / count] int8 and scales [M, count] float32; a group of zeros has the scale 0.
    """
    groups = x.astype(jnp.float32).reshape(x.shape[0], count, x.shape[1] // count)
    scales = jnp.max(jnp.abs(groups), axis=-1) / 127
    rounded = jnp.round(groups / jnp.where(scales == 0, 1, scales)[:, :, None]).astype(jnp.int8)
    return rounded, scales


def _row(vector: jax.Array) -> jax.Array:
    """[N] -> float32 [1, N]."""
    return vector.astype(jnp.float32)[None, :]
