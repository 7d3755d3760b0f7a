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
    _check_shapes(x, w)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    by_names = None if names is None else partial(spread, names=names)
    run = partial(dispatch.run, "matmul", BACKENDS, implementation, spread=by_names)
    if not isinstance(w, QuantizedArray) or w.offsets is None:
        return run(x, w, out_dtype=out_dtype)
    y = run(x, dataclasses.replace(w, offsets=None), out_dtype=jnp.float32)
    return (y + _offsets_product(x, w.offsets)).astype(out_dtype)


def gated_matmul(
    x: jax.Array,
    w: jax.Array | QuantizedArray | Observed,
    *,
    groups: int,
    out_dtype: jax.typing.DTypeLike | None = None,
    names: Names | None = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Returns `gated(matmul(x, w), groups)`, where a kernel can in one pass, which then rounds to `out_dtype` but once.

    Args:
      x: as in `matmul`.
      w: [N, K], as in `matmul`.
      groups: of w's rows, 1 or more; divides N, and a group has an even number of rows.
      out_dtype: type of the result; default x's.
      names: as in `matmul`.
      implementation: "cpu" or "xla", see `dispatch.run`; by None, what does not run in the former gates what `matmul`
        returns, with any kernel.

    Returns:
      [..., N / 2] of `out_dtype`.

    Raises:
      ValueError: the shapes do not fit.
    """
    weight = w.weight if isinstance(w, Observed) else w
    _check_shapes(x, weight)
    _check_groups(weight.shape[0], groups)
    out_dtype = x.dtype if out_dtype is None else out_dtype

    def apart(x: jax.Array, w: jax.Array | QuantizedArray | Observed, out_dtype: jax.typing.DTypeLike) -> jax.Array:
        return gated(matmul(x, w, out_dtype=out_dtype, names=names, implementation=implementation), groups)

    backends = {"cpu": partial(cpu.matmul, gated_groups=groups), "xla": apart}
    return dispatch.run("gated_matmul", backends, implementation, x, w, out_dtype=out_dtype)


def gated(x: jax.Array, groups: int) -> jax.Array:
    """Cuts the last axis of x [..., N] into groups of gates and as many values: values * silu(gates) [..., N / 2].

    The function silu is computed in float32.

    Raises:
      ValueError: the groups are not whole.
    """
    _check_groups(x.shape[-1], groups)
    gate, up = jnp.split(x.reshape(*x.shape[:-1], groups, -1), 2, axis=-1)
    return (up * jax.nn.silu(gate.astype(jnp.float32)).astype(x.dtype)).reshape(*x.shape[:-1], -1)


def _check_shapes(x: jax.Array, w: jax.Array | QuantizedArray) -> None:
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"matmul: x [..., K] and w [N, K] expected, got {x.shape} and {w.shape}")


def _check_groups(outputs: int, groups: int) -> None:
    if groups < 1 or outputs % (2 * groups):
        raise ValueError(f"gated: groups, 1 or more, of two halves each expected, got {groups} of {outputs} outputs")


def _offsets_product(x: jax.Array, offsets: jax.Array) -> jax.Array:
    """Offsets [N, G] times the sums of the groups of x [..., K]: float32 [..., N]."""
    groups = x.reshape(*x.shape[:-1], offsets.shape[1], -1)
    return reference.matmul(jnp.sum(groups, axis=-1, dtype=jnp.float32), offsets, out_dtype=jnp.float32)
