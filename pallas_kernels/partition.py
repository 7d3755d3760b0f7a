"""Kernels over several devices: each runs on its own part of the operands, and no part is moved.

A dimension has a logical name, such as "heads"; rules say over which axis of a mesh dimensions of a name are cut. A
program over several devices is traced within `over`, and an operator that is told the names then calls its kernel in
`jax.shard_map`: XLA partitions its own forms, but no other backend's call.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

Names = tuple[str | None, ...]
"""The logical name of each dimension of an array; None for one that is never cut."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays lie over the devices of a mesh."""

    mesh: Mesh
    """The devices."""
    rules: Mapping[str, str]
    """Logical name -> axis of the mesh. What has another name is not cut."""

    def spec(self, shape: tuple[int, ...], names: Names) -> PartitionSpec:
        """Where an array lies; a dimension that does not divide stays whole."""
        axes = [self.rules.get(name) if name else None for name in names]
        return PartitionSpec(
            *(a if a and n % self.mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True))
        )

    def parts(self, axis: str | None) -> int:
        """Parts into which a dimension is cut that lies over `axis`."""
        return self.mesh.shape[axis] if axis else 1

    def call(
        self, function: Callable[..., Any], operands: tuple[PartitionSpec, ...], result: PartitionSpec
    ) -> Callable:
        """A function that runs on each device with its parts of the operands and returns its part of the result."""
        # A kernel does not say which of the axes its result differs over.
        return jax.shard_map(function, mesh=self.mesh, in_specs=operands, out_specs=result, check_vma=False)


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def over(mesh: Mesh, rules: Mapping[str, str]) -> Iterator[None]:
    """Within it, what is traced is a program over the devices of `mesh`; one device is no different from none."""
    token = _current.set(Layout(mesh, rules) if math.prod(mesh.shape.values()) > 1 else None)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Layout | None:
    """Of the program that is being traced; None for one device."""
    return _current.get()
