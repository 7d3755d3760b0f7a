"""The programs of the released model compile for GPUs and fit; on Hopper they copy neither the cache nor a weight."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from phi4mm_jax.runtime.memory import bytes_per_device

PRESET = "gpu_hopper"
MEMORY_BYTES = {"a100": 80e9, "h100": 80e9, "h200": 141e9}
MIB = 2**20
POSITIONS = 32768  # of all rows together
KEPT = {"decode": 16, "prefill": 58}
"""MiB of temporaries: of a prompt's 512 tokens, 16384 numbers each in float32 behind gate_up, 8192 in bfloat16 before
down, and three times 3072 in float32 around them."""
ATTENDED = 3
"""MiB of a layer's attention to a prompt, which XLA clears for all layers at once."""
BLOCKS = 36
"""MiB that attention in XLA adds: it copies 1024 keys and values of eight rows and heads."""
WIDENED = 96
"""MiB of gate_up in bfloat16, which XLA's product of a weight with groups adds."""
SELECTION = {
    *(("h200", "decode", form, 8, 2) for form in ("int8", "int4")),
    ("h200", "decode", "int4", 1, 2),
    ("h200", "prefill", "int4", 8, 2),
    ("a100", "decode", "int4", 8, 2),
}


def cases() -> Iterator[Any]:
    """Everything; what is not in the selection is slow."""
    forms = ("bf16", "int8", "w8a8", "int4")
    for case in itertools.product(("a100", "h100", "h200"), ("decode", "prefill"), forms, (1, 8), (2, 32)):
        marks = [] if case in SELECTION else [pytest.mark.slow]
        yield pytest.param(*case, marks=marks, id="-".join(map(str, case)))


@pytest.mark.parametrize(("chip", "program", "form", "batch", "layers"), list(cases()))
def test_fits(target, decoder_steps, compile_decoder, chip, program, form, batch, layers) -> None:
    with target(chip) as mesh:
        steps = decoder_steps(mesh, PRESET, form, layers)
        compiled = compile_decoder(steps, program, batch, POSITIONS // batch)
    on_hopper, decodes, grouped = chip != "a100", program == "decode", form == "int4"
    memory = compiled.memory_analysis()
    cache = bytes_per_device(steps.state_shapes(batch, POSITIONS // batch).caches)
    assert memory.alias_size_in_bytes >= cache
    most = KEPT[program] + (decodes and not on_hopper) * BLOCKS + (not decodes) * ATTENDED * layers
    most += (grouped and not (decodes and on_hopper)) * WIDENED
    assert memory.temp_size_in_bytes <= most * MIB
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert kept + memory.temp_size_in_bytes < MEMORY_BYTES[chip]
    # Products and attention; of a prompt only what the last layer does with the wanted tokens has few enough rows.
    kernels = on_hopper * ((4 * grouped + 1) * layers if decodes else 3 * grouped)
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == kernels


def test_each_gpu_runs_the_kernel_on_its_heads(target, decoder_steps, compile_decoder) -> None:
    with target("h200", model=8) as mesh:
        text = compile_decoder(decoder_steps(mesh, PRESET, "bf16", 2), "decode", 8, 4096).as_text()
    assert "all-reduce" in text and text.count('custom_call_target="mosaic_gpu') == 2
