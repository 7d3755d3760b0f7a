"""The kernels for Hopper compile for it without spilling registers; what XLA does with each weight, on each GPU."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention import gpu as gpu_attention
from pallas_kernels.kv import encode
from pallas_kernels.matmul import gpu, matmul
from pallas_kernels.quantized import Format, QuantizedArray

WEIGHTS = {"qkv": (5120, 3072), "out": (3072, 3072), "gate_up": (16384, 3072), "down": (3072, 8192)}
GROUPED = [Format(bits, size) for bits in (4, 8) for size in (32, 64, 128)]
SELECTION = {
    *((name, Format(4, 64), 8) for name in WEIGHTS),
    *(("down", form, 8) for form in GROUPED),
    ("gate_up", Format(4, 64), 32),
}


def weight(name: str, form: Format) -> QuantizedArray:
    """Its shapes."""
    rows, columns = WEIGHTS[name]
    values = jax.ShapeDtypeStruct((rows, columns), jnp.int4 if form.bits == 4 else jnp.int8)
    groups = 1 if form.group_size is None else columns // form.group_size
    return QuantizedArray(values, jax.ShapeDtypeStruct((rows, groups), jnp.bfloat16), form.activations)


def activations(rows: int, w: QuantizedArray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, w.shape[1]), jnp.bfloat16)


def cases() -> Iterator[Any]:
    """Everything that the kernel does; what is not in the selection is slow."""
    for name, form, rows in itertools.product(WEIGHTS, GROUPED, (8, 16, 32)):
        try:
            gpu.sizes(rows, weight(name, form))
        except NotImplementedError:
            continue
        marks = [] if (name, form, rows) in SELECTION else [pytest.mark.slow]
        yield pytest.param(name, form, rows, marks=marks, id=f"{name}-int{form.bits}-{form.group_size}-{rows}")


@pytest.fixture
def spilled(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[], list[int]]:
    """Returns the bytes of registers that each kernel spills, of those that were compiled since the test began."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    report = r"stack frame, (\d+) bytes spill stores"
    return lambda: [int(count) for count in re.findall(report, "".join(capfd.readouterr()))]


@pytest.mark.parametrize(("name", "form", "rows"), list(cases()))
def test_matmul(compile_for, spilled, name: str, form: Format, rows: int) -> None:
    gpu._call.cache_clear()
    w = weight(name, form)
    compiled = compile_for("h200", matmul, activations(rows, w), w)  # the default choice on this chip
    assert f"matmul_int{form.bits}_" in compiled.as_text()
    assert spilled() == [0]
    # Only the sums of each part of the columns: the weight, half a byte a value or more, is read as it lies.
    assert compiled.memory_analysis().temp_size_in_bytes < w.values.size // 4


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_decode_attention(compile_for, spilled, rows: int, dtype: str) -> None:
    """It reads the cache where it lies."""
    gpu_attention._call.cache_clear()
    cache = jax.eval_shape(lambda x: encode(x, dtype), jax.ShapeDtypeStruct((rows, 8, 4096, 128), jnp.float32))
    q, lengths = jax.ShapeDtypeStruct((rows, 24, 128), jnp.bfloat16), jax.ShapeDtypeStruct((rows,), jnp.int32)
    attend = functools.partial(decode_attention, scale=128**-0.5)
    compiled = compile_for("h200", attend, q, cache, cache, lengths)
    assert "decode_attention_" in compiled.as_text() and " while(" not in compiled.as_text()
    assert spilled() == [0]
    assert compiled.memory_analysis().temp_size_in_bytes < 2**23


FORMS = {"int8": Format(8), "w8a8": Format(8, activations="int8"), "int4": Format(4, 64)}


@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("chip", ["a100", "h200"])
def test_what_xla_does(compile_for, chip: str, form: Format, rows: int) -> None:
    """It widens a weight of one scale per row within the product, and any other in memory, before the product."""
    w = weight("gate_up", form)
    compiled = compile_for(chip, functools.partial(matmul, implementation="xla"), activations(rows, w), w)
    assert "mosaic_gpu" not in compiled.as_text()
    widened = 2 * w.values.size if form.group_size else 0
    results = 4 * rows * w.shape[0]
    assert widened <= compiled.memory_analysis().temp_size_in_bytes <= widened + 2 * results + 2**18


@pytest.mark.parametrize("rows", [8, 512])
def test_no_kernel_on_another_gpu(compile_for, rows: int) -> None:
    w = weight("out", Format(4, 64))
    assert "mosaic_gpu" not in compile_for("a100", matmul, activations(rows, w), w).as_text()
    with pytest.raises(NotImplementedError, match="Hopper"):
        compile_for("a100", functools.partial(matmul, implementation="gpu"), activations(8, w), w)


def test_what_the_compiler_refuses(compile_for) -> None:
    """Otherwise the tests above would prove nothing."""

    def copy(x: jax.Array, out: jax.Array, room: jax.Array) -> None:
        room[...] = x[...]
        out[...] = room[...]

    x = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    call = plgpu.kernel(copy, out_type=x, scratch_types=[plgpu.SMEM(x.shape, x.dtype)])
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        compile_for("h200", call, x)
