"""Compiling for TPU chips that are not there: libtpu's compiler takes a description of them. Nothing is run.

The folder `gpu` does the same for GPUs.

`pip install -e ".[aot]" && pytest tests/aot` compiles a selection, `pytest tests/aot -m slow` all the rest.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

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

CHUNK = 512
"""Tokens of a prompt that are compiled for."""

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
def decoder_steps() -> Callable[..., Steps]:
    """`decoder_steps(mesh, preset, form, layers, **settings)`: of the released model with fewer layers."""

    def steps(mesh: Mesh, preset: str, form: str, layers: int, **settings: Any) -> Steps:
        model = ModelConfig.load("phi4mm")
        model = dataclasses.replace(model, text=dataclasses.replace(model.text, num_layers=layers))
        quantization = {} if form == "bf16" else quantization_settings(form)[0]
        return Steps(model, RuntimeConfig.load(preset, quantization=quantization, **settings), mesh)

    return steps


@pytest.fixture
def placed() -> Callable[[Steps], dict[str, Any]]:
    """The shapes of all weights, as the runtime would place them."""
    return lambda steps: {
        path: placed_shape(path, leaf, steps.runtime.quantization) for path, leaf in steps.abstract().items()
    }


@pytest.fixture
def array() -> Callable[..., jax.ShapeDtypeStruct]:
    """`array(steps, dtype, *shape)`: an argument that every device has."""
    return lambda steps, dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(steps.mesh))


@pytest.fixture
def compile_decoder(placed: Any, array: Any) -> Callable[..., jax.stages.Compiled]:
    """`compile_decoder(steps, "decode" or "prefill", batch, positions, adapters)`: a step, or a chunk of one prompt."""

    def compile_steps(
        steps: Steps, program: str, batch: int, positions: int, adapters: bool = False
    ) -> jax.stages.Compiled:
        weights = tuple(leaf for path, leaf in placed(steps).items() if path.startswith("text."))
        state = steps.state_shapes(batch, positions)
        rows = array(steps, jnp.bool_, batch if program == "decode" else 1)
        use = dict.fromkeys(("speech", "vision") if adapters else (), rows)
        if program == "decode":
            lowered = steps.decode.lower(weights, state, rows, array(steps, jnp.int32, batch), use, kind="greedy")
        else:
            tokens, index = array(steps, jnp.int32, 1, CHUNK), array(steps, jnp.int32, 1)
            lowered = steps.prefill.lower(weights, state.caches, tokens, None, None, index, index, index, rows, use)
        return lowered.compile()

    return compile_steps


@pytest.fixture
def schedule() -> Callable[[jax.stages.Compiled], "Program"]:
    """What a compiled program does, in order."""
    return lambda compiled: Program(compiled.as_text())


_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32}
_BITS |= {"f8e4m3fn": 8, "bf16": 16, "f16": 16, "f32": 32}
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*?) ([\w-]+)\((.*?)\)(?:, (.*))?$")
_NO_TRAFFIC = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "opt-barrier"}
_PARTS = {"gather", "dynamic-slice", "slice"}


class Array(NamedTuple):
    """One of an instruction's results."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8

    @property
    def in_memory(self) -> int:
        """Bytes of HBM: none if it lies on the chip."""
        return 0 if self.on_chip else self.size


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    results: list[Array]
    operation: str
    operands: list[str]
    attributes: str

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        return re.findall(r"(?:calls|body)=%([\w.-]+)", self.attributes)


class Program:
    """What a compiled program moves between memory (HBM) and chip, read from its schedule."""

    def __init__(self, text: str):
        """Reads what `jax.stages.Compiled.as_text` returns."""
        self._computations: dict[str, list[Instruction]] = {}
        for part in text.split("\n\n"):
            head, *lines = part.strip("\n").split("\n")
            name = re.match(r"(ENTRY )?%([\w.-]+) \(", head)
            if name:
                self._computations[name[2]] = [_instruction(*m.groups()) for m in map(_INSTRUCTION.match, lines) if m]
                if name[1]:
                    self._entry = name[2]

    @property
    def entry(self) -> list[Instruction]:
        """What it does once."""
        return self._computations[self._entry]

    def loop(self) -> list[Instruction]:
        """The body of its loop."""
        (loop,) = (i for i in self.entry if i.operation == "while")
        return self._computations[loop.called[0]]

    def traffic(self, instructions: list[Instruction]) -> int:
        """Bytes that the instructions read from HBM and write to it, the operands of a kernel once and whole."""
        results = {i.name: i.results for i in instructions}
        total = 0
        for i in instructions:
            if i.operation in _NO_TRAFFIC or i.operation.endswith("-done"):
                continue
            if i.operation.endswith("-start"):  # of a copy: to and from, of which one may be a part of the other
                ends = i.results[:2]
                total += min(a.size for a in ends) * sum(not a.on_chip for a in ends)
            elif i.operation == "dynamic-update-slice":
                total += 2 * sum(a.in_memory for a in results[i.operands[1]])
            else:
                total += sum(a.in_memory for a in i.results)
                for index, name in enumerate(i.operands):
                    size = sum(a.in_memory for a in results.get(name, ()))
                    total += min(size, self._read(i, index)) if size else 0
        return total

    def wide_copies(self, instructions: list[Instruction], weights: list[tuple[int, ...]]) -> list[str]:
        """Instructions whose result has the shape of a weight, either way round, in bfloat16 or float32."""
        shapes = {tuple(sorted(shape)) for shape in weights}
        results = ((i.name, a) for i in instructions for a in i.results)
        return [name for name, a in results if a.dtype in ("bf16", "f32") and tuple(sorted(a.shape)) in shapes]

    def _read(self, user: Instruction, index: int) -> float:
        """Bytes of an operand that an instruction reads."""
        if user.operation in _PARTS:
            return sum(a.size for a in user.results) if index == 0 else math.inf
        if user.operation != "fusion":
            return math.inf
        inside = self._computations[user.called[0]]
        array = next(i for i in inside if i.operation == "parameter" and i.operands == [str(index)])
        return self._read_of(inside, array)

    def _read_of(self, inside: list[Instruction], array: Instruction) -> float:
        """Bytes of a value of a fusion that the rest of it reads."""
        users = [i for i in inside if array.name in i.operands]
        return sum(
            self._read_of(inside, user) if self._renames(user) else self._read(user, user.operands.index(array.name))
            for user in users
        )

    def _renames(self, i: Instruction) -> bool:
        """Whether, within a fusion, the result is the operand under another name."""
        if i.operation == "fusion":
            return all(
                inner.operation == "parameter" or self._renames(inner) for inner in self._computations[i.called[0]]
            )
        return i.operation in ("bitcast", "copy")


def _instruction(name: str, results: str, operation: str, operands: str, attributes: str | None):
    arrays = [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" in (layout or ""))
        for dtype, shape, layout in _ARRAY.findall(results)
        if dtype in _BITS
    ]
    names = re.findall(r"%([\w.-]+)", operands) or [operands]
    return Instruction(name, arrays, operation, names, attributes or "")
