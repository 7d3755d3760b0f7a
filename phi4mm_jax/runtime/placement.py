"""Putting weights on their devices, quantized on the way if the configuration says so."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.quantized import Format, QuantizedArray
from phi4mm_jax.config import ConfigError, QuantizationConfig
from phi4mm_jax.runtime.steps import quantize_weight

Leaf = jax.Array | QuantizedArray


def placed_shape(path: str, leaf: jax.ShapeDtypeStruct, config: QuantizationConfig) -> Any:
    """Shape, dtype and sharding of a leaf as it will lie in memory: a `ShapeDtypeStruct` or a `QuantizedArray` of them.

    Raises:
      ConfigError: the leaf cannot have the format that is asked for.
    """
    form = format_of(path, leaf, config)
    if form is None:
        return leaf
    rows, columns = leaf.shape
    groups = columns // (form.group_size or columns)
    # Scales and offsets lie with their values; where the columns are cut, so are their groups, if they come out even.
    spec = (*leaf.sharding.spec, None, None)[:2]
    mesh = leaf.sharding.mesh
    spec = [
        name if name is None or size % mesh.shape[name] == 0 else None
        for name, size in zip(spec, (rows, groups), strict=True)
    ]
    values = jax.ShapeDtypeStruct(leaf.shape, form.dtype, sharding=leaf.sharding)
    scales = jax.ShapeDtypeStruct((rows, groups), leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    return QuantizedArray(values, scales, form.activations, scales if form.zero_point else None)


def place(path: str, value: np.ndarray, leaf: jax.ShapeDtypeStruct, config: QuantizationConfig) -> Leaf:
    """Puts a leaf on its devices.

    Args:
      path: its dotted path.
      value: what it holds.
      leaf: shape, dtype and sharding that it has without quantization.
      config: what is quantized.
    """
    return quantize_leaf(jax.device_put(value, leaf.sharding), path, leaf, config)


def quantize_leaf(placed: jax.Array, path: str, leaf: jax.ShapeDtypeStruct, config: QuantizationConfig) -> Leaf:
    """Quantizes a placed leaf, if the configuration says so; the other arguments are those of `place`."""
    form = format_of(path, leaf, config)
    return placed if form is None else place_as(quantize_weight(placed, form), path, leaf, config)


def place_as(quantized: QuantizedArray, path: str, leaf: jax.ShapeDtypeStruct, config: QuantizationConfig) -> Leaf:
    """Puts a quantized leaf where `placed_shape` says."""
    shardings = jax.tree.map(lambda shape: shape.sharding, placed_shape(path, leaf, config))
    # Wait, or the whole model would wait in its first form.
    return jax.block_until_ready(jax.device_put(quantized, shardings))


def format_of(path: str, leaf: jax.ShapeDtypeStruct, config: QuantizationConfig) -> Format | None:
    """The format of a leaf, None if it is not quantized.

    Raises:
      ConfigError: the leaf cannot have the format that is asked for.
    """
    match config.format_of(path, len(leaf.shape)):
        case "none":
            return None
        case "int8":
            return Format(8)
        case "w8a8":
            return Format(8, activations="int8")
        case "fp8":
            return Format(8, floating=True)
        case "int4":
            if leaf.shape[1] % config.group_size:
                raise ConfigError(
                    f"quantization.group_size = {config.group_size} does not divide the {leaf.shape[1]} columns of "
                    f"{path}; take a smaller one, or name the leaf in quantization.keep"
                )
            return Format(4, config.group_size, zero_point=config.zero_point)
