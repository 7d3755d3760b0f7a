"""Compiling for TPU chips that are not there: libtpu's compiler takes a description of them. Nothing is run.

`pip install -e ".[aot]" && pytest tests/aot` compiles a selection, `pytest tests/aot -m slow` all the rest.
"""

import contextlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# libtpu reads these when it is loaded: no look for a real machine, no lock against a second process, no logs in /tmp.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_LOG_DIR", tempfile.gettempdir())

TargetHost = Callable[..., AbstractContextManager[Mesh]]


@pytest.fixture
def unkept() -> Iterator[None]:
    """Leaves no program in the compilation cache: without its chip none can be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    least = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    yield
    jax.config.update(name, least)


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch, unkept: None) -> TargetHost:
    """`with target("v5e", data, model) as mesh:` what is traced within is what a host of these chips would trace."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (the extra `aot`)")

    @contextlib.contextmanager
    def host(chip: str, data: int = 1, model: int = 1) -> Iterator[Mesh]:
        shape = (2, data * model // 2, 1) if data * model > 1 else (1, 1, 1)
        name = f"{chip}:{'x'.join(map(str, shape))}"
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=shape)
        devices = np.asarray(topology.devices[: math.prod(shape)]).reshape(data, model)
        mesh = Mesh(devices, ("data", "model"))
        with monkeypatch.context() as patch, jax.set_mesh(mesh):  # the mesh gives a kernel the chip's properties
            patch.setattr(jax, "default_backend", lambda: "tpu")
            yield mesh

    return host


@pytest.fixture
def compile_for(target: TargetHost) -> Callable[..., jax.stages.Compiled]:
    """`compile_for("v5e", function, *shapes)`: for one chip."""

    def compile_function(chip: str, function: Callable[..., Any], *shapes: Any) -> jax.stages.Compiled:
        with target(chip) as mesh:
            whole = NamedSharding(mesh, PartitionSpec())
            placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), shapes)
            return jax.jit(function).lower(*placed).compile()

    return compile_function
