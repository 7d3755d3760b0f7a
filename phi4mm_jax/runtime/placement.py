"""Putting weights on their devices, quantized on the way if the configuration says so."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.quantized import Format, QuantizedArray, quantize
from phi4mm_jax.config import ConfigError, QuantizationConfig

Leaf = jax.Array | QuantizedArray


def placed_shape(path: str, leaf: jax.ShapeDtypeStruct, config: QuantizationConfig) -> Any:
    """Shape, dtype and sharding of a leaf as it will lie in memory: a `ShapeDtypeStruct`, or a `QuantizedArray` of two.

    Raises:
      ConfigError: the leaf cannot have the format that is asked for.
    """
    form = _format(path, leaf, config)
    if form is None:
        return leaf
    rows, columns = leaf.shape
    groups = columns // (form.group_size or columns)
    # A scale lies with its values; where the columns are cut, so are their groups, if they come out even.
    spec = (*leaf.sharding.spec, None, None)[:2]
    mesh = leaf.sharding.mesh
    spec = [
        name if name is None or size % mesh.shape[name] == 0 else None
        for name, size in zip(spec, (rows, groups), strict=True)
    ]
    return QuantizedArray(
        jax.ShapeDtypeStruct(leaf.shape, jnp.int4 if form.bits == 4 else jnp.int8, sharding=leaf.sharding),
        jax.ShapeDtypeStruct((rows, groups), leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))),
        form.activations,
    )


def place(path: str, value: np.ndarray, leaf: jax.ShapeDtypeStruct, config: QuantizationConfig) -> Leaf:
    """Puts a leaf on its devices.

    Args:
      path: its dotted path.
      value: what it holds.
      leaf: shape, dtype and sharding that it has without quantization.
      config: what is quantized.
    """
    placed = jax.device_put(value, leaf.sharding)
    form = _format(path, leaf, config)
    if form is None:
        return placed
    shape = placed_shape(path, leaf, config)
    quantized = jax.device_put(quantize(placed, form), jax.tree.map(lambda s: s.sharding, shape))
    return jax.block_until_ready(quantized)  # or the whole model would wait in its first form


def _format(path: str, leaf: jax.ShapeDtypeStruct, config: QuantizationConfig) -> Format | None:
    match config.format_of(path, len(leaf.shape)):
        case "none":
            return None
        case "int8":
            return Format(8)
        case "w8a8":
            return Format(8, activations="int8")
        case "int4":
            if leaf.shape[1] % config.group_size:
                raise ConfigError(
                    f"quantization.group_size = {config.group_size} does not divide the {leaf.shape[1]} columns of "
                    f"{path}; take a smaller one, or name the leaf in quantization.keep"
                )
            return Format(4, config.group_size)
