"""Product of activations with a weight that lies as [out, in]."""

from functools import partial

import jax

from pallas_kernels import dispatch
from pallas_kernels.matmul import cpu, reference, tpu
from pallas_kernels.matmul.spread import spread
from pallas_kernels.observed import Observed
from pallas_kernels.partition import Names
from pallas_kernels.quantized import QuantizedArray

BACKENDS = {"cpu": cpu.matmul, "tpu": tpu.matmul, "xla": reference.matmul}


def matmul(
    x: jax.Array,
    w: jax.Array | QuantizedArray | Observed,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
    names: Names | None = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Returns `x @ w.T`, accumulated in float32; `jax.default_matmul_precision` counts for float32 weights.

    Args:
      x: [..., K] activations, any float type; cast to the weight's type before the product.
      w: [N, K] weight, any float type, quantized, or observed.
      out_dtype: type of the result; default x's.
      names: of w's dimensions, by which a kernel finds its part on each of several devices (see `partition`); x's
        first dimension of several is "batch".
      implementation: see `dispatch.run`.

    Returns:
      [..., N] of `out_dtype`.

    Raises:
      ValueError: the shapes do not fit.
    """
    if isinstance(w, Observed):
        w.see(x)
        w = w.weight
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"matmul: x [..., K] and w [N, K] expected, got {x.shape} and {w.shape}")
    out_dtype = x.dtype if out_dtype is None else out_dtype
    by_names = None if names is None else partial(spread, names=names)
    return dispatch.run("matmul", BACKENDS, implementation, x, w, spread=by_names, out_dtype=out_dtype)
