"""Weights in few bits: what rounding costs, and that products and lookups agree with the dequantized weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cpu import library
from pallas_kernels.matmul import api, matmul, tpu
from pallas_kernels.quantized import Format, QuantizedArray, quantize, take

FORMATS = {
    "int8": (Format(8), 0.008),
    "int8, groups": (Format(8, 32), 0.006),
    "int4, groups of 32": (Format(4, 32), 0.085),
    "int4, groups of 64": (Format(4, 64), 0.092),
    "int4": (Format(4), 0.1),
    "int4, groups of 64, zero point": (Format(4, 64, zero_point=True), 0.087),
    "fp8": (Format(8, floating=True), 0.028),
}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def skewed(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).exponential(size=shape), jnp.float32)


def relative_error(value: jax.Array, exact: jax.Array) -> float:
    return float(jnp.linalg.norm(value - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize(("form", "most"), FORMATS.values(), ids=FORMATS)
def test_error_of_rounding(form: Format, most: float) -> None:
    w = normal(70, 192)
    quantized = quantize(w, form)
    assert quantized.shape == w.shape and quantized.dtype == w.dtype
    assert quantized.scales.shape == (70, 192 // (form.group_size or 192))
    assert quantized.values.dtype == form.dtype
    assert (quantized.offsets is None) != form.zero_point
    assert relative_error(quantized.dequantize(), w) < most


def test_range_is_clipped_where_that_costs_less() -> None:
    w = normal(1, 64).at[0, 0].set(5.0)
    plain = jnp.round(w / (5.0 / 7)) * (5.0 / 7)
    assert relative_error(quantize(w, Format(4)).dequantize(), w) < 0.95 * relative_error(plain, w)


def test_a_zero_point_follows_a_range_that_is_not_around_zero() -> None:
    w = skewed(64, 256)
    around_zero, free = (quantize(w, Format(4, 64, zero_point=flag)).dequantize() for flag in (False, True))
    assert relative_error(free, w) < 0.6 * relative_error(around_zero, w)


@pytest.mark.parametrize("form", [Format(4, 32), Format(4, 32, zero_point=True), Format(8, floating=True)], ids=str)
def test_a_row_of_zeros_stays_zero(form: Format) -> None:
    quantized = quantize(jnp.zeros((3, 64), jnp.bfloat16), form)
    np.testing.assert_array_equal(quantized.dequantize().astype(jnp.float32), 0)


def test_a_zero_point_restores_a_constant() -> None:
    w = jnp.full((2, 64), 0.3, jnp.bfloat16)
    np.testing.assert_array_equal(quantize(w, Format(4, 32, zero_point=True)).dequantize(), w)


def test_floats_of_eight_bits_do_not_overflow() -> None:
    """Where the scale was rounded down, the largest value of a row lies beyond theirs."""
    w = normal(500, 64).astype(jnp.bfloat16)
    assert relative_error(quantize(w, Format(8, floating=True)).dequantize(jnp.float32), w.astype(jnp.float32)) < 0.03


@pytest.mark.parametrize("zero_point", [False, True])
def test_blocks_make_no_difference(zero_point: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w, form = normal(37, 64), Format(4, 32, zero_point=zero_point)
    whole = quantize(w, form)
    monkeypatch.setattr("pallas_kernels.quantized._BLOCK_BYTES", 10 * 64 * 4)
    blocks = quantize(w, form)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, blocks)
    np.testing.assert_allclose(whole.dequantize(), blocks.dequantize(), rtol=0, atol=1e-6)


def test_groups_must_come_out_even() -> None:
    with pytest.raises(ValueError, match="80 columns are no multiple of group_size 64"):
        quantize(normal(4, 80), Format(4, 64))


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(("form", "_"), FORMATS.values(), ids=FORMATS)
def test_product_is_that_of_the_dequantized_weight(form: Format, _: float, rows: int) -> None:
    w, x = quantize(normal(50, 192), form), normal(rows, 192, seed=1)
    y = matmul(x, w, implementation="xla")
    assert relative_error(y, x @ w.dequantize().T) < 1e-5


@pytest.mark.parametrize("implementation", ["cpu", "tpu", "xla"])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(256,), (5, 256), (2, 3, 256)])
def test_every_backend_adds_the_offsets(
    implementation: str, size: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(api.BACKENDS, "tpu", functools.partial(tpu.matmul, interpret=True))
    if implementation == "cpu" and (jax.default_backend() != "cpu" or not library.available()):
        pytest.skip("no CPU kernels")
    w, x = quantize(skewed(50, 256), Format(4, size, zero_point=True)), 1 + normal(*shape)
    y = matmul(x, w, out_dtype=jnp.float32, implementation=implementation)
    assert y.shape == (*shape[:-1], 50)
    # The CPU kernel rounds activations; without the offsets, the error is above 0.5.
    assert relative_error(y, x @ w.dequantize().T) < (0.01 if implementation == "cpu" else 1e-5)


def test_offsets_and_types() -> None:
    w, x = quantize(skewed(50, 64).astype(jnp.bfloat16), Format(4, 32, zero_point=True)), normal(3, 64)
    y = matmul(x.astype(jnp.bfloat16), w, implementation="xla")
    assert (w.offsets.dtype, y.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert relative_error(y.astype(jnp.float32), x @ w.dequantize(jnp.float32).T) < 0.02


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("rows", [1, 5])
def test_integer_product(rows: int, group_size: int | None) -> None:
    w, x = quantize(normal(50, 192), Format(8, group_size, activations="int8")), normal(rows, 192, seed=1)
    y = matmul(x, w, implementation="xla")
    assert 1e-4 < relative_error(y, x @ w.dequantize().T) < 0.012


def test_a_row_of_zeros_times_integers() -> None:
    w = quantize(normal(50, 64), Format(8, activations="int8"))
    np.testing.assert_array_equal(matmul(jnp.zeros((2, 64)), w, implementation="xla"), 0)


@pytest.mark.parametrize("form", [Format(8), Format(4, 32, zero_point=True), Format(8, floating=True)], ids=str)
@pytest.mark.parametrize("rows", [[[3, 4], [49, 0]], [[49]]], ids=str)
def test_lookup_of_rows(rows: list, form: Format) -> None:
    w, rows = quantize(normal(50, 64), form), jnp.array(rows, jnp.int32)
    np.testing.assert_array_equal(take(w, rows, jnp.float32), w.dequantize()[rows])
    plain = normal(50, 64)
    np.testing.assert_array_equal(take(plain, rows, jnp.float32), plain[rows])


def test_is_a_pytree_that_jit_takes() -> None:
    w = quantize(normal(50, 64), Format(4, 32))
    again = jax.jit(lambda w: jax.tree.map(lambda leaf: leaf, w))(w)
    assert isinstance(again, QuantizedArray) and again.values.dtype == jnp.int4
