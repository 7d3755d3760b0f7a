"""What a TPU's attention kernels share: a step for each live block of keys, and the online softmax of one block."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv import KV, QuantizedKV


def check(operator: str, k: KV, v: KV) -> None:
    """Raises NotImplementedError for a type or width of the cache [C, K, S, H] that the kernels do not take."""
    if k.dtype != v.dtype or k.dtype not in (jnp.bfloat16, jnp.int8):
        raise NotImplementedError(f"{operator} on a TPU: bfloat16 or int8, not {k.dtype} and {v.dtype}")
    if k.shape[3] % 128:
        raise NotImplementedError(f"{operator} on a TPU: heads of a multiple of 128, not {k.shape[3]}")


def in_memory(kv: tuple[KV, KV], interpret: bool | pltpu.InterpretParams) -> tuple[KV, KV]:
    """Keys and values that stay in HBM: XLA would bring a small cache to the chip and back, whole, to write to it.

    Only what is compiled can be told so, and of that a program's arrays, not those that lie there already.
    """
    if interpret or not isinstance(jax.tree.leaves(kv)[0], jax.core.Tracer):
        return kv
    return jax.tree.map(lambda a: pltpu.with_memory_space_constraint(a, pltpu.HBM), kv)


def live_blocks(lengths: jax.Array, block: int, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lines the live blocks of all rows up, one row after the other.

    Args:
      lengths: [B] int32, live keys of each row, at least 1.
      block: keys of a block.
      most: blocks of a row at most.

    Returns:
      Row [B * most] and block [B * most] of each step, and the number of steps.
    """
    counts = pl.cdiv(lengths, block)
    ends = jnp.cumsum(counts)
    steps = jnp.arange(lengths.shape[0] * most, dtype=jnp.int32)
    rows = jnp.sum(steps[:, None] >= ends[None, :-1], axis=1, dtype=jnp.int32)
    return rows, steps - (ends - counts)[rows], ends[-1]


def sums_shapes(*shape: int, width: int) -> list[pltpu.VMEM]:
    """Scratch of the softmax of queries [...shape]: largest score, sum of weights, weighted sum [..., width]."""
    return [pltpu.VMEM((*shape, n), jnp.float32) for n in (1, 1, width)]


def clear(largest: jax.Array, total: jax.Array, sums: jax.Array) -> None:
    """Before the first block; the arrays are references."""
    largest[...] = jnp.full_like(largest, -jnp.inf)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)


def add_block(
    q: jax.Array,  # [R, H]
    k: KV,  # [block, H], scales [1, block]
    v: KV,  # [block, H], scales [1, block]
    visible: jax.Array,  # [R or 1, block] bool: which keys a query sees; in the first block at least one
    live: jax.Array,  # int32: keys of the block that were written; the others may be nan
    largest: jax.Array,  # [R, 1] float32
    total: jax.Array,  # [R, 1] float32
    sums: jax.Array,  # [R, H] float32
    *,
    scale: float,
) -> None:
    """Adds a block of keys to the softmax of queries; the last three are references."""
    scores = scale * _dot(q, _floats(k), 1)
    if isinstance(k, QuantizedKV):
        scores *= k.scales
    scores = jnp.where(visible, scores, -jnp.inf)
    new_largest = jnp.maximum(largest[...], scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - new_largest)
    decay = jnp.exp(largest[...] - new_largest)
    largest[...] = new_largest
    total[...] = total[...] * decay + weights.sum(axis=-1, keepdims=True)
    values = _floats(v)
    # A weight of 0 does not silence what lies behind the last key.
    if isinstance(v, QuantizedKV):
        weights *= jnp.where(lax.broadcasted_iota(jnp.int32, v.scales.shape, 1) < live, v.scales, 0)
    else:
        values = jnp.where(lax.broadcasted_iota(jnp.int32, values.shape, 0) < live, values, 0)
    sums[...] = sums[...] * decay + _dot(weights.astype(values.dtype), values, 0)


def block_of_head(kv: KV, head: int, scales_row: jax.Array | int) -> KV:
    """A head's part [block, H] of a reference to [1, heads, block, H], whose scales are [1, any, block]."""
    if isinstance(kv, QuantizedKV):
        return QuantizedKV(kv.values[0, head], kv.scales[0, pl.ds(scales_row, 1)])
    return kv[0, head]


def _floats(kv: KV) -> jax.Array:
    """The numbers in `product_dtype`, before scales."""
    return kv.values.astype(jnp.bfloat16) if isinstance(kv, QuantizedKV) else kv


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """The product over the last axis of a and an axis of b, in float32."""
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
