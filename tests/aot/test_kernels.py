"""Every kernel compiles for real chips, at the shapes of the released model."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention import tpu as decode_tpu
from pallas_kernels.kv import encode
from pallas_kernels.matmul import matmul
from pallas_kernels.matmul.tpu import LANES
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantized import Format, QuantizedArray

WEIGHTS = {
    "qkv": (5120, 3072),
    "out": (3072, 3072),
    "gate_up": (16384, 3072),
    "down": (3072, 8192),
    "head": (200064, 3072),
}
FORMATS = [Format(b, size, kind) for b in (4, 8) for size in (32, 64, 128) for kind in ("float", "int8")]
DECODE_ROWS = (1, 8, 64)
SELECTION = {
    *(("v5e", name, Format(4, 64), 8) for name in WEIGHTS),
    *(("v5e", "out", form, 8) for form in FORMATS),
    *(("v5e", "down", Format(4, 32), rows) for rows in DECODE_ROWS),
    *((chip, name, Format(4, 64), 1) for chip in ("v5p", "v6e") for name in ("gate_up", "down")),
    ("v6e", "gate_up", Format(4, 128), 512),
}


def cases() -> Iterator[Any]:
    """Everything; what is not in the selection is slow."""
    decode = itertools.product(("v5e", "v5p", "v6e"), WEIGHTS, FORMATS, DECODE_ROWS)
    prefill = itertools.product(("v5e", "v5p", "v6e"), WEIGHTS, (f for f in FORMATS if f.group_size == 128), (512,))
    for chip, name, form, rows in (*decode, *prefill):
        marks = [] if (chip, name, form, rows) in SELECTION else [pytest.mark.slow]
        kind = "w8a8" if form.activations == "int8" else "weights"
        yield pytest.param(
            *(chip, name, form, rows), marks=marks, id=f"{chip}-{name}-int{form.bits}-{form.group_size}-{kind}-{rows}"
        )


def weight(name: str, form: Format) -> QuantizedArray:
    """Its shapes."""
    rows, columns = WEIGHTS[name]
    values = jax.ShapeDtypeStruct((rows, columns), form.dtype)
    scales = jax.ShapeDtypeStruct((rows, columns // (form.group_size or columns)), jnp.bfloat16)
    return QuantizedArray(values, scales, form.activations, scales if form.zero_point else None)


@pytest.mark.parametrize(("chip", "name", "form", "rows"), list(cases()))
def test_matmul(compile_for, chip: str, name: str, form: Format, rows: int) -> None:
    w = weight(name, form)
    x = jax.ShapeDtypeStruct((rows, w.shape[1]), jnp.bfloat16)
    compiled = compile_for(chip, matmul, x, w)  # the default choice on this chip
    assert f"%matmul_int{form.bits}_" in compiled.as_text()
    # Scales may be turned round, activations padded or rounded; the weight, half a byte a value, is read as it lies.
    most = w.values.size // 8 + 4 * x.size
    if form.activations == "int8" and form.group_size < LANES:
        most += 4 * LANES * w.shape[1]  # XLA finds the largest of a narrow group with the rows, up to 64, in the lanes
    assert compiled.memory_analysis().temp_size_in_bytes < most


@pytest.mark.parametrize(("name", "rows"), [("gate_up", 1), ("gate_up", 8), ("down", 8), ("out", 512)])
def test_a_zero_point_is_a_product_beside_the_kernel(compile_for, name: str, rows: int) -> None:
    w = weight(name, Format(4, 64, zero_point=True))
    x = jax.ShapeDtypeStruct((rows, w.shape[1]), jnp.bfloat16)
    compiled = compile_for("v5e", matmul, x, w)
    assert "%matmul_int4_" in compiled.as_text()
    # Two results in float32, and the sums of x, whose groups fill half of the lanes.
    size = w.values.size // 8 + 4 * x.size + 8 * rows * (w.shape[0] + 128)
    assert compiled.memory_analysis().temp_size_in_bytes < size


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("form", [Format(8), Format(8, floating=True)], ids=["int8", "fp8"])
def test_rows_of_one_scale_are_left_to_xla(compile_for, chip: str, form: Format) -> None:
    w = weight("gate_up", form)
    compiled = compile_for(chip, matmul, jax.ShapeDtypeStruct((8, 3072), jnp.bfloat16), w)
    assert "tpu_custom_call" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < w.values.size // 100


def test_a_product_over_several_chips_is_refused(target) -> None:
    """Rather than gathering the weight, where nothing says how it lies."""
    with target("v5e", model=4) as mesh:
        cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", None))
        w = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=cut), weight("qkv", Format(4, 64)))
        with pytest.raises(NotImplementedError, match="cannot be automatically partitioned"):
            jax.jit(matmul).lower(jax.ShapeDtypeStruct((8, 3072), jnp.bfloat16), w)


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        ((4096, 1024), jax.errors.JaxRuntimeError, "vmem"),
        ((8, 100), ValueError, "divisible by 8 and 128"),
    ],
)
def test_what_the_compiler_refuses(compile_for, block: tuple[int, int], error: type, message: str) -> None:
    """Otherwise the tests above would prove nothing."""

    def copy(x_ref: jax.Array, out_ref: jax.Array) -> None:
        out_ref[...] = x_ref[...]

    x = jax.ShapeDtypeStruct((8192, 3200), jnp.float32)
    spec = pl.BlockSpec(block, lambda i, j: (i, j))
    call = functools.partial(pl.pallas_call, copy, out_shape=x, grid=(2, 2), in_specs=[spec], out_specs=spec)
    with pytest.raises(error, match=message):
        compile_for("v5e", call(), x)


CHIPS = pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
CACHES = pytest.mark.parametrize("dtype", ["bfloat16", "int8"])


def cache_of(dtype: str, rows: int, positions: int) -> Any:
    """Shapes of keys or values."""
    return jax.eval_shape(lambda x: encode(x, dtype), jax.ShapeDtypeStruct((rows, 8, positions, 128), jnp.float32))


@CHIPS
@CACHES
def test_decode_attention(compile_for, chip: str, dtype: str) -> None:
    """It reads the cache where it lies."""
    cache = cache_of(dtype, 8, 4096)
    q, lengths = jax.ShapeDtypeStruct((8, 24, 128), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.int32)
    compiled = compile_for(chip, functools.partial(decode_attention, scale=128**-0.5), q, cache, cache, lengths)
    assert "%decode_attention_" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


@CHIPS
@CACHES
@pytest.mark.parametrize(("rows", "chunk", "positions"), [(4, 2048, 4096), (1, 64, 132096)])
def test_prefill_attention(compile_for, chip: str, dtype: str, rows: int, chunk: int, positions: int) -> None:
    """It reads the rows of the cache where they lie, and holds no scores in memory."""
    cache = cache_of(dtype, 2 * rows, positions)
    q, numbers = jax.ShapeDtypeStruct((rows, chunk, 24, 128), jnp.bfloat16), jax.ShapeDtypeStruct((rows,), jnp.int32)
    attend = functools.partial(prefill_attention, scale=128**-0.5)
    compiled = compile_for(chip, attend, q, cache, cache, numbers, numbers)
    assert "%prefill_attention_" in compiled.as_text()
    # Queries and result may change their tiling.
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20 + 2 * q.size * q.dtype.itemsize


def test_a_broken_block_is_refused(compile_for, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, it gives the right result."""
    monkeypatch.setattr(decode_tpu, "_BLOCK", 100)
    q, lengths = jax.ShapeDtypeStruct((8, 24, 128), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.int32)
    cache = cache_of("int8", 8, 4096)
    with pytest.raises(ValueError, match="divisible by"):
        compile_for("v5e", functools.partial(decode_attention, scale=1.0), q, cache, cache, lengths)
