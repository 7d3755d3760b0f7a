"""Compiling for TPU chips that are not there: libtpu's compiler takes a description of them. Nothing is run.

The folder `gpu` does the same for GPUs.

`pip install -e ".[aot]" && pytest tests/aot` compiles a selection, `pytest tests/aot -m slow` all the rest.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phi4mm_jax.config import ModelConfig, RuntimeConfig
from phi4mm_jax.config.quantization import quantization_settings
from phi4mm_jax.runtime.mesh import replicated
from phi4mm_jax.runtime.placement import placed_shape
from phi4mm_jax.runtime.steps import Steps

# libtpu reads these when it is loaded: no look for a real machine, no lock against a second process, no logs in /tmp.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_LOG_DIR", tempfile.gettempdir())

POSITIONS = 32768  # of all rows together
CACHE_BYTES = 2 * 8 * 128 * 2  # of a position and layer: keys and values, 8 heads of 128, in bfloat16
CHUNK = 512

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


@pytest.fixture
def compile_program() -> Callable[..., jax.stages.Compiled]:
    """`compile_program(mesh, preset, "decode" or "prefill", form, batch, layers, adapters)`."""

    def compile_steps(
        mesh: Mesh, preset: str, program: str, form: str, batch: int, layers: int, adapters: tuple[str, ...] = ()
    ) -> jax.stages.Compiled:
        return {"decode": decode, "prefill": prefill}[program](
            steps_on(mesh, preset, form, layers), batch, adapters
        ).compile()

    return compile_steps


@pytest.fixture
def cache_bytes() -> int:
    """Of a layer's keys and values, of all rows."""
    return POSITIONS * CACHE_BYTES


def steps_on(mesh: Mesh, preset: str, form: str, layers: int) -> Steps:
    """The programs of the released model with fewer layers."""
    model = ModelConfig.load("phi4mm")
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, num_layers=layers))
    quantization = {} if form == "bf16" else quantization_settings(form)[0]
    return Steps(model, RuntimeConfig.load(preset, quantization=quantization), mesh)


def text_weights(steps: Steps) -> tuple:
    """Their shapes, as the runtime would place them."""
    leaves = steps.abstract().items()
    return tuple(placed_shape(p, leaf, steps.runtime.quantization) for p, leaf in leaves if p.startswith("text."))


def decode(steps: Steps, batch: int, adapters: tuple[str, ...]) -> jax.stages.Lowered:
    rows = array(steps, jnp.bool_, batch)
    state = steps.state_shapes(batch, POSITIONS // batch)
    use = dict.fromkeys(adapters, rows)
    return steps.decode.lower(text_weights(steps), state, rows, array(steps, jnp.int32), use, kind="greedy")


def prefill(steps: Steps, batch: int, adapters: tuple[str, ...]) -> jax.stages.Lowered:
    """A chunk of one prompt."""
    caches = steps.state_shapes(batch, POSITIONS // batch).caches
    index, flag = array(steps, jnp.int32, 1), array(steps, jnp.bool_, 1)
    prompt = (array(steps, jnp.int32, 1, CHUNK), None, None, index, index, index, flag, dict.fromkeys(adapters, flag))
    return steps.prefill.lower(text_weights(steps), caches, *prompt)


def array(steps: Steps, dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(steps.mesh))
