"""What the kernels for Hopper GPUs (H100, H200) share; they are written in Mosaic GPU, one warpgroup for each block."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64
"""Of a product by one warpgroup."""
BLOCKS = 2 * 132
"""Thread blocks that run at once: two on each multiprocessor, so that one computes while the other waits."""
SHARED_BYTES = 227 << 10
"""Of a multiprocessor, for the blocks on it."""
_LOG = logging.getLogger(__name__)
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def check_device(operator: str) -> None:
    """Raises NotImplementedError where the program is not for a Hopper GPU."""
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) != "9.0":
        raise NotImplementedError(f"{operator} on a GPU: Hopper (H100, H200), not {device.device_kind}")


def require(operator: str, is_right: Callable[[], bool]) -> None:
    """Raises NotImplementedError where the program is not for a Hopper GPU, or the kernel fails on this one."""
    check_device(operator)
    if not is_right():
        raise NotImplementedError(f"{operator} on a GPU: the kernel fails on this one")


def prove(operator: str, cases: Callable[[], bool]) -> bool:
    """Runs small cases and says whether the kernel computes on this GPU what XLA does.

    The kernels have been interpreted and compiled, but run on no GPU yet: each must pass before it is used. That is
    when a program is traced, so the cases run in a thread of their own, where none is.
    """
    with ThreadPoolExecutor(1) as thread:
        try:
            right, reason = thread.submit(cases).result(), "it is wrong here"
        except jax.errors.JaxRuntimeError as error:
            right, reason = False, str(error)
    if not right:
        _LOG.warning("%s is left to XLA, as the kernel fails on this GPU: %s", operator, reason)
    return right


def close(y: jax.Array, expected: jax.Array) -> bool:
    """Whether two results differ by no more than the rounding of bfloat16."""
    return bool(jnp.allclose(y, expected, rtol=2e-2, atol=2e-2))


def tiles(columns: int, dtype: jax.typing.DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """How rows of so many columns lie in shared memory for the tensor cores: tiles of 8 rows of up to 128 bytes."""
    bits = bits_of(dtype)
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def bits_of(dtype: jax.typing.DTypeLike) -> int:
    """Of a value."""
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """Product by the tensor cores: a [64, k], an array or a reference, with the reference b [k, n] -> float32 [64, n].

    With `transposed`, b is [n, k].
    """

    def product(total: jax.Array) -> jax.Array:
        plgpu.wgmma(total, a, plgpu.transpose_ref(b, (1, 0)) if transposed else b)
        return total[...]

    columns = b.shape[0] if transposed else b.shape[1]
    return pl.run_scoped(product, plgpu.ACC((a.shape[0], columns), jnp.float32))
