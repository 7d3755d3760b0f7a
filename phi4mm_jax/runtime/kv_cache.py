"""The key/value cache. This file alone knows its layout: per layer a pair of `KV` [B, K, S, H].

Each row's new entries are written by `dynamic_update_slice`, the write that XLA does in place on every target.
The last positions of a row are scratch, as many as a step writes: rows that sit out a step write there, so they can
never damage live entries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.kv import KV, encode
from pallas_kernels.prefill_attention import prefill_attention
from phi4mm_jax.config import DTypeConfig, TextConfig
from phi4mm_jax.models.text import Attend
from phi4mm_jax.runtime.mesh import sharding

LayerCache = tuple[KV, KV]
"""Keys and values of one layer, each [B, K, S, H]."""

_AXES = ("batch", "kv_heads", None, None)


def cache_shapes(text: TextConfig, dtypes: DTypeConfig, mesh: Mesh, batch: int, length: int) -> list[LayerCache]:
    """Shapes of the cache of `batch` rows with `length` positions, scratch included."""
    dtype = jnp.dtype("uint16" if dtypes.kv_cache == "bfloat16_bits" else dtypes.kv_cache)
    vectors = jax.ShapeDtypeStruct((batch, text.num_kv_heads, length, text.head_dim), jnp.float32)
    kv = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding(mesh, a.shape, _AXES[: a.ndim])),
        jax.eval_shape(lambda x: encode(x, dtype), vectors),
    )
    return [(kv, kv) for _ in range(text.num_layers)]


def prefill_attend(
    slots: jax.Array,  # [R] int32: the cache row of each prompt
    starts: jax.Array,  # [R] int32: position of each chunk's first token
    *,
    scale: float,
    block_size: int,
) -> Attend[LayerCache]:
    """Attention of a prompt chunk: appends R chunks to their rows, then attends causally."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        keys, values = (_write(c, new, slots, starts) for c, new in zip(cache, (k, v), strict=True))
        out = prefill_attention(q, keys, values, starts, slots, scale=scale, block_size=block_size, names=_AXES)
        return out, (keys, values)

    return attend


def decode_attend(
    positions: jax.Array,  # [B] int32: position of each row's first new token
    running: jax.Array,  # [B] bool: rows that take part
    *,
    scale: float,
    block_size: int,
) -> Attend[LayerCache]:
    """Attention of one or a few new tokens per row; rows that sit out write to scratch and read no more than that."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        count = q.shape[1]
        slots = jnp.arange(q.shape[0], dtype=jnp.int32)
        where = jnp.where(running, positions, cache[0].shape[2] - count)
        keys, values = (_write(c, new, slots, where) for c, new in zip(cache, (k, v), strict=True))
        if count > 1:
            starts = jnp.where(running, positions, 0)
            out = prefill_attention(q, keys, values, starts, slots, scale=scale, block_size=block_size, names=_AXES)
            return out, (keys, values)
        lengths = jnp.where(running, positions + 1, 1)
        out = decode_attention(q[:, 0], keys, values, lengths, scale=scale, names=_AXES)
        return out[:, None], (keys, values)

    return attend


_COPIED = 256
"""Positions that `copy_row` copies at a time."""


def copy_row(cache: KV, source: jax.Array, target: jax.Array, length: jax.Array) -> KV:
    """Copies the first `length` positions of one row to another; all three are int32 scalars."""

    def copy(array: jax.Array) -> jax.Array:
        block = min(_COPIED, array.shape[2])
        sizes = (1, array.shape[1], block, *array.shape[3:])

        def copy_block(i: jax.Array, array: jax.Array) -> jax.Array:
            at = [jnp.zeros((), jnp.int32)] * array.ndim
            at[0], at[2] = source, i * block
            part = jax.lax.dynamic_slice(array, at, sizes)
            at[0] = target
            return jax.lax.dynamic_update_slice(array, part, at)

        return jax.lax.fori_loop(0, (length + block - 1) // block, copy_block, array)

    return jax.tree.map(copy, cache)


def resize(cache: KV, rows: jax.Array, length: int) -> KV:
    """The rows [B] int32 of a cache, -1 for an empty one, with `length` positions."""

    def fit(array: jax.Array) -> jax.Array:
        kept = take_rows(array, rows)[:, :, :length]
        return jnp.pad(kept, [(0, length - kept.shape[2] if axis == 2 else 0) for axis in range(kept.ndim)])

    return jax.tree.map(fit, cache)


def take_rows(array: jax.Array, rows: jax.Array) -> jax.Array:
    """The rows [B] int32 of an array, zeros for a row of -1."""
    taken = jnp.take(array, jnp.maximum(rows, 0), axis=0)
    is_row = (rows >= 0).reshape(-1, *[1] * (array.ndim - 1))
    return jnp.where(is_row, taken, jnp.zeros_like(taken))


def _write(cache: KV, new: jax.Array, slots: jax.Array, starts: jax.Array) -> KV:
    """Stores new [R, T, K, H] at (slots[r], starts[r]) of cache [B, K, S, H]."""
    encoded = encode(new.transpose(0, 2, 1, 3), cache.dtype)
    zero = jnp.zeros((), slots.dtype)

    def put(array: jax.Array, rows: jax.Array) -> jax.Array:
        for r in range(rows.shape[0]):
            at = (slots[r], zero, starts[r], zero)[: array.ndim]
            array = jax.lax.dynamic_update_slice(array, rows[r : r + 1], at)
        return array

    return jax.tree.map(put, cache, encoded)
