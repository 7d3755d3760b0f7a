"""`decode_attention` on a Hopper GPU: a kernel that reads the live part of the cache once.

XLA copies each block of the cache before it reads it, up to the longest row's last, and its loop waits for the host.
The kernel compiles for such a GPU, is right when interpreted, and has not been timed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.decode_attention import reference
from pallas_kernels.kv import KV, QuantizedKV, encode

_WIDTH = 128  # of a head
_BLOCK = 64  # keys of a step
_STAGES = 3  # steps whose keys and values are in shared memory


def decode_attention(
    q: jax.Array,  # [B, N, H]
    k: KV,  # [B, K, S, H]
    v: KV,  # [B, K, S, H]
    lengths: jax.Array,  # [B] int32
    *,
    scale: float,
    interpret: Any = None,
) -> jax.Array:
    """See `api.decode_attention`.

    There is no derivative. XLA does not partition the call: a program over several devices chooses other backends, see
    `dispatch.prefer`.

    Args:
      q: as there.
      k: as there.
      v: as there.
      lengths: as there.
      scale: as there.
      interpret: run without a GPU, see `plgpu.kernel`.

    Raises:
      NotImplementedError: another device, type of the cache, width or number of heads, or a short cache.
    """
    n, h = q.shape[1:]
    kv_heads, positions = k.shape[1:3]
    group = n // kv_heads
    if k.dtype != v.dtype or k.dtype not in (jnp.bfloat16, jnp.int8):
        raise NotImplementedError(f"decode_attention on a GPU: bfloat16 or int8, not {k.dtype} and {v.dtype}")
    if h != _WIDTH or group > hopper.ROWS:
        raise NotImplementedError(
            f"decode_attention on a GPU: heads of {_WIDTH}, up to {hopper.ROWS} for each kv head, not {h} and {group}"
        )
    if positions < _BLOCK or positions % 4:
        raise NotImplementedError(f"decode_attention on a GPU: {_BLOCK} or more keys, in fours, not {positions}")
    if not interpret:
        hopper.require("decode_attention", is_right)
    return _attend(q, k, v, lengths, scale, interpret)


@functools.cache
def is_right(interpret: Any = None) -> bool:
    """Whether the kernel attends rightly to both kinds of cache on this GPU, see `hopper.prove`."""

    def cases() -> bool:
        keys = jax.random.split(jax.random.key(0), 3)
        q, *cached = (jax.random.normal(key, (2, n, 192, _WIDTH)) for key, n in zip(keys, (3, 1, 1), strict=True))
        lengths, scale = jnp.asarray([1, 150]), _WIDTH**-0.5

        def right(dtype: jnp.dtype) -> bool:
            k, v = (encode(vectors, dtype) for vectors in cached)
            expected = reference.decode_attention(q[:, :, 0], k, v, lengths, scale=scale)
            return hopper.close(_attend(q[:, :, 0], k, v, lengths, scale, interpret), expected)

        return right(jnp.bfloat16) and right(jnp.int8)

    return hopper.prove("decode_attention", cases)


def _attend(q: jax.Array, k: KV, v: KV, lengths: jax.Array, scale: float, interpret: Any) -> jax.Array:
    """The kernel, its parts put together."""
    b, n, h = q.shape
    kv_heads, positions = k.shape[1:3]
    group = n // kv_heads
    attention = _Attention(
        rows=b, kv_heads=kv_heads, positions=positions, quantized=isinstance(k, QuantizedKV), scale=scale, group=group
    )
    queries = q.astype(jnp.bfloat16).reshape(b, kv_heads, group, h)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, hopper.ROWS - group), (0, 0)))
    parts = (k.values, v.values, k.scales, v.scales) if isinstance(k, QuantizedKV) else (k, v)
    lengths = jnp.clip(lengths, 1, positions)
    sums, largest, total = (part[:, :, :, :group] for part in _call(attention, interpret)(lengths, queries, *parts))
    # A part without keys has 0 for its sums, and for its largest score -inf.
    share = jnp.exp(largest - largest.max(axis=2, keepdims=True))
    out = (sums * share[..., None]).sum(axis=2) / (total * share).sum(axis=2)[..., None]
    return out.astype(q.dtype).reshape(b, n, h)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attention:
    """Sizes of queries [B, K, group, H] and a cache [B, K, S, H]."""

    rows: int  # B
    kv_heads: int  # K
    positions: int  # S
    group: int
    quantized: bool
    scale: float

    @property
    def splits(self) -> int:
        """Parts of the live keys, each for a block of its own: as many as keep the GPU busy."""
        return max(1, min(hopper.BLOCKS // (self.rows * self.kv_heads), pl.cdiv(self.positions, _BLOCK)))


@functools.cache  # or a model would trace and lower the same kernel anew for each of its layers
def _call(attention: _Attention, interpret: Any) -> Callable[..., list[jax.Array]]:
    """The kernel for lengths [B], queries [B, K, 64, H] and the cache, perhaps with scales, and its parts' results.

    These are float32: sums of values [B, K, splits, group or more, H], and of their weights [B, K, splits, 64], which
    are relative to the largest score [B, K, splits, 64].

    The grid is (B, K, splits): a block takes its even part of the live keys of a row, however many they are. A step
    holds keys and values [64, H], and int8 once more as bfloat16: 107 KiB of shared memory with the queries and three
    steps under way. The queries of a kv head fill few of the 64 rows of a product, which costs nothing: at the speed of
    the memory the tensor cores are idle two thirds of the time.
    """
    b, kv_heads, splits = attention.rows, attention.kv_heads, attention.splits
    held, bf16 = pl.cdiv(attention.group, 8) * 8, jnp.bfloat16

    def kernel(lengths, queries, *refs):
        cache, (sums_out, largest_out, total_out, q, sums, largest, total, arrived, *wide) = refs[:count], refs[count:]
        row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
        plgpu.copy_gmem_to_smem(queries.at[row, head], q, arrived)
        length = lengths[row]
        blocks = pl.cdiv(length, _BLOCK)
        share = pl.cdiv(blocks, splits)
        first = split * share
        steps = jnp.maximum(jnp.minimum(share, blocks - first), 0)

        def place(i):
            # The last block moves back to end with the cache; the keys that it then repeats are masked.
            return row, head, jnp.minimum((first + i) * _BLOCK, attention.positions - _BLOCK)

        vectors = plgpu.BlockSpec(
            (None, None, pl.Element(_BLOCK), _WIDTH),
            lambda i: (*place(i), 0),
            transforms=hopper.tiles(_WIDTH, cache[0].dtype),
        )
        scales = plgpu.BlockSpec((None, None, pl.Element(_BLOCK)), place)
        plgpu.barrier_wait(arrived)

        def step(index, *operands):
            (i,), (*block, state) = index, operands
            return _step(attention, q, block, wide, state, length, (first + i) * _BLOCK, place(i)[2])

        state = plgpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=[vectors, vectors, *[scales] * (count - 2)],
            max_concurrent_steps=_STAGES,
            init_carry=(
                jnp.zeros(sums.shape, jnp.float32),
                jnp.full(largest.shape, -jnp.inf, jnp.float32),
                jnp.zeros(total.shape, jnp.float32),
            ),
        )(*cache)
        for ref, value in zip((sums, largest, total), state, strict=True):
            ref[...] = value
        plgpu.commit_smem()
        at = row, head, split
        plgpu.copy_smem_to_gmem(sums.at[:held], sums_out.at[at])
        plgpu.copy_smem_to_gmem(largest, largest_out.at[at])
        plgpu.copy_smem_to_gmem(total, total_out.at[at])
        plgpu.wait_smem_to_gmem(0)

    count = 4 if attention.quantized else 2
    vectors = plgpu.SMEM((_BLOCK, _WIDTH), bf16, transforms=hopper.tiles(_WIDTH, bf16))
    stats = [plgpu.SMEM((hopper.ROWS,), jnp.float32)] * 2
    part = jax.ShapeDtypeStruct((b, kv_heads, splits, hopper.ROWS), jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((b, kv_heads, splits, held, _WIDTH), jnp.float32), part, part],
        grid=(b, kv_heads, splits),
        grid_names=("row", "head", "split"),
        scratch_types=[
            plgpu.SMEM((hopper.ROWS, _WIDTH), bf16, transforms=hopper.tiles(_WIDTH, bf16)),
            plgpu.SMEM((hopper.ROWS, _WIDTH), jnp.float32),
            *stats,
            plgpu.Barrier(),
            *([vectors] * 2 if attention.quantized else []),
        ],
        compiler_params=hopper.PARAMS,
        interpret=interpret,
        kernel_name=f"decode_attention_{_BLOCK}",
    )


def _step(attention, q, block, wide, state, length, first, start):
    """One block of keys (online softmax): the new sums [64, H], largest scores [64] and total weights [64].

    Args:
      attention: the sizes.
      q: [64, H] queries in shared memory.
      block: there too, keys and values [64, H], and their scales [64] if they are int8.
      wide: there too, room for keys and values in bfloat16, if they are int8.
      state: the old sums, largest scores and totals.
      length: live keys.
      first: number of the first key that is new in this step.
      start: number of the block's first key.
    """
    sums, largest, total = state
    k, v, *scales = block
    shape = hopper.ROWS, _BLOCK
    keys = start + lax.broadcasted_iota(jnp.int32, shape, 1)
    live = (keys >= first) & (keys < length)
    if attention.quantized:
        for narrow, ref in zip((k, v), wide, strict=True):
            ref[...] = narrow[...].astype(ref.dtype)
        plgpu.commit_smem()
        k, v = wide
    else:

        @pl.when(start + _BLOCK > length)
        def _silence() -> None:  # a weight of 0 does not silence what lies behind the last key
            number = start + lax.broadcasted_iota(jnp.int32, v.shape, 0)
            v[...] = jnp.where(number < length, v[...], jnp.zeros(v.shape, v.dtype))
            plgpu.commit_smem()

    scores = attention.scale * hopper.dot(q, k, transposed=True)
    if scales:
        scores *= lax.broadcast_in_dim(scales[0][...], shape, (1,))
    scores = jnp.where(live, scores, -jnp.inf)
    new_largest = jnp.maximum(largest, scores.max(axis=1))
    weights = jnp.exp(scores - lax.broadcast_in_dim(new_largest, shape, (0,)))
    decay = jnp.exp(largest - new_largest)
    total = total * decay + weights.sum(axis=1)
    if scales:
        weights *= jnp.where(live, lax.broadcast_in_dim(scales[1][...], shape, (1,)), 0.0)
    sums = sums * lax.broadcast_in_dim(decay, sums.shape, (0,)) + hopper.dot(weights.astype(v.dtype), v)
    return sums, new_largest, total
