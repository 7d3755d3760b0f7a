"""`decode_attention` on a TPU: a Pallas kernel that reads the live part of the cache once."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import flash
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
    flash.check("decode_attention", k, v)
    b, n, h = q.shape
    kv_heads, positions = k.shape[1:3]
    block, group, halves = min(_BLOCK, positions), n // kv_heads, math.gcd(kv_heads, 2)
    heads = kv_heads // halves
    lengths = jnp.clip(lengths, 1, positions)
    rows, blocks, steps = flash.live_blocks(lengths, block, pl.cdiv(positions, block))

    values = pl.BlockSpec((1, heads, block, h), lambda half, i, rows, blocks, _: (rows[i], half, blocks[i], 0))
    # Half of the heads are no block of an array whose last two dimensions are heads and keys.
    scales = pl.BlockSpec((1, kv_heads, block), lambda half, i, rows, blocks, _: (rows[i], 0, blocks[i]))
    queries = pl.BlockSpec((1, heads, group, h), lambda half, i, rows, *_: (rows[i], half, 0, 0))
    cache = QuantizedKV(values, scales) if isinstance(k, QuantizedKV) else values
    kept = flash.in_memory((k, v), interpret)
    out = pl.pallas_call(
        functools.partial(_step, scale=scale, block=block),
        out_shape=jax.ShapeDtypeStruct((b, kv_heads, group, h), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(halves, steps),
            in_specs=[queries, cache, cache],
            out_specs=queries,
            scratch_shapes=flash.sums_shapes(heads, group, width=h),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=f"decode_attention_{block}",
    )(rows, blocks, lengths, q.reshape(b, kv_heads, group, h).astype(product_dtype(k)), *kept)
    return out.reshape(b, n, h)


def _step(
    rows: jax.Array,  # [B * most] int32
    blocks: jax.Array,  # [B * most] int32
    lengths: jax.Array,  # [B] int32
    q: jax.Array,  # [1, heads, group, H]
    k: KV,  # [1, heads, block, H], scales [1, K, block]
    v: KV,  # [1, heads, block, H], scales [1, K, block]
    out: jax.Array,  # [1, heads, group, H]
    *state: jax.Array,  # [heads, group, ...] float32, see `flash.sums_shapes`
    scale: float,
    block: int,
) -> None:
    """Half of the kv heads of a row and one block of keys; the arrays are references."""
    half, step = pl.program_id(0), pl.program_id(1)
    row, index = rows[step], blocks[step]

    @pl.when(index == 0)
    def _start() -> None:
        flash.clear(*state)

    live = lengths[row] - index * block
    visible = lax.broadcasted_iota(jnp.int32, (1, block), 1) < live
    heads = q.shape[1]
    for head in range(heads):
        keys, values = (flash.block_of_head(kv, head, half * heads + head) for kv in (k, v))
        flash.add_block(q[0, head], keys, values, visible, live, *(s.at[head] for s in state), scale=scale)

    @pl.when((index + 1) * block >= lengths[row])
    def _end() -> None:
        _, total, sums = state
        out[0] = (sums[...] / total[...]).astype(out.dtype)
