"""`matmul` on a CPU: of 16 bit weights with few rows, in the time of reading them once; of quantized ones with any."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu import library
from pallas_kernels.quantized import QuantizedArray

# With a 16 bit weight arithmetic is the limit beyond, and XLA is as good: with AVX2 from 16 rows on, with AVX-512 after
# 32. A quantized one XLA widens first, in memory, and then multiplies at half the rate of integers.
MAX_ROWS = 16
MANY_ROWS = 24
"""From here on the kernel of a quantized weight is another one (quantized.cc), which can gate its results."""


def matmul(
    x: jax.Array,  # [..., K]
    w: jax.Array | QuantizedArray,  # [N, K]
    *,
    out_dtype: jax.typing.DTypeLike,
    gated_groups: int = 0,
) -> jax.Array:
    """See `api.matmul`, and with `gated_groups` `api.gated_matmul`.

    There is no derivative, and `vmap` is a loop. XLA does not partition the call: over several devices see `partition`.

    With a quantized weight x is rounded to int8, each row and block of at most 128 columns with a scale of its own,
    whatever the weight says of `activations`, from MANY_ROWS on a power of two; a row that is not finite becomes nan.

    Raises:
      NotImplementedError: another platform, type of weight, size of its groups or number of rows, or there are no
        compiled kernels; nothing is gated with a 16 bit weight, one with offsets or fewer than MANY_ROWS rows.
    """
    rows = math.prod(x.shape[:-1])
    widest = library.widest_instruction_set()
    if gated_groups and (rows < MANY_ROWS or not isinstance(w, QuantizedArray) or w.offsets is not None):
        raise NotImplementedError(f"gated matmul on a CPU: {MANY_ROWS} rows or more, few bits, no offsets")
    if isinstance(w, QuantizedArray):
        _check_quantized(w)
    elif w.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"matmul on a CPU: bfloat16 or float16 weights, not {w.dtype}")
    elif rows > MAX_ROWS:
        raise NotImplementedError(f"matmul on a CPU: at most {MAX_ROWS} rows with a 16 bit weight, not {rows}")
    if 0 in (rows, *w.shape):
        raise NotImplementedError(f"matmul on a CPU: rows and a weight, not {rows} and {w.shape}")
    if jax.default_backend() != "cpu":
        raise NotImplementedError(f"matmul on a CPU: the platform is {jax.default_backend()}")
    if widest is None or not library.available():
        raise NotImplementedError("matmul on a CPU: no compiled kernels")
    if isinstance(w, QuantizedArray):
        target, dtype, weight = "phi4mm_quantized_matmul", jnp.float32, (w.values, w.scales)
        attributes = {"gated_groups": np.int64(gated_groups)}
    else:
        target, dtype, weight, attributes = "phi4mm_matmul", w.dtype, (w,), {}
    outputs = w.shape[0] // 2 if gated_groups else w.shape[0]
    product = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((rows, outputs), jnp.float32), vmap_method="sequential")
    y = product(x.reshape(rows, -1).astype(dtype), *weight, widest=np.int64(widest), **attributes)
    return y.astype(out_dtype).reshape(*x.shape[:-1], outputs)


def _check_quantized(w: QuantizedArray) -> None:
    """Raises NotImplementedError where the kernel cannot do it."""
    columns, groups = w.shape[1], w.scales.shape[1]
    if w.values.dtype not in (jnp.int8, jnp.int4) or w.scales.dtype not in (jnp.bfloat16, jnp.float32):
        types = f"{w.values.dtype} and {w.scales.dtype}"
        raise NotImplementedError(f"matmul on a CPU: int8 or int4 and bfloat16 or float32 scales, not {types}")
    if columns % 32:
        raise NotImplementedError(f"matmul on a CPU: a multiple of 32 columns, not {columns}")
    size = columns // max(1, groups)
    if groups < 1 or size * groups != columns or (groups > 1 and size not in (32, 64) and size % 128):
        raise NotImplementedError(
            f"matmul on a CPU: whole rows or groups of 32, 64 or a multiple of 128 columns, not {columns} / {groups}"
        )
