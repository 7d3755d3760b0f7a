"""Product of activations with a weight that lies as [out, in]."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.matmul import cpu, gpu, reference, tpu
from pallas_kernels.matmul.spread import spread
from pallas_kernels.observed import Observed
from pallas_kernels.partition import Names
from pallas_kernels.quantized import QuantizedArray

BACKENDS = {"cpu": cpu.matmul, "gpu": gpu.matmul, "tpu": tpu.matmul, "xla": reference.matmul}
"""They leave out a weight's offsets, which `matmul` adds."""


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
    run = partial(dispatch.run, "matmul", BACKENDS, implementation, spread=by_names)
    if not isinstance(w, QuantizedArray) or w.offsets is None:
        return run(x, w, out_dtype=out_dtype)
    y = run(x, dataclasses.replace(w, offsets=None), out_dtype=jnp.float32)
    return (y + _offsets_product(x, w.offsets)).astype(out_dtype)


def _offsets_product(x: jax.Array, offsets: jax.Array) -> jax.Array:
    """Offsets [N, G] times the sums of the groups of x [..., K]: float32 [..., N]."""
    groups = x.reshape(*x.shape[:-1], offsets.shape[1], -1)
    return reference.matmul(jnp.sum(groups, axis=-1, dtype=jnp.float32), offsets, out_dtype=jnp.float32)
