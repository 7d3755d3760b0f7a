"""`matmul` against numpy, and that no copy of the weight is made."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cpu import library
from pallas_kernels.matmul import cpu, matmul


@pytest.fixture(params=["cpu", "xla"])
def implementation(request):
    """Every backend of this machine."""
    if request.param == "cpu" and (jax.default_backend() != "cpu" or not library.available()):
        pytest.skip("no CPU kernels")
    return request.param


@pytest.mark.parametrize("shape", [(7,), (1, 1, 7), (3, 7), (2, 5, 7)])
@pytest.mark.parametrize("w_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("x_dtype", "out_dtype"), [("float32", None), ("bfloat16", None), ("bfloat16", "float32")])
def test_matches_numpy(shape, w_dtype, x_dtype, out_dtype, implementation):
    if implementation == "cpu" and w_dtype == "float32":
        pytest.skip("16-bit weights only")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), x_dtype)
    w = jnp.asarray(rng.normal(size=(11, 7)), w_dtype)
    with jax.default_matmul_precision("highest"):
        y = matmul(x, w, out_dtype=out_dtype, implementation=implementation)
    expected = np.asarray(x.astype(w.dtype), np.float64) @ np.asarray(w, np.float64).T
    assert y.shape == expected.shape
    assert y.dtype == (out_dtype or x_dtype)
    tolerance = 2**-8 if y.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (8,), (64,), (256,), (512,), (1, 1), (1, 256), (2, 1), (2, 128)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weight_is_not_copied(shape, dtype, implementation):
    if implementation == "cpu" and math.prod(shape) > cpu.MAX_ROWS:
        pytest.skip("few rows only")
    out_features, in_features = 2048, 2048
    x = jax.ShapeDtypeStruct((*shape, in_features), dtype)
    w = jax.ShapeDtypeStruct((out_features, in_features), jnp.bfloat16)
    product = jax.jit(lambda x, w: matmul(x, w, implementation=implementation))
    temporaries = product.lower(x, w).compile().memory_analysis().temp_size_in_bytes
    rows = math.prod(shape) + 1
    assert temporaries <= 4 * rows * (in_features + out_features) + 1024 < 4 * w.size


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (1, 8)])
def test_weight_is_not_copied_out_of_a_loop(shape, implementation):
    """As in a decode step of several tokens."""
    x = jax.ShapeDtypeStruct((*shape, 1024), jnp.float32)
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    loop = jax.jit(lambda x, w: jax.lax.fori_loop(0, 4, lambda _, y: matmul(y, w, implementation=implementation), x))
    assert loop.lower(x, w).compile().memory_analysis().temp_size_in_bytes < w.size


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"matmul: x \[..., K\] and w \[N, K\] expected, got \(2, 3\) and \(4, 5\)"):
        matmul(jnp.ones((2, 3)), jnp.ones((4, 5)))
