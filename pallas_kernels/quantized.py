"""Weights in few bits: `QuantizedArray` stands wherever a weight [N, K] of a product stands."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

_RATIOS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
"""Shares of a group's largest value that are tried as the end of its range."""
_BLOCK_BYTES = 512 << 10
"""Float32 bytes of a weight that are quantized at once: they stay in a cache while every range is tried."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight is quantized."""

    bits: Literal[4, 8]
    """Of a value."""
    group_size: int | None = None
    """Columns that share a scale; None: a whole row does."""
    activations: Literal["float", "int8"] = "float"
    """`int8`: the other factor is rounded too, row by row, and the product runs in integers."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("activations",))
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A weight [N, K] as integers times scales, one scale per row and group of columns."""

    values: jax.Array
    """[N, K] int8 or int4."""
    scales: jax.Array
    """[N, G] of the type that the weight had."""
    activations: Literal["float", "int8"] = "float"
    """See `Format`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K]."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """2."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Type of what it stands for."""
        return self.scales.dtype

    def dequantize(self, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """The weight: [N, K]."""
        dtype = self.dtype if dtype is None else dtype
        rows, groups = self.scales.shape
        wide = self.values.astype(jnp.float32).reshape(rows, groups, -1)
        return (wide * self.scales.astype(jnp.float32)[:, :, None]).astype(dtype).reshape(self.shape)


@functools.partial(jax.jit, static_argnames="form")  # or its loop would be compiled anew for each weight
def quantize(w: jax.Array, form: Format) -> QuantizedArray:
    """Rounds a weight, each group to the range that has the least squared error (no data needed).

    Args:
      w: [N, K] float.
      form: the format; its group size divides K.

    Returns:
      Values [N, K] and scales [N, K / group_size].

    Raises:
      ValueError: K is no multiple of the group size.
    """
    rows, columns = w.shape
    size = form.group_size or columns
    if columns % size:
        raise ValueError(f"{columns} columns are no multiple of group_size {size}")
    step = max(1, _BLOCK_BYTES // (4 * columns))
    block = functools.partial(_quantize_rows, bits=form.bits, size=size)
    whole = rows // step * step
    parts = []
    if whole:
        values, scales = jax.lax.map(block, w[:whole].reshape(-1, step, columns))
        parts.append((values.reshape(whole, columns), scales.reshape(whole, -1)))
    if whole < rows:
        parts.append(block(w[whole:]))
    values, scales = (jnp.concatenate(p) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
    # Only here: XLA:CPU unpacks all of an int4 array to write a part of it.
    return QuantizedArray(values.astype(jnp.int4 if form.bits == 4 else jnp.int8), scales, form.activations)


def _quantize_rows(w: jax.Array, bits: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Values [R, K] int8 and scales [R, K / size] of w [R, K]."""
    groups = w.astype(jnp.float32).reshape(w.shape[0], -1, size)
    scales = best_scales(groups, bits, w.dtype)
    values = jnp.clip(jnp.round(groups / scales.astype(jnp.float32)), *value_limits(bits))
    return values.reshape(w.shape).astype(jnp.int8), scales[..., 0]


def best_scales(
    groups: jax.typing.ArrayLike,
    bits: int,
    dtype: jax.typing.DTypeLike,
    importance: jax.Array | None = None,
) -> jax.Array:
    """Finds the scale with which each group is rounded with the least squared error.

    Args:
      groups: float32 [R, G, size].
      bits: of a value.
      dtype: of the scales.
      importance: float32 [size], factor on the squared error of each column; None: all are equal.

    Returns:
      [R, G, 1] of `dtype`.
    """
    extreme = jnp.take_along_axis(groups, jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True), axis=-1)
    best_error = jnp.full(extreme.shape, jnp.inf, jnp.float32)
    best = jnp.ones_like(extreme)
    # The range reaches one further on one side: the extreme value may be given either.
    for end, ratio in ((end, ratio) for end in value_limits(bits) for ratio in _RATIOS):
        scale = (extreme * (ratio / end)).astype(dtype).astype(jnp.float32)
        scale = jnp.where(scale == 0, 1.0, scale)
        rounded = jnp.clip(jnp.round(groups / scale), *value_limits(bits)) * scale
        errors = jnp.square(rounded - groups)
        if importance is not None:
            errors *= importance.reshape(1, 1, -1)
        error = jnp.sum(errors, axis=-1, keepdims=True)
        best = jnp.where(error < best_error, scale, best)
        best_error = jnp.minimum(error, best_error)
    return best.astype(dtype)


def value_limits(bits: int) -> tuple[int, int]:
    """The lowest and the highest value."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def take(w: jax.Array | QuantizedArray, rows: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of a weight [N, K]: rows [...] int32 -> [..., K] of `dtype`."""
    if not isinstance(w, QuantizedArray):
        return w[rows].astype(dtype)
    flat = rows.reshape(-1)
    # XLA:TPU takes a lone row out of a weight by a slice, for which it first copies the whole weight to another tiling.
    pair = jnp.pad(flat, (0, 1)) if flat.shape == (1,) else flat
    taken = QuantizedArray(w.values[pair], w.scales[pair]).dequantize(dtype)
    return taken[: flat.shape[0]].reshape(*rows.shape, w.shape[1])
