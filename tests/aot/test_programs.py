"""The programs of the released model compile for real chips, fit, and move no more than they must."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import prefer
from pallas_kernels.quantized import QuantizedArray
from phi4mm_jax.config import ModelConfig, RuntimeConfig, TextConfig
from phi4mm_jax.runtime.memory import bytes_per_device
from phi4mm_jax.runtime.steps import Steps

PRESET = "tpu_v5e_1"
CHUNK = 512
MIB = 2**20
MOST_TEMPORARIES = {2: 16, 32: 384}
"""MiB by number of layers. Two layers show what is copied in each: the least is a weight of 3072 x 3072 in bfloat16, 18
MiB, a layer's keys take 64. All 32 show that it all fits; of a long row XLA moves the scales of int8 keys and values, a
33rd of the cache, through the chip."""
MOST_TRAFFIC = 1.10
"""Of what a decode step must read: its weights and the live keys and values."""


class Case(NamedTuple):
    """A program of the decoder."""

    chip: str
    mesh: tuple[int, int]
    """Chips for rows of the batch, and for heads, MLP columns and vocabulary."""
    program: str
    form: str
    batch: int = 8
    positions: int = 4096
    cache: str = "bfloat16"
    layers: int = 2
    adapters: bool = False

    def __str__(self) -> str:
        """A name for the test."""
        mesh = "x".join(map(str, self.mesh))
        size = f"{self.batch}x{self.positions}-{self.cache}"
        return f"{self.chip}-{mesh}-{self.program}-{self.form}-{size}-{self.layers}{'-adapters' * self.adapters}"


CHIPS, MESHES, FORMS = ("v5e", "v5p", "v6e"), ((1, 1), (1, 4), (1, 8)), ("bf16", "int8", "w8a8", "int4")
LONG = {"batch": 1, "positions": 131072 + CHUNK, "cache": "int8", "layers": 32, "adapters": True}
SELECTION = [
    *(Case("v5e", (1, 1), "decode", form) for form in FORMS),
    *(Case("v5e", (1, model), "decode", form) for model in (4, 8) for form in ("int8", "int4")),
    *(Case("v5e", mesh, "prefill", "int4") for mesh in ((1, 1), (1, 8))),
    Case("v5e", (1, 1), "decode", "int4", batch=1, cache="int8"),
    Case("v5e", (2, 4), "decode", "int4"),
    Case("v5e", (1, 1), "decode", "int4", layers=32),
]
"""The rest is slow."""


def cases() -> Iterator[Any]:
    """Each program in each format, on one chip and several; all of its layers where it may be tight."""
    everything = [*SELECTION]
    for chip, mesh, program, form in itertools.product(CHIPS, MESHES, ("decode", "prefill"), FORMS):
        everything += [Case(chip, mesh, program, form), Case(chip, mesh, program, form, layers=32, adapters=True)]
    for chip, form, cache in itertools.product(CHIPS, FORMS, ("bfloat16", "int8")):
        everything.append(Case(chip, (1, 1), "decode", form, batch=1, positions=32768, cache=cache))
    for program, form in itertools.product(("decode", "prefill"), ("int8", "int4")):
        everything.append(Case("v5e", (1, 1), program, form, **LONG))
    for case in dict.fromkeys(everything):
        yield pytest.param(case, marks=[] if case in SELECTION else [pytest.mark.slow], id=str(case))


@pytest.fixture
def steps_on(decoder_steps):
    """The programs of a case."""
    return lambda mesh, case: decoder_steps(mesh, PRESET, case.form, case.layers, dtypes={"kv_cache": case.cache})


@pytest.fixture
def compile_text(compile_decoder):
    """The program of a case."""
    return lambda steps, case: compile_decoder(steps, case.program, case.batch, case.positions, case.adapters)


def most_temporaries(case: Case, text: TextConfig) -> int:
    """Bytes. A v5p has half the VMEM of the others, so that a chunk's activations in float32 lie in memory."""
    if (case.chip, case.program, case.layers) != ("v5p", "prefill", 2):
        return MOST_TEMPORARIES[case.layers] * MIB
    sums = 2 * case.layers * text.hidden_size  # of each layer's out and down: XLA keeps them all for the last one
    return 4 * CHUNK * (sums + 2 * text.intermediate_size // case.mesh[1])


def least_traffic(steps: Steps, case: Case, leaves: dict[str, Any]) -> int:
    """Bytes of the weights and the cache that a decode step of a chip reads."""
    names = [path for path in leaves if path.startswith("text.") and (case.adapters or path[-2:] not in ("_a", "_b"))]
    return bytes_per_device([[leaves[name] for name in names], steps.state_shapes(case.batch, case.positions).caches])


def quantized_shapes(leaves: dict[str, Any]) -> list[tuple[int, ...]]:
    """Of the decoder's weights on a chip."""
    weights = [w for path, w in leaves.items() if path.startswith("text.") and isinstance(w, QuantizedArray)]
    return [w.values.sharding.shard_shape(w.shape) for w in weights]


@pytest.mark.parametrize("case", list(cases()))
def test_decoder(target, schedule, steps_on, compile_text, placed, case: Case) -> None:
    with target(case.chip, *case.mesh) as mesh:
        steps = steps_on(mesh, case)
        compiled = compile_text(steps, case)
        capacity = pltpu.get_tpu_info().hbm_capacity_bytes
    encoders = bytes_per_device([leaf for path, leaf in placed(steps).items() if not path.startswith("text.")])
    cache = bytes_per_device(steps.state_shapes(case.batch, case.positions).caches)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes <= most_temporaries(case, steps.model.text)
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + encoders < capacity

    rows_are_spread = case.mesh[0] > 1 and case.program == "prefill"  # XLA then attends
    kernels = (4 if case.form == "int4" else 0) + (not rows_are_spread)
    assert compiled.as_text().count("tpu_custom_call") == kernels * case.layers
    program = schedule(compiled)
    work = program.loop() if case.program == "decode" else program.entry
    assert not program.wide_copies(work, quantized_shapes(placed(steps)))
    if case.program == "decode":
        assert program.traffic(work) <= MOST_TRAFFIC * least_traffic(steps, case, placed(steps))


def test_a_dequantized_weight_would_be_seen(target, schedule, steps_on, compile_text, placed) -> None:
    """Otherwise the tests above would prove nothing."""
    case = Case("v5e", (1, 1), "decode", "int4")
    with target(case.chip, *case.mesh) as mesh, prefer("xla"):
        steps = steps_on(mesh, case)
        program = schedule(compile_text(steps, case))
    assert program.traffic(program.loop()) > MOST_TRAFFIC * least_traffic(steps, case, placed(steps))
    assert program.wide_copies(program.loop(), quantized_shapes(placed(steps)))


ENCODERS = list(itertools.product(CHIPS, ((1, 1), (1, 4), (1, 8)), ("images", "speech"), ("none", "int8")))


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "shape", "encoder", "form"), ENCODERS)
def test_encoders(target, placed, array, chip: str, shape: tuple[int, int], encoder: str, form: str) -> None:
    """Four crops of a picture, or two windows of speech."""
    with target(chip, *shape) as mesh:
        runtime = RuntimeConfig.load(PRESET, quantization={"encoders": form})
        steps = Steps(ModelConfig.load("phi4mm"), runtime, mesh)
        tower = "vision" if encoder == "images" else "audio"
        weights = tuple(leaf for path, leaf in placed(steps).items() if path.startswith(f"{tower}."))
        if encoder == "images":
            side, patches = steps.model.vision.image_size, steps.model.vision.patches_per_side**2
            crops = array(steps, jnp.float32, 4, 3, side, side)
            masks, positions = array(steps, jnp.bool_, 4, patches), array(steps, jnp.int32, 4, patches)
            lowered = steps.encode_images.lower(weights, crops, masks, positions)
        else:
            audio = steps.model.audio
            windows = array(steps, jnp.float32, 2, 8 + audio.window_frames, audio.input_size)
            flags, counts = array(steps, jnp.bool_, 2), array(steps, jnp.int32, 2)
            lowered = steps.encode_audio.lower(weights, windows, flags, counts, counts, flags)
        memory = lowered.compile().memory_analysis()
    # Four crops have 34 MiB between the MLP's products; a window of speech 157 MiB at half its frames, and some copies.
    assert memory.temp_size_in_bytes < {"images": 192, "speech": 704}[encoder] * MIB
