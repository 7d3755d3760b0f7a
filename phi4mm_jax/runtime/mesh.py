"""Where arrays live: one table from logical axes to mesh axes. A single device is a 1x1 mesh."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.partition import Layout
from phi4mm_jax.config import ConfigError, MeshConfig

RULES = {"vocab": "model", "heads": "model", "mlp": "model", "kv_heads": "model", "batch": "data"}
"""Logical axis of a weight, cache or activation -> mesh axis. Axes not named here are replicated."""


def create_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arranges the first data x model devices of this process.

    Raises:
      ConfigError: there are fewer devices than the mesh asks for.
    """
    devices = jax.local_devices() if devices is None else devices
    count = config.data * config.model
    if count > len(devices):
        raise ConfigError(
            f"mesh.data x mesh.model = {config.data} x {config.model} needs {count} devices; there are {len(devices)}"
        )
    return Mesh(np.asarray(devices[:count]).reshape(config.data, config.model), ("data", "model"))


def sharding(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
    """Sharding of an array whose dimensions have these logical names; a dimension that does not divide stays whole."""
    return NamedSharding(mesh, Layout(mesh, RULES).spec(shape, axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
