"""Weights in few bits: what rounding costs, and that products and lookups agree with the dequantized weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import matmul
from pallas_kernels.quantized import Format, QuantizedArray, quantize, take

FORMATS = {
    "int8": (Format(8), 0.008),
    "int8, groups": (Format(8, 32), 0.006),
    "int4, groups of 32": (Format(4, 32), 0.085),
    "int4, groups of 64": (Format(4, 64), 0.092),
    "int4": (Format(4), 0.1),
}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def relative_error(value: jax.Array, exact: jax.Array) -> float:
    return float(jnp.linalg.norm(value - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize(("form", "most"), FORMATS.values(), ids=FORMATS)
def test_error_of_rounding(form: Format, most: float) -> None:
    w = normal(70, 192)
    quantized = quantize(w, form)
    assert quantized.shape == w.shape and quantized.dtype == w.dtype
    assert quantized.scales.shape == (70, 192 // (form.group_size or 192))
    assert quantized.values.dtype == (jnp.int4 if form.bits == 4 else jnp.int8)
    assert relative_error(quantized.dequantize(), w) < most


def test_range_is_clipped_where_that_costs_less() -> None:
    w = normal(1, 64).at[0, 0].set(5.0)
    plain = jnp.round(w / (5.0 / 7)) * (5.0 / 7)
    assert relative_error(quantize(w, Format(4)).dequantize(), w) < 0.95 * relative_error(plain, w)


def test_a_row_of_zeros_stays_zero() -> None:
    quantized = quantize(jnp.zeros((3, 64), jnp.bfloat16), Format(4, 32))
    np.testing.assert_array_equal(quantized.dequantize().astype(jnp.float32), 0)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(37, 64)
    whole = quantize(w, Format(4, 32))
    monkeypatch.setattr("pallas_kernels.quantized._BLOCK_BYTES", 10 * 64 * 4)
    blocks = quantize(w, Format(4, 32))
    np.testing.assert_array_equal(whole.values.astype(jnp.int8), blocks.values.astype(jnp.int8))
    np.testing.assert_array_equal(whole.scales, blocks.scales)


def test_groups_must_come_out_even() -> None:
    with pytest.raises(ValueError, match="80 columns are no multiple of group_size 64"):
        quantize(normal(4, 80), Format(4, 64))


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(("form", "_"), FORMATS.values(), ids=FORMATS)
def test_product_is_that_of_the_dequantized_weight(form: Format, _: float, rows: int) -> None:
    w, x = quantize(normal(50, 192), form), normal(rows, 192, seed=1)
    y = matmul(x, w, implementation="xla")
    assert relative_error(y, x @ w.dequantize().T) < 1e-5


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("rows", [1, 5])
def test_integer_product(rows: int, group_size: int | None) -> None:
    w, x = quantize(normal(50, 192), Format(8, group_size, activations="int8")), normal(rows, 192, seed=1)
    y = matmul(x, w, implementation="xla")
    assert 1e-4 < relative_error(y, x @ w.dequantize().T) < 0.012


def test_a_row_of_zeros_times_integers() -> None:
    w = quantize(normal(50, 64), Format(8, activations="int8"))
    np.testing.assert_array_equal(matmul(jnp.zeros((2, 64)), w, implementation="xla"), 0)


@pytest.mark.parametrize("rows", [[[3, 4], [49, 0]], [[49]]], ids=str)
def test_lookup_of_rows(rows: list) -> None:
    w, rows = quantize(normal(50, 64), Format(8)), jnp.array(rows, jnp.int32)
    np.testing.assert_array_equal(take(w, rows, jnp.float32), w.dequantize()[rows])
    plain = normal(50, 64)
    np.testing.assert_array_equal(take(plain, rows, jnp.float32), plain[rows])


def test_is_a_pytree_that_jit_takes() -> None:
    w = quantize(normal(50, 64), Format(4, 32))
    again = jax.jit(lambda w: jax.tree.map(lambda leaf: leaf, w))(w)
    assert isinstance(again, QuantizedArray) and again.values.dtype == jnp.int4
