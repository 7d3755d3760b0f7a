"""`matmul` over several devices: each multiplies with the part of the weight that it holds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from pallas_kernels.partition import Layout, Names
from pallas_kernels.quantized import QuantizedArray


def spread(
    layout: Layout,
    backend: Callable[..., jax.Array],
    x: jax.Array,  # [..., K]
    w: jax.Array | QuantizedArray,  # [N, K]
    *,
    out_dtype: jax.typing.DTypeLike,
    names: Names,
) -> jax.Array:
    """See `api.matmul` and `dispatch.run`.

    A weight that is cut by outputs needs no communication; of one that is cut by inputs, each device has a part of
    every sum, and the parts are added in float32.

    Raises:
      NotImplementedError: a cut through a group of columns that share a scale, or what the backend cannot do.
    """
    outputs, inputs = layout.spec(w.shape, names)
    if isinstance(w, QuantizedArray) and w.scales.shape[1] % layout.parts(inputs):
        raise NotImplementedError(f"matmul: {w.scales.shape[1]} groups of columns over {layout.parts(inputs)} devices")
    rows = [*layout.spec(x.shape[:1], ("batch",)), *[None] * (x.ndim - 2)] if x.ndim > 1 else []

    def product(x: jax.Array, w: jax.Array | QuantizedArray) -> jax.Array:
        if layout.parts(inputs) == 1:
            return backend(x, w, out_dtype=out_dtype)
        return lax.psum(backend(x, w, out_dtype=jnp.float32), inputs).astype(out_dtype)

    operands = PartitionSpec(*rows, inputs), PartitionSpec(outputs, inputs)
    return layout.call(product, operands, PartitionSpec(*rows, outputs))(x, w)
