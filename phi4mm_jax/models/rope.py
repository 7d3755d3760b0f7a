"""Partial rotary embedding with longrope frequencies (phi4mm-reference, 2.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from phi4mm_jax.config import TextConfig


def inverse_frequencies(config: TextConfig) -> np.ndarray:
    """Inverse frequencies under the short and the long factors: float32 [2, rotary_dim / 2]."""
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    base = np.float32(config.rope_theta) ** exponents
    return np.stack([1 / (np.asarray(f, np.float32) * base) for f in (config.short_factor, config.long_factor)])


def rotary_table(
    config: TextConfig,
    positions: jax.Array,  # [B, T] int32
    use_long: jax.Array,  # [B] bool
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of each position, times the longrope scale: two arrays [B, T, 1, rotary_dim / 2].

    Each row takes the short or the long factors for all of its positions. Computed in float32, then cast; the barrier
    keeps XLA:CPU from computing them anew in every layer.
    """
    short, long = jnp.asarray(inverse_frequencies(config))[:, None, :]
    frequencies = jnp.where(use_long[:, None], long, short)  # [B, rotary_dim / 2]
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[:, None, None, :]
    scale = np.float32(config.rope_scale)
    return jax.lax.optimization_barrier(
        ((jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype))
    )


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first rotary_dim dimensions of each head of x [B, T, heads, H]; the rest passes.

    Each half meets the other by a shift of the whole head, times coefficients that are zero elsewhere: that is one pass
    over x, where a concatenation of the halves would be three.
    """
    cos, sin = table
    half, size = cos.shape[-1], x.shape[-1]
    kept = _pad(jnp.concatenate([cos, cos], axis=-1), 0, size - 2 * half, value=1)
    from_second = _pad(-sin, 0, size - half) * _pad(x[..., half:], 0, half)
    from_first = _pad(sin, half, size - 2 * half) * _pad(x[..., :-half], half, 0)
    return x * kept + from_second + from_first


def _pad(x: jax.Array, before: int, after: int, value: float = 0) -> jax.Array:
    """Pads the last axis."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((before, after),), constant_values=value)
