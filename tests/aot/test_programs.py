"""The programs of the released model compile for real chips, fit, and copy neither the cache nor a weight."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from jax.experimental.pallas import tpu as pltpu

PRESET = "tpu_v5e_1"
MIB = 2**20
MOST_TEMPORARIES = {2: 16, 32: 256}
"""MiB by number of layers. Two layers show what is copied in each: the least is a weight of 3072 x 3072 in bfloat16, 18
MiB, a layer's keys take 64. All 32 show that it all fits."""


SELECTION = {
    *(("v5e", "decode", form, 8, 2, ()) for form in ("bf16", "int8", "int4")),
    *(("v5e", "decode", form, 1, 2, ()) for form in ("int8", "int4")),
    ("v5e", "prefill", "int4", 8, 2, ()),
    ("v5e", "decode", "int4", 8, 32, ()),
}


def cases() -> Iterator[Any]:
    """Everything; what is not in the selection is slow."""
    forms, batches, adapters = ("bf16", "int8", "int4"), (1, 8), ((), ("speech", "vision"))
    everything = itertools.product(("v5e", "v5p", "v6e"), ("decode", "prefill"), forms, batches, (2, 32), adapters)
    for case in everything:
        chip, program, form, batch, layers, used = case
        name = f"{chip}-{program}-{form}-{batch}-{layers}{'-adapters' * bool(used)}"
        yield pytest.param(*case, marks=[] if case in SELECTION else [pytest.mark.slow], id=name)


@pytest.mark.parametrize(("chip", "program", "form", "batch", "layers", "adapters"), list(cases()))
def test_fits_and_copies_nothing(
    target, compile_program, cache_bytes, chip, program, form, batch, layers, adapters
) -> None:
    with target(chip) as mesh:
        compiled = compile_program(mesh, PRESET, program, form, batch, layers, adapters)
        capacity = pltpu.get_tpu_info().hbm_capacity_bytes
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes * layers
    assert memory.temp_size_in_bytes <= MOST_TEMPORARIES[layers] * MIB
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes < capacity
    kernels = (4 if form == "int4" else 0) + (program == "decode")  # products, and attention
    assert compiled.as_text().count("tpu_custom_call") == kernels * layers


@pytest.mark.parametrize("form", ["bf16", "int4"])
def test_tensor_parallel_decode_takes_the_forms_that_xla_partitions(target, compile_program, form: str) -> None:
    with target("v5e", model=8) as mesh:
        compiled = compile_program(mesh, PRESET, "decode", form, 8, 2)
    text = compiled.as_text()
    assert "all-reduce" in text and "tpu_custom_call" not in text
    assert compiled.memory_analysis().temp_size_in_bytes <= MOST_TEMPORARIES[2] * MIB
