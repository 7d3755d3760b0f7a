"""The programs of the released model compile for real chips, fit, and copy neither the cache nor a weight."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from phi4mm_jax.config import ModelConfig, RuntimeConfig
from phi4mm_jax.config.quantization import quantization_settings
from phi4mm_jax.runtime.mesh import replicated
from phi4mm_jax.runtime.placement import placed_shape
from phi4mm_jax.runtime.steps import Steps

POSITIONS = 32768  # of all rows together
CACHE_BYTES = 2 * 8 * 128 * 2  # of a position and layer: keys and values, 8 heads of 128, in bfloat16
CHUNK = 512
MIB = 2**20
MOST_TEMPORARIES = {2: 16, 32: 256}
"""MiB by number of layers. Two layers show what is copied in each: the least is a weight of 3072 x 3072 in bfloat16, 18
MiB, a layer's keys take 64. All 32 show that it all fits."""


def steps_on(mesh, form: str, layers: int) -> Steps:
    model = ModelConfig.load("phi4mm")
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, num_layers=layers))
    quantization = {} if form == "bf16" else quantization_settings(form)[0]
    return Steps(model, RuntimeConfig.load("tpu_v5e_1", quantization=quantization), mesh)


def text_weights(steps: Steps) -> tuple:
    """Their shapes, as the runtime would place them."""
    leaves = steps.abstract().items()
    return tuple(placed_shape(p, leaf, steps.runtime.quantization) for p, leaf in leaves if p.startswith("text."))


def decode(steps: Steps, batch: int, adapters: tuple[str, ...] = ()) -> jax.stages.Compiled:
    rows = array(steps, jnp.bool_, batch)
    state = steps.state_shapes(batch, POSITIONS // batch)
    use = dict.fromkeys(adapters, rows)
    return steps.decode.lower(text_weights(steps), state, rows, array(steps, jnp.int32), use, kind="greedy").compile()


def prefill(steps: Steps, batch: int, adapters: tuple[str, ...] = ()) -> jax.stages.Compiled:
    """A chunk of one prompt."""
    caches = steps.state_shapes(batch, POSITIONS // batch).caches
    index, flag = array(steps, jnp.int32, 1), array(steps, jnp.bool_, 1)
    prompt = (array(steps, jnp.int32, 1, CHUNK), None, None, index, index, index, flag, dict.fromkeys(adapters, flag))
    return steps.prefill.lower(text_weights(steps), caches, *prompt).compile()


def array(steps: Steps, dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(steps.mesh))


SELECTION = {
    *(("v5e", decode, form, 8, 2, ()) for form in ("bf16", "int8", "int4")),
    *(("v5e", decode, form, 1, 2, ()) for form in ("int8", "int4")),
    ("v5e", prefill, "int4", 8, 2, ()),
    ("v5e", decode, "int4", 8, 32, ()),
}


def cases() -> Iterator[Any]:
    """Everything; what is not in the selection is slow."""
    forms, batches, adapters = ("bf16", "int8", "int4"), (1, 8), ((), ("speech", "vision"))
    everything = itertools.product(("v5e", "v5p", "v6e"), (decode, prefill), forms, batches, (2, 32), adapters)
    for case in everything:
        chip, program, form, batch, layers, used = case
        name = f"{chip}-{program.__name__}-{form}-{batch}-{layers}{'-adapters' * bool(used)}"
        yield pytest.param(*case, marks=[] if case in SELECTION else [pytest.mark.slow], id=name)


@pytest.mark.parametrize(("chip", "program", "form", "batch", "layers", "adapters"), list(cases()))
def test_fits_and_copies_nothing(target, chip, program, form, batch, layers, adapters) -> None:
    with target(chip) as mesh:
        compiled = program(steps_on(mesh, form, layers), batch, adapters)
        capacity = pltpu.get_tpu_info().hbm_capacity_bytes
    memory = compiled.memory_analysis()
    cache = POSITIONS * CACHE_BYTES * layers
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes <= MOST_TEMPORARIES[layers] * MIB
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes < capacity
    kernels = (4 if form == "int4" else 0) + (program is decode)  # products, and attention
    assert compiled.as_text().count("tpu_custom_call") == kernels * layers


@pytest.mark.parametrize("form", ["bf16", "int4"])
def test_tensor_parallel_decode_takes_the_forms_that_xla_partitions(target, form: str) -> None:
    with target("v5e", model=8) as mesh:
        compiled = decode(steps_on(mesh, form, 2), 8)
    text = compiled.as_text()
    assert "all-reduce" in text and "tpu_custom_call" not in text
    assert compiled.memory_analysis().temp_size_in_bytes <= MOST_TEMPORARIES[2] * MIB
