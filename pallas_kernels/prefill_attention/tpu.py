"""`prefill_attention` on a TPU: a Pallas kernel that skips what lies behind the diagonal or the live keys."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import flash
from pallas_kernels.kv import KV, QuantizedKV, product_dtype

# Of a step. For a query and key of three heads a v5e then needs 0.0196 bundles of instructions, half of them with work
# for the matrix unit; with 512 keys 0.0312, with 512 queries 0.0190 but more behind the diagonal.
_QUERIES = 256
_KEYS = 1024
_TILE_ROWS = 16  # of bfloat16


def prefill_attention(
    q: jax.Array,  # [B, T, N, H]
    k: KV,  # [C, K, S, H]
    v: KV,  # [C, K, S, H]
    q_start: jax.Array,  # [B] int32
    slots: jax.Array | None,  # [B] int32
    *,
    scale: float,
    block_size: int,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """See `api.prefill_attention`.

    The grid is (kv heads, steps), with a step for each block of keys that a block of queries may see, one block of
    queries after the other. A step holds the queries [queries, group * H] of one kv head, a block of its keys and
    values, and the scores [group * queries, keys]. The kv heads may be shared by the cores of a chip that has two.

    There is no derivative. XLA does not partition the call: over several devices see `partition`.

    Args:
      q: as there.
      k: as there.
      v: as there.
      q_start: as there.
      slots: as there.
      scale: as there.
      block_size: not used; the blocks are chosen for the chip.
      interpret: run without a TPU, see `pl.pallas_call`.

    Raises:
      NotImplementedError: another type or width of the cache.
    """
    flash.check("prefill_attention", k, v)
    b, t, n, h = q.shape
    kv_heads, positions = k.shape[1:3]
    width = n // kv_heads * h
    queries, keys = min(_QUERIES, -(-t // _TILE_ROWS) * _TILE_ROWS), min(_KEYS, positions)
    parts = pl.cdiv(t, queries)
    slots = jnp.arange(b, dtype=jnp.int32) if slots is None else slots
    # The keys that the last query of each block sees.
    ends = jnp.minimum((jnp.arange(parts, dtype=jnp.int32) + 1) * queries, t)
    lengths = jnp.clip(q_start[:, None] + ends[None, :], 1, positions).reshape(-1)
    blocks, indices, steps = flash.live_blocks(lengths, keys, pl.cdiv(positions, keys))

    def of_queries(head, i, blocks, *_):
        return blocks[i] // parts, blocks[i] % parts, head

    def of_keys(head, i, blocks, indices, lengths, starts, slots):
        return slots[blocks[i] // parts], head, indices[i], 0

    def of_scales(head, i, blocks, indices, lengths, starts, slots):
        return slots[blocks[i] // parts], 0, indices[i]

    values = pl.BlockSpec((1, 1, keys, h), of_keys)
    cache = QuantizedKV(values, pl.BlockSpec((1, kv_heads, keys), of_scales)) if isinstance(k, QuantizedKV) else values
    whole = pl.BlockSpec((1, queries, width), of_queries)
    kept = flash.in_memory((k, v), interpret)
    out = pl.pallas_call(
        functools.partial(_step, scale=scale, parts=parts),
        out_shape=jax.ShapeDtypeStruct((b, t, n * h), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(kv_heads, steps),
            in_specs=[whole, cache, cache],
            out_specs=whole,
            scratch_shapes=flash.sums_shapes(width // h * queries, width=h),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=f"prefill_attention_{queries}x{keys}",
    )(blocks, indices, lengths, q_start, slots, q.reshape(b, t, n * h).astype(product_dtype(k)), *kept)
    return out.reshape(b, t, n, h)


def _step(
    blocks: jax.Array,  # [B * parts * most] int32: block of queries
    indices: jax.Array,  # [B * parts * most] int32: block of keys
    lengths: jax.Array,  # [B * parts] int32: keys that a block of queries sees
    starts: jax.Array,  # [B] int32
    slots: jax.Array,  # [B] int32
    q: jax.Array,  # [1, queries, group * H]
    k: KV,  # [1, 1, keys, H], scales [1, K, keys]
    v: KV,  # [1, 1, keys, H], scales [1, K, keys]
    out: jax.Array,  # [1, queries, group * H]
    *state: jax.Array,  # [group * queries, ...] float32, see `flash.sums_shapes`
    scale: float,
    parts: int,
) -> None:
    """A block of queries of a row that read one kv head, and a block of keys; the arrays are references."""
    head, step = pl.program_id(0), pl.program_id(1)
    block, index = blocks[step], indices[step]
    queries, keys, h = q.shape[1], *k.shape[2:]
    group = q.shape[2] // h
    first = index * keys

    @pl.when(index == 0)
    def _start() -> None:
        flash.clear(*state)

    rows = jnp.concatenate([q[0, :, i * h : (i + 1) * h] for i in range(group)])
    shape = group * queries, keys
    positions = lax.broadcasted_iota(jnp.int32, (group, queries, keys), 1).reshape(shape)
    positions += starts[block // parts] + block % parts * queries - first
    visible = lax.broadcasted_iota(jnp.int32, shape, 1) <= positions
    of_head = (flash.block_of_head(kv, 0, head) for kv in (k, v))
    flash.add_block(rows, *of_head, visible, lengths[block] - first, *state, scale=scale)

    @pl.when(first + keys >= lengths[block])
    def _end() -> None:
        _, total, sums = state
        attended = (sums[...] / total[...]).astype(out.dtype)
        for i in range(group):
            out[0, :, i * h : (i + 1) * h] = attended[i * queries : (i + 1) * queries]
