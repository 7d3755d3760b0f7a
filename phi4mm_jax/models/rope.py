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

    Each row takes the short or the long factors for all of its positions. Computed in float32, then cast.
    """
    short, long = jnp.asarray(inverse_frequencies(config))[:, None, :]
    frequencies = jnp.where(use_long[:, None], long, short)  # [B, rotary_dim / 2]
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[:, None, None, :]
    scale = np.float32(config.rope_scale)
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first rotary_dim dimensions of each head of x [B, T, heads, H]; the rest passes."""
    cos, sin = table
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
