"""Weights in few bits: `QuantizedArray` stands wherever a weight [N, K] of a product stands."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)

_RATIOS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
"""Shares of a group's range that are tried."""
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
    zero_point: bool = False
    """Each group has an offset, too: its range need not lie around zero."""
    floating: bool = False
    """Values are float8_e4m3fn rather than int8."""

    @property
    def dtype(self) -> jnp.dtype:
        """Type of a value."""
        if self.floating:
            return jnp.dtype(jnp.float8_e4m3fn)
        return jnp.dtype(jnp.int4 if self.bits == 4 else jnp.int8)

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest value."""
        info = jnp.finfo(self.dtype) if self.floating else jnp.iinfo(self.dtype)
        return int(info.min), int(info.max)

    def nearest(self, x: Array) -> Array:
        """The values nearest to x, float32 of any shape: as float32, in the same kind of array."""
        clipped = x.clip(*self.limits)
        return clipped.astype(self.dtype).astype(jnp.float32) if self.floating else clipped.round()


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scales", "offsets"), meta_fields=("activations",)
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A weight [N, K] as small numbers times scales, one scale per row and group of columns, perhaps plus offsets."""

    values: jax.Array
    """[N, K] int8, int4 or float8_e4m3fn."""
    scales: jax.Array
    """[N, G] of the type that the weight had."""
    activations: Literal["float", "int8"] = "float"
    """See `Format`."""
    offsets: jax.Array | None = None
    """[N, G] of the scales' type, added to every column of the group. Floats, not integers times the scales: they are
    themselves the weight of a small product, see `matmul`."""

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
        wide = self.values.astype(jnp.float32).reshape(rows, groups, -1) * _per_group(self.scales)
        if self.offsets is not None:
            wide += _per_group(self.offsets)
        return wide.astype(dtype).reshape(self.shape)


def _per_group(factors: jax.Array) -> jax.Array:
    """[N, G] -> float32 [N, G, 1]."""
    return factors.astype(jnp.float32)[:, :, None]


def quantize(w: jax.Array, form: Format) -> QuantizedArray:
    """Rounds a weight, each group to the range that has the least squared error (no data needed).

    Args:
      w: [N, K] float.
      form: the format; its group size divides K.

    Returns:
      Values [N, K], scales [N, K / group_size] and, with a zero point, offsets like these.

    Raises:
      ValueError: K is no multiple of the group size.
    """
    rows, columns = w.shape
    if columns % (form.group_size or columns):
        raise ValueError(f"{columns} columns are no multiple of group_size {form.group_size}")
    step = max(1, _BLOCK_BYTES // (4 * columns))
    block = functools.partial(_quantize_rows, form=form)
    whole = rows // step * step
    parts = []
    if whole:
        blocks = jax.lax.map(block, w[:whole].reshape(-1, step, columns))
        parts.append(jax.tree.map(lambda leaf: leaf.reshape(whole, -1), blocks))
    if whole < rows:
        parts.append(block(w[whole:]))
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves) if len(leaves) > 1 else leaves[0], *parts)
    # Only here: XLA:CPU unpacks all of an int4 array to write a part of it.
    return dataclasses.replace(joined, values=joined.values.astype(form.dtype))


def _quantize_rows(w: jax.Array, form: Format) -> QuantizedArray:
    """Quantizes w [R, K], but int4 values stay int8."""
    groups = w.astype(jnp.float32).reshape(w.shape[0], -1, form.group_size or w.shape[1])
    scales, offsets = best_ranges(groups, form, w.dtype)
    values = form.nearest((groups - offsets.astype(jnp.float32)) / scales.astype(jnp.float32))
    return QuantizedArray(
        values.reshape(w.shape).astype(jnp.int8 if form.bits == 4 else form.dtype),
        scales[..., 0],
        form.activations,
        offsets[..., 0] if form.zero_point else None,
    )


def best_ranges(
    groups: jax.typing.ArrayLike,
    form: Format,
    dtype: jax.typing.DTypeLike,
    importance: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Finds the scale and the offset with which each group is rounded with the least squared error.

    Args:
      groups: float32 [R, G, size].
      form: the format; without a zero point the offsets are zero.
      dtype: of the results.
      importance: float32 [size], factor on the squared error of each column; None: all are equal.

    Returns:
      Scales and offsets, [R, G, 1] of `dtype`.
    """
    groups = jnp.asarray(groups)
    weights = jnp.ones((1, 1, groups.shape[2])) if importance is None else importance[None, None]
    candidates = _free_ranges if form.zero_point else _ranges_around_zero
    best = jnp.ones((*groups.shape[:-1], 1)), jnp.zeros((*groups.shape[:-1], 1))
    best_error = jnp.inf
    for scale, offset in candidates(groups, form, weights):
        scale = _nonzero(_rounded(scale, dtype))
        offset = _rounded(offset, dtype)
        restored = form.nearest((groups - offset) / scale) * scale + offset
        error = jnp.sum(jnp.square(restored - groups) * weights, axis=-1, keepdims=True)
        best = tuple(jnp.where(error < best_error, new, old) for new, old in zip((scale, offset), best, strict=True))
        best_error = jnp.minimum(error, best_error)
    scale, offset = best
    return scale.astype(dtype), offset.astype(dtype)


def _ranges_around_zero(groups: jax.Array, form: Format, _: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields scales [R, G, 1] that share out the largest value of each group, and offsets of zero."""
    extreme = jnp.take_along_axis(groups, jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True), axis=-1)
    # The range of integers reaches one further on one side: the extreme value may be given either.
    for end in form.limits:
        for ratio in _RATIOS:
            yield extreme * (ratio / end), jnp.zeros_like(extreme)


def _free_ranges(groups: jax.Array, form: Format, weights: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields scales and offsets [R, G, 1] of ranges about the middle of each group [R, G, size]."""
    mean = functools.partial(jnp.average, axis=-1, keepdims=True, weights=jnp.broadcast_to(weights, groups.shape))
    lowest, highest = jnp.min(groups, axis=-1, keepdims=True), jnp.max(groups, axis=-1, keepdims=True)
    low, high = form.limits
    for ratio in _RATIOS:
        scale = _nonzero((highest - lowest) * (ratio / (high - low)))
        offset = (lowest + highest) / 2 - scale * ((low + high) / 2)
        values = form.nearest((groups - offset) / scale)
        # For these values, regression gives the best scale and offset.
        spread = values - mean(values)
        scale = mean(spread * groups) / _nonzero(mean(jnp.square(spread)))
        yield scale, mean(groups) - scale * mean(values)


def _rounded(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Float32 numbers that `dtype` holds."""
    return x.astype(dtype).astype(jnp.float32)


def _nonzero(x: jax.Array) -> jax.Array:
    """x, with 1 for 0."""
    return jnp.where(x == 0, 1.0, x)


def take(w: jax.Array | QuantizedArray, rows: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of a weight [N, K]: rows [...] int32 -> [..., K] of `dtype`."""
    if not isinstance(w, QuantizedArray):
        return w[rows].astype(dtype)
    flat = rows.reshape(-1)
    # XLA:TPU takes a lone row out of a weight by a slice, for which it first copies the whole weight to another tiling.
    pair = jnp.pad(flat, (0, 1)) if flat.shape == (1,) else flat
    taken = jax.tree.map(lambda leaf: leaf[pair], w).dequantize(dtype)
    return taken[: flat.shape[0]].reshape(*rows.shape, w.shape[1])
