"""`decode_attention` on a TPU: a Pallas kernel that reads the live part of the cache once."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv import KV, QuantizedKV, product_dtype

# Keys of a step. With four kv heads of bfloat16 it then reads a MiB, which hides what a step costs besides (about
# 0.35 us); more would read more behind the last live key.
_BLOCK = 512


def decode_attention(
    q: jax.Array,  # [B, N, H]
    k: KV,  # [B, K, S, H]
    v: KV,  # [B, K, S, H]
    lengths: jax.Array,  # [B] int32
    *,
    scale: float,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """See `api.decode_attention`.

    The grid has a step for each live block of keys, one row after the other: short rows do not wait for long ones, and
    a row's first keys arrive during the last step of the row before. The kv heads come in two halves, which the cores
    of a chip that has two of them share.

    There is no derivative. XLA does not partition the call: over several devices see `partition`.

    Args:
      q: as there.
      k: as there.
      v: as there.
      lengths: as there.
      scale: as there.
      interpret: run without a TPU, see `pl.pallas_call`.

    Raises:
      NotImplementedError: another type or width of the cache.
    """
    b, n, h = q.shape
    kv_heads, positions = k.shape[1:3]
    if k.dtype != v.dtype or k.dtype not in (jnp.bfloat16, jnp.int8):
        raise NotImplementedError(f"decode_attention on a TPU: bfloat16 or int8, not {k.dtype} and {v.dtype}")
    if h % 128:
        raise NotImplementedError(f"decode_attention on a TPU: heads of a multiple of 128, not {h}")
    block, group, halves = min(_BLOCK, positions), n // kv_heads, math.gcd(kv_heads, 2)
    heads = kv_heads // halves
    lengths = jnp.clip(lengths, 1, positions)
    rows, blocks, steps = _schedule(lengths, block, pl.cdiv(positions, block))

    values = pl.BlockSpec((1, heads, block, h), lambda half, i, rows, blocks, _: (rows[i], half, blocks[i], 0))
    # Half of the heads are no block of an array whose last two dimensions are heads and keys.
    scales = pl.BlockSpec((1, kv_heads, block), lambda half, i, rows, blocks, _: (rows[i], 0, blocks[i]))
    queries = pl.BlockSpec((1, heads, group, h), lambda half, i, rows, *_: (rows[i], half, 0, 0))
    cache = QuantizedKV(values, scales) if isinstance(k, QuantizedKV) else values
    out = pl.pallas_call(
        functools.partial(_step, scale=scale, block=block),
        out_shape=jax.ShapeDtypeStruct((b, kv_heads, group, h), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(halves, steps),
            in_specs=[queries, cache, cache],
            out_specs=queries,
            scratch_shapes=[pltpu.VMEM((heads, group, width), jnp.float32) for width in (1, 1, h)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=f"decode_attention_{block}",
    )(rows, blocks, lengths, q.reshape(b, kv_heads, group, h).astype(product_dtype(k)), k, v)
    return out.reshape(b, n, h)


def _schedule(lengths: jax.Array, block: int, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row [B * most] and block [B * most] of each step, and the number of steps; a row has at most `most`."""
    counts = pl.cdiv(lengths, block)
    ends = jnp.cumsum(counts)
    steps = jnp.arange(lengths.shape[0] * most, dtype=jnp.int32)
    rows = jnp.sum(steps[:, None] >= ends[None, :-1], axis=1, dtype=jnp.int32)
    return rows, steps - (ends - counts)[rows], ends[-1]


def _step(
    rows: jax.Array,  # [B * most] int32
    blocks: jax.Array,  # [B * most] int32
    lengths: jax.Array,  # [B] int32
    q: jax.Array,  # [1, heads, group, H]
    k: KV,  # [1, heads, block, H], scales [1, K, block]
    v: KV,  # [1, heads, block, H], scales [1, K, block]
    out: jax.Array,  # [1, heads, group, H]
    largest: jax.Array,  # [heads, group, 1] float32
    total: jax.Array,  # [heads, group, 1] float32
    sums: jax.Array,  # [heads, group, H] float32
    *,
    scale: float,
    block: int,
) -> None:
    """Half of the kv heads of a row and one block of keys (online softmax); the arrays are references."""
    half, step = pl.program_id(0), pl.program_id(1)
    row, index = rows[step], blocks[step]

    @pl.when(index == 0)
    def _start() -> None:
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    live = lengths[row] - index * block
    is_live = lax.broadcasted_iota(jnp.int32, (1, block), 1) < live
    heads = q.shape[1]
    for head in range(heads):
        scores = scale * _dot(q[0, head], _floats(k, head), 1)
        if isinstance(k, QuantizedKV):
            scores *= k.scales[0, pl.ds(half * heads + head, 1)]
        scores = jnp.where(is_live, scores, -jnp.inf)
        new_largest = jnp.maximum(largest[head], scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_largest)
        decay = jnp.exp(largest[head] - new_largest)
        largest[head] = new_largest
        total[head] = total[head] * decay + weights.sum(axis=-1, keepdims=True)
        values = _floats(v, head)
        # A weight of 0 does not silence what lies behind the last key.
        if isinstance(v, QuantizedKV):
            weights *= jnp.where(is_live, v.scales[0, pl.ds(half * heads + head, 1)], 0)
        else:
            values = jnp.where(lax.broadcasted_iota(jnp.int32, values.shape, 0) < live, values, 0)
        sums[head] = sums[head] * decay + _dot(weights.astype(values.dtype), values, 0)

    @pl.when((index + 1) * block >= lengths[row])
    def _end() -> None:
        out[0] = (sums[...] / total[...]).astype(out.dtype)


def _floats(kv: KV, head: int) -> jax.Array:
    """The block of a head [block, H] in `product_dtype`, before scales."""
    return kv.values[0, head].astype(jnp.bfloat16) if isinstance(kv, QuantizedKV) else kv[0, head]


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """The product over the last axis of a and an axis of b, in float32."""
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
