"""`matmul` on a CPU with weights in few bits: the compiled kernels for every instruction set."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import cpu, gated, gated_matmul, matmul
from pallas_kernels.observed import Observed
from pallas_kernels.quantized import QuantizedArray

MANY_ROWS = 26
"""From 24 on the kernel is another one."""
FORMATS = [(bits, group) for bits in (4, 8) for group in (32, 64, 128, 256, None)]


def product(x, w):
    return jax.jit(lambda x, w: matmul(x, w, out_dtype=jnp.float32, implementation="cpu"))(x, w)


def draw_weight(out_features, in_features, bits, group, scale_type="bfloat16", seed=0):
    """Every value of the type occurs, if there is room."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (out_features, in_features))
    scales = rng.uniform(0.5, 2, (out_features, in_features // (group or in_features)))
    return QuantizedArray(jnp.asarray(values, jnp.int4 if bits == 4 else jnp.int8), jnp.asarray(scales, scale_type))


def draw(rows, in_features, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, in_features)), jnp.float32)


def draw_exact(rows, in_features, seed=1):
    """Rounding to 8 bits does not change it: integers up to 127, with that in each 32 columns, times a power of 2."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-127, 128, (rows, in_features // 32, 32))
    x[:, :, rng.integers(32)] = 127
    powers = 2.0 ** rng.integers(-9, 9, (rows, 1, 1))
    return jnp.asarray((x * powers).reshape(rows, in_features), jnp.float32)


def reference(x, w):
    groups = w.scales.shape[1]
    values = np.asarray(w.values.astype(jnp.int8), np.float64).reshape(w.shape[0], groups, -1)
    dequantized = (values * np.asarray(w.scales, np.float64)[:, :, None]).reshape(w.shape)
    return np.asarray(x, np.float64) @ dequantized.T


def rounded(x, block):
    """What the kernel makes of x: with many rows, scales are powers of two."""
    blocks = np.asarray(x).reshape(x.shape[0], -1, block)
    peaks = np.max(np.abs(blocks), axis=-1, keepdims=True)
    scales = peaks / 127 if x.shape[0] < MANY_ROWS else 2 ** np.ceil(np.log2(peaks / 127))
    return (np.round(blocks * (1 / scales)) * scales).reshape(x.shape)


def error(y, x, w):
    """The largest of each row, relative to the largest result of the row."""
    expected = reference(x, w)
    assert (y.shape, y.dtype) == (expected.shape, jnp.float32)
    return np.max(np.abs(y - expected), axis=1) / np.max(np.abs(expected), axis=1)


def test_four_bits_lie_as_the_kernel_reads_them():
    """Half a byte each, the even column in the lower half."""
    values = jnp.arange(-8, 8, dtype=jnp.int8).astype(jnp.int4)
    compiled = jax.jit(lambda v: v + v).lower(values.reshape(1, 16)).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 8
    packed = jax.lax.bitcast_convert_type(values.reshape(8, 2), jnp.uint8)
    np.testing.assert_array_equal(packed, [0x98, 0xBA, 0xDC, 0xFE, 0x10, 0x32, 0x54, 0x76])


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize(
    ("out_features", "in_features", "rows"),
    [
        (1, 32, (1, 5, 24)),
        (7, 96, (1, 2, 8, 31)),
        (130, 320, (1, 2, 3, 5, 8, 16, 77)),
        (37, 3072, (1, 2, 3, 5, 8, 23)),  # several parts of the columns
        (3, 16384, (1, 8, 25)),
    ],
)
def test_exact_where_rounding_is(out_features, in_features, rows, bits, group, instruction_set):
    if group and in_features % group:
        pytest.skip("no whole groups")
    w = draw_weight(out_features, in_features, bits, group, "float32" if in_features == 320 else "bfloat16")
    for m in rows:
        x = draw_exact(m, in_features)
        scale = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w.dequantize(jnp.float32), np.float64)).T
        np.testing.assert_array_less(np.abs(product(x, w) - reference(x, w)), 1e-6 * scale)


@pytest.mark.parametrize("rows", [16, MANY_ROWS])
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_error_of_rounding(bits, group, rows, instruction_set):
    x, w = draw(rows, 3072), draw_weight(256, 3072, bits, group)
    coarser = 2 if rows == MANY_ROWS else 1  # powers of two are up to twice the scales
    assert np.max(error(product(x, w), x, w)) < 0.015 * coarser


@pytest.mark.parametrize("pairs", [1, MANY_ROWS // 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_sums(bits, pairs, instruction_set):
    """All values at the ends of their ranges: nothing saturates."""
    ends = jnp.asarray([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1])[:, None]
    values = jnp.broadcast_to(ends, (2, 256)).astype(jnp.int4 if bits == 4 else jnp.int8)
    w = QuantizedArray(values, jnp.ones((2, 1), jnp.float32))
    x = jnp.tile(jnp.asarray([[127.0], [-127.0]]), (pairs, 256))
    np.testing.assert_array_equal(product(x, w), reference(x, w))


@pytest.mark.parametrize("rows", [3, MANY_ROWS + 1])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 32), (8, None)])
def test_outliers_stay_in_their_rows_and_blocks(bits, group, rows, instruction_set):
    x, w = draw(rows, 512), draw_weight(64, 512, bits, group)
    with_outlier = x.at[1, 77].set(1000.0)
    y = product(with_outlier, w)
    np.testing.assert_array_equal(y[::2], product(x, w)[::2])
    # What is small beside the outlier is lost in its block, which is more than 1.5% of so few columns: that, no more.
    assert np.max(error(y, rounded(with_outlier, min(group or 128, 128)), w)) < 1e-5
    # Weights of zero in the outlier's block hide it: the other blocks are as precise as without it.
    hidden = QuantizedArray(w.values.at[:, :128].set(0), w.scales)
    np.testing.assert_array_equal(product(with_outlier, hidden), product(x, hidden))


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_and_tiny_rows(bits, instruction_set):
    w = draw_weight(9, 96, bits, 32)
    y = product(draw(3, 96).at[1].set(0.0).at[2].set(1e-42), w)
    np.testing.assert_array_equal(y[1:], np.zeros((2, 9)))
    for rows in (1, MANY_ROWS):
        x = draw(rows, 96) * 1e-30
        assert np.max(error(product(x, w), x, w)) < 0.03  # of few columns and rows


@pytest.mark.parametrize("bits", [4, 8])
def test_exponents_do_not_overflow(bits, instruction_set):
    """With many rows sums of a block are the lower bits of floats, whose exponents are the block's scale."""
    w = draw_weight(9, 256, bits, 128)
    x = draw(MANY_ROWS, 256).at[:, :128].multiply(1e30)
    hidden = QuantizedArray(w.values.at[:, :128].set(0), w.scales)
    np.testing.assert_array_equal(product(x, hidden), np.zeros((MANY_ROWS, 9)))  # 64 powers of two below the largest
    nothing = QuantizedArray(w.values, w.scales.at[4].set(0))
    x = draw(MANY_ROWS, 256).at[:, :128].multiply(1e-9)
    y = product(x, nothing)
    np.testing.assert_array_equal(y[:, 4], np.zeros(MANY_ROWS))
    np.testing.assert_array_equal(np.delete(y, 4, axis=1), np.delete(product(x, w), 4, axis=1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_becomes_nan_in_its_row(bad, instruction_set):
    for rows in (3, MANY_ROWS):
        y = product(draw(rows, 320).at[1, 200].set(bad), draw_weight(9, 320, 4, 64))
        np.testing.assert_array_equal(np.isnan(y), np.arange(rows)[:, None].repeat(9, axis=1) == 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_that_is_not_a_number_shows(bits, instruction_set):
    w = draw_weight(9, 320, bits, 64)
    broken = QuantizedArray(w.values, w.scales.at[7, 2].set(np.nan))
    for rows in (3, MANY_ROWS):
        y = product(draw(rows, 320), broken)
        np.testing.assert_array_equal(np.isnan(y), np.arange(9)[None, :].repeat(rows, axis=0) == 7)


def gate(x, w, groups, implementation="cpu"):
    return jax.jit(lambda x, w: gated_matmul(x, w, groups=groups, implementation=implementation))(x, w)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 128), (8, None)])
@pytest.mark.parametrize(
    ("groups", "gates", "in_features", "rows"),
    [
        (1, 1, 128, (24,)),
        (3, 5, 384, (31,)),
        (1, 48, 256, (24, 40)),  # whole panels
        (8, 100, 512, (26, 77)),  # panels of several groups
        (3, 37, 320, (25,)),
        (2, 50, 96, (24,)),
        (2, 700, 256, (29,)),  # several chunks for the threads
    ],
)
def test_gated(groups, gates, in_features, rows, bits, group, instruction_set):
    """The same sums as without the gate, of which only the exponential is another one."""
    if group and in_features % group:
        pytest.skip("no whole groups")
    w = draw_weight(2 * groups * gates, in_features, bits, group)
    w = QuantizedArray(w.values, w.scales / 32)
    for m in rows:
        x = draw(m, in_features)
        y = gate(x, w, groups)
        assert (y.shape, y.dtype) == ((m, groups * gates), jnp.float32)
        expected = gated(product(x, w), groups)
        np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-30)


def test_gates_that_are_wide_open_or_shut(instruction_set):
    """Far beyond the range of the exponential."""
    w = QuantizedArray(jnp.ones((2, 32), jnp.int8), jnp.ones((2, 1), jnp.float32))
    x = jnp.zeros((MANY_ROWS, 32)).at[:, 0].set(jnp.linspace(-1e4, 1e4, MANY_ROWS)).at[3].set(0).at[4, 7].set(np.nan)
    sums = np.asarray(product(x, w), np.float64)[:, 0]
    expected = np.where(sums < 0, 0, sums**2)  # nan where the sum is
    np.testing.assert_allclose(gate(x, w, 1)[:, 0], expected, rtol=1e-6, atol=1e-25)


def test_what_is_gated_after_the_product(kernels):
    """What the kernel does not do, and what an observer needs."""
    x, w = draw(MANY_ROWS, 64), draw_weight(12, 64, 4, 32)
    for few in (1, 23):
        with pytest.raises(NotImplementedError, match="24 rows or more, few bits, no offsets"):
            gate(x[:few], w, 3)
        np.testing.assert_array_equal(gate(x[:few], w, 3, None), gated(product(x[:few], w), 3))
    for other in (w.dequantize(jnp.bfloat16), QuantizedArray(w.values, w.scales, offsets=w.scales)):
        with pytest.raises(NotImplementedError, match="24 rows or more, few bits, no offsets"):
            gate(x, other, 3)
    np.testing.assert_array_equal(gate(x, w, 3, "xla"), gated(matmul(x, w, implementation="xla"), 3))
    seen = []
    y = gated_matmul(x, Observed(w.dequantize(jnp.float32), seen.append), groups=3)
    assert y.shape == (MANY_ROWS, 6) and len(seen) == 1
    for groups in (5, 0, -1):
        for implementation in (None, "cpu"):
            with pytest.raises(ValueError, match=f"two halves each expected, got {groups} of 12 outputs"):
                gate(x, w, groups, implementation)
    with pytest.raises(ValueError, match=r"got \(26, 32\) and \(12, 64\)"):
        gate(x[:, :32], w, 3)


def test_the_kernel_gates_many_rows_unless_told_otherwise(kernels, monkeypatch):
    x, w = draw(cpu.MANY_ROWS, 64), draw_weight(8, 64, 4, 32)

    def text():
        return jax.jit(lambda x, w: gated_matmul(x, w, groups=2)).lower(x, w).as_text()

    assert "gated_groups = 2 : i64" in text()
    monkeypatch.setenv("PHI4MM_NATIVE", "0")
    assert "gated_groups" not in text()


def test_types_and_shapes_of_what_is_gated(kernels):
    w = draw_weight(12, 64, 8, 32)
    x = draw(26, 64).astype(jnp.bfloat16)
    y = gate(x.reshape(2, 13, 64), w, 3)
    assert (y.shape, y.dtype) == ((2, 13, 6), jnp.bfloat16)
    np.testing.assert_array_equal(y.reshape(26, 6), gate(x.astype(jnp.float32), w, 3).astype(jnp.bfloat16))


@pytest.mark.parametrize(("rows", "fewer"), [(16, (1, 2, 3, 8)), (40, (24, MANY_ROWS, 31))])
def test_a_row_does_not_depend_on_the_others(rows, fewer, instruction_set):
    """Nor on how the rows of the weight are cut into chunks."""
    x, w = draw(rows, 1024), draw_weight(600, 1024, 4, 64)
    y = product(x, w)
    for m in fewer:
        np.testing.assert_array_equal(product(x[:m], w), y[:m])
    for n in (1, 6, 131):
        np.testing.assert_array_equal(product(x, QuantizedArray(w.values[:n], w.scales[:n])), y[:, :n])


THREADS = """
import hashlib, os, sys
if sys.argv[1] == "1":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax.numpy as jnp, numpy as np
from pallas_kernels.matmul import gated_matmul, matmul
from pallas_kernels.quantized import QuantizedArray
rng = np.random.default_rng(0)
values = jnp.asarray(rng.integers(-8, 8, (3000, 1024)), jnp.int4)
w = QuantizedArray(values, jnp.asarray(rng.uniform(size=(3000, 32)), jnp.bfloat16))
x = jnp.asarray(rng.normal(size=(26, 1024)), jnp.float32)
for product in (
    lambda: matmul(x[:3], w, implementation="cpu"),
    lambda: matmul(x, w, implementation="cpu"),
    lambda: gated_matmul(x, w, groups=2, implementation="cpu"),
):
    results = {np.asarray(product()).tobytes() for _ in range(20)}
    print(len(results), hashlib.sha256(results.pop()).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity")
def test_the_same_with_one_thread_and_with_all(kernels):
    one, every = (
        subprocess.run([sys.executable, "-c", THREADS, which], stdout=subprocess.PIPE, text=True, check=True).stdout
        for which in ("1", "all")
    )
    assert one == every
    assert [line[:2] for line in one.splitlines()] == ["1 "] * 3


def test_in_a_loop_nothing_is_copied(kernels):
    """Inside jit, with a while_loop: the weight stays as it lies."""

    def run(x, w):
        def step(state):
            i, x = state
            y = matmul(x, w, implementation="cpu")
            return i + 1, y / jnp.max(jnp.abs(y))

        return jax.lax.while_loop(lambda state: state[0] < 5, step, (0, x))[1]

    x, w = draw(1, 1024), draw_weight(1024, 1024, 4, 32)
    compiled = jax.jit(run).lower(x, w).compile()
    assert "phi4mm_quantized_matmul" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 << 10
    expected = x
    for _ in range(5):
        y = product(expected, w)
        expected = y / jnp.max(jnp.abs(y))
    np.testing.assert_allclose(compiled(x, w), expected, rtol=1e-4, atol=1e-5)


def test_types_and_shapes_of_x(kernels):
    w = draw_weight(6, 64, 8, 32)
    x = draw(6, 64).astype(jnp.bfloat16).reshape(3, 2, 64)
    y = matmul(x, w, implementation="cpu")
    assert (y.shape, y.dtype) == ((3, 2, 6), jnp.bfloat16)
    exact = product(x.reshape(6, 64), w)
    np.testing.assert_array_equal(y.reshape(6, 6), exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(jax.vmap(lambda x: product(x, w))(x).reshape(6, 6), exact)


def test_it_is_the_default(kernels):
    text = jax.jit(matmul).lower(draw(1, 64), draw_weight(8, 64, 4, 32)).as_text()
    assert "phi4mm_quantized_matmul" in text


def test_what_it_does_not_do(kernels, monkeypatch):
    w = draw_weight(4, 96, 4, 32)
    with pytest.raises(NotImplementedError, match="a multiple of 32 columns, not 40"):
        product(draw(1, 40), draw_weight(4, 40, 8, None))
    for group in (16, 96):
        with pytest.raises(NotImplementedError, match=f"multiple of 128 columns, not 192 / {192 // group}"):
            product(draw(1, 192), draw_weight(4, 192, 4, group))
    with pytest.raises(NotImplementedError, match="scales, not int4 and float16"):
        product(draw(1, 96), draw_weight(4, 96, 4, 32, "float16"))
    with pytest.raises(NotImplementedError, match=r"rows and a weight, not 0 and \(4, 96\)"):
        product(draw(0, 96), w)
    monkeypatch.setenv("PHI4MM_NATIVE", "0")
    with pytest.raises(NotImplementedError, match="no compiled kernels"):
        product(draw(1, 96), w)
