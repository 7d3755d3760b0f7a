"""Layers that all three towers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.encoder_attention import encoder_attention
from pallas_kernels.matmul import matmul


def param(shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> nnx.Param:
    """A zero weight to be filled by a loader; `axes` names each dimension for sharding (runtime/mesh.py)."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def product(x: jax.Array, weight: nnx.Param, out_dtype: Any = None) -> jax.Array:
    """x [..., in] times a weight [out, in]; see `matmul`."""
    return matmul(x, weight.get_value(), out_dtype=out_dtype, names=weight.get_metadata()["axes"])


def value(weight: nnx.Param, like: jax.Array) -> jax.Array:
    """A small weight (bias, norm) in the dtype of the activations it meets."""
    return weight.get_value().astype(like.dtype)


def over_rows(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes `vector` [D] to broadcast over the leading axes of `x` [..., D]."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def in_float32(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Applies an elementwise function in float32; the result has the dtype of x."""
    return function(x.astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """y = x W^T + b, with the weight [out, in] as checkpoints hold it."""

    def __init__(
        self, in_features: int, out_features: int, dtype: Any, axes: tuple[str | None, str | None] = (None, None)
    ):
        self.weight = param((out_features, in_features), dtype, axes)
        self.bias = param((out_features,), dtype, axes[:1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., in] to [..., out] in the dtype of x."""
        y = product(x, self.weight, jnp.float32)
        return (y + over_rows(value(self.bias, y), y)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32, multiplied by the weight after the cast back (phi4mm-reference, 2)."""

    def __init__(self, size: int, eps: float, dtype: Any):
        self.weight = param((size,), dtype, (None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., size]."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * over_rows(value(self.weight, x), x)


class LayerNorm(nnx.Module):
    """Layer norm, computed in float32."""

    def __init__(self, size: int, eps: float, dtype: Any):
        self.weight = param((size,), dtype, (None,))
        self.bias = param((size,), dtype, (None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., size]."""
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide, axis=-1, keepdims=True)
        centred = wide - mean
        wide = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (wide * over_rows(value(self.weight, wide), wide) + over_rows(value(self.bias, wide), wide)).astype(
            x.dtype
        )


class EncoderAttention(nnx.Module):
    """Bidirectional self-attention of an encoder."""

    def __init__(self, width: int, num_heads: int, dtype: Any):
        self.num_heads = num_heads
        self.q, self.k, self.v = (Linear(width, width, dtype, ("heads", None)) for _ in range(3))
        self.out = Linear(width, width, dtype, (None, "heads"))

    def __call__(
        self,
        x: jax.Array,  # [B, T, D]
        key_mask: jax.Array,  # [B, T] bool: what is attended to
        bias: jax.Array | None = None,  # [heads, T, T] float32, added to the scores
        mask_queries: bool = False,  # only the bias of `out` gets through at masked positions
    ) -> jax.Array:
        """Maps x to [B, T, D]. Keys and values take the weights' dtype, in which both products then run."""
        dtype = self.k.weight.get_value().dtype
        q, k, v = (project(x).reshape(*x.shape[:2], self.num_heads, -1) for project in (self.q, self.k, self.v))
        scale = q.shape[-1] ** -0.5
        attended = encoder_attention(q, k.astype(dtype), v.astype(dtype), scale=scale, bias=bias, key_mask=key_mask)
        if mask_queries:
            attended = jnp.where(key_mask[:, :, None, None], attended, jnp.zeros_like(attended))
        return self.out(merge_heads(attended))


class Projector(nnx.Module):
    """Two linear layers with an exact GELU: from an encoder's width to the decoder's."""

    def __init__(self, in_features: int, out_features: int, dtype: Any):
        self.up = Linear(in_features, out_features, dtype, ("mlp", None))
        self.down = Linear(out_features, out_features, dtype, (None, "mlp"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., in] to [..., out]."""
        return self.down(in_float32(partial(jax.nn.gelu, approximate=False), self.up(x)))


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, T, N*H]."""
    return x.reshape(*x.shape[:2], -1)
