"""`matmul` on a TPU, interpreted: against the dequantized weight, over shapes that fit no block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.matmul import matmul, reference, tpu
from pallas_kernels.quantized import Format, QuantizedArray, quantize

FORMATS = {
    f"int{bits}, groups of {size}{', ' + kind if kind != 'float' else ''}": Format(bits, size, kind)
    for bits in (4, 8)
    for size in (32, 64, 128)
    for kind in ("float", "int8")
}


def draw(rows: int, out_features: int, columns: int, form: Format, dtype: str) -> tuple[jax.Array, QuantizedArray]:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((n, columns)), jnp.dtype(dtype)) for n in (rows, out_features))
    return x, quantize(w, form)


def product(x, w, interpret: bool | pltpu.InterpretParams = True, out_dtype=jnp.float32) -> jax.Array:
    return jax.jit(functools.partial(tpu.matmul, out_dtype=out_dtype, interpret=interpret))(x, w)


def expected(x: jax.Array, w: QuantizedArray) -> np.ndarray:
    """In float64; of rounded activations, where the weight asks for them."""
    exact = np.asarray(x.astype(w.dtype), np.float64)
    if w.activations == "int8":
        values, scales = reference.round_groups(x, w.scales.shape[1])
        exact = (np.asarray(values, np.float64) * np.asarray(scales, np.float64)[:, :, None]).reshape(x.shape)
    return exact @ np.asarray(w.dequantize(jnp.float32), np.float64).T


def check(y: jax.Array, x: jax.Array, w: QuantizedArray) -> None:
    """Sums of float32: an error is small beside the length of the factors, whatever their product is."""
    lengths = [np.linalg.norm(np.asarray(a, np.float64), axis=1) for a in (x, w.dequantize(jnp.float32))]
    error = np.abs(np.asarray(y, np.float64) - expected(x, w))
    assert y.shape == error.shape
    assert (error <= 1e-6 * np.outer(*lengths)).all()


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_formats(form: Format) -> None:
    x, w = draw(5, 50, 256, form, "bfloat16")
    check(product(x, w), x, w)


@pytest.mark.parametrize("form", [Format(4, 64), Format(4, 256), Format(8, 128, "int8")], ids=str)
@pytest.mark.parametrize(
    ("rows", "out_features", "columns", "dtype"),
    [
        (1, 1, 512, "float32"),
        (1, 128, 768, "bfloat16"),
        (17, 300, 512, "bfloat16"),
        (64, 129, 1024, "float32"),
        (3, 2100, 512, "bfloat16"),
    ],
)
def test_shapes(form: Format, rows: int, out_features: int, columns: int, dtype: str) -> None:
    x, w = draw(rows, out_features, columns, form, dtype)
    check(product(x, w), x, w)


@pytest.mark.parametrize("form", [Format(4, 128), Format(4, 64), Format(8, 32)], ids=str)
def test_many_rows(form: Format) -> None:
    """Several blocks; with narrow groups the scales multiply the weight, as they do in XLA."""
    x, w = draw(300, 140, 256, form, "float32")
    check(product(x, w), x, w)
    if form.group_size < tpu.LANES:
        x, w = draw(300, 140, 256, form, "bfloat16")
        y = reference.matmul(x, w, out_dtype=jnp.float32)
        np.testing.assert_allclose(product(x, w), y, rtol=0, atol=1e-6 * float(jnp.abs(y).max()))


@pytest.mark.parametrize(
    ("shape", "out_dtype"), [((256,), "bfloat16"), ((1, 2, 256), "float32"), ((2, 3, 256), "bfloat16")]
)
def test_leading_axes_and_types(shape: tuple[int, ...], out_dtype: str) -> None:
    x, w = draw(6, 50, 256, Format(4, 64), "bfloat16")
    x = x.reshape(-1)[: np.prod(shape)].reshape(shape).astype(jnp.float32)
    y = product(x, w, out_dtype=jnp.dtype(out_dtype))
    assert (y.shape, y.dtype) == ((*shape[:-1], 50), out_dtype)
    np.testing.assert_array_equal(y.reshape(-1, 50), product(x.reshape(-1, 256), w, out_dtype=y.dtype))


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_zeros(activations: str) -> None:
    x, w = draw(3, 50, 256, Format(4, 64, activations), "bfloat16")
    zero = QuantizedArray(jnp.zeros_like(w.values), w.scales, activations)
    np.testing.assert_array_equal(product(x, zero), 0)
    np.testing.assert_array_equal(product(jnp.zeros_like(x), w), 0)


def test_infinities_and_nans_stay_in_their_rows() -> None:
    x, w = draw(3, 50, 256, Format(8, 32), "bfloat16")
    positive = QuantizedArray(jnp.maximum(w.values, 1), jnp.abs(w.scales))
    y = product(x.at[1, 255].set(jnp.inf).at[2, 0].set(jnp.nan), positive)
    check(y[:1], x[:1], positive)
    assert np.isposinf(y[1]).all() and np.isnan(y[2]).all()


def test_block_size_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = draw(40, 300, 256, Format(4, 64), "bfloat16")
    y = product(x, w)
    tpu._call.cache_clear()
    monkeypatch.setattr(tpu, "_STEP_BYTES", 1)
    monkeypatch.setattr(tpu, "_MAX_BLOCK_ROWS", 16)
    np.testing.assert_array_equal(product(x, w), y)
    tpu._call.cache_clear()


@pytest.mark.parametrize("limit", [2**20, 2**22, 2**24])
def test_blocks_fit(limit: int) -> None:
    bf16, int4 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int4)
    sizes = {"rows": 1024, "out_features": 16384, "columns": 3072, "groups": 24}
    many = tpu._Product(**sizes, x=bf16, values=int4, scales=bf16, out=bf16)
    assert many.held(*many.blocks(limit)) <= limit
    with pytest.raises(NotImplementedError, match="bytes of VMEM, more than 65536"):
        many.blocks(2**16)


@pytest.mark.parametrize("form", [Format(4, 64), Format(8, 128, "int8")], ids=str)
def test_reads_nothing_that_was_not_written(form: Format) -> None:
    """Simulated with memory that is nan until it is written, and with its copies checked for races."""
    x, w = draw(20, 300, 256, form, "bfloat16")
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager", uninitialized_memory="nan")
    check(product(x, w, params), x, w)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("shape", "groups", "scales", "reason"),
    [
        ((8, 128), 1, "float32", "several scales per row"),
        ((8, 96), 3, "float32", "not 96 / 3"),
        ((8, 128), 8, "float32", "not 128 / 8"),
        ((8, 384), 2, "float32", "not 384 / 2"),
        ((8, 128), 2, "float16", "not int4 and float16"),
    ],
)
def test_what_it_leaves_to_xla(shape: tuple[int, int], groups: int, scales: str, reason: str) -> None:
    w = QuantizedArray(jnp.ones(shape, jnp.int4), jnp.ones((shape[0], groups), jnp.dtype(scales)))
    x = jnp.ones((2, shape[1]))
    with pytest.raises(NotImplementedError, match=reason):
        matmul(x, w, implementation="tpu")
    np.testing.assert_array_equal(matmul(x, w, implementation=("tpu", "xla")), matmul(x, w, implementation="xla"))


def test_plain_weights_are_left_to_xla() -> None:
    with pytest.raises(NotImplementedError, match="several scales per row"):
        matmul(jnp.ones((2, 128)), jnp.ones((8, 128)), implementation="tpu")


@pytest.mark.parametrize(("rows", "reason"), [(0, "rows and a weight, not 0"), (257, "few rows of integers")])
def test_rows_that_it_leaves_to_xla(rows: int, reason: str) -> None:
    x, w = draw(rows, 8, 128, Format(4, 64, "int8"), "float32")
    with pytest.raises(NotImplementedError, match=reason):
        matmul(x, w, implementation="tpu")
    assert matmul(x, w, implementation=("tpu", "xla")).shape == (rows, 8)
