"""`matmul` on a Hopper GPU, interpreted or real: against the dequantized weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.matmul import gpu, matmul
from pallas_kernels.quantized import Format, QuantizedArray, quantize


@pytest.fixture
def check(hopper_mode):
    """Compares with float64; an error is small beside the length of the factors, whatever their product is."""
    gpu._call.cache_clear()

    def run(x: jax.Array, w: QuantizedArray, out_dtype=jnp.float32) -> jax.Array:
        y = jax.jit(functools.partial(gpu.matmul, out_dtype=out_dtype, interpret=hopper_mode))(x, w)
        exact = [np.asarray(a, np.float64) for a in (x.astype(w.dtype), w.dequantize(jnp.float32))]
        expected = np.einsum("...k,nk->...n", *exact)
        assert (y.shape, y.dtype) == (expected.shape, out_dtype)
        lengths = [np.linalg.norm(a, axis=-1) for a in exact]
        tolerance = 1e-5 if out_dtype == jnp.float32 else 1e-2
        assert (np.abs(np.asarray(y, np.float64) - expected) <= tolerance * lengths[0][..., None] * lengths[1]).all()
        return y

    yield run
    gpu._call.cache_clear()


def draw(shape: tuple[int, ...], out_features: int, form: Format) -> tuple[jax.Array, QuantizedArray]:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((*lead, shape[-1]), np.float32) for lead in (shape[:-1], (out_features,)))
    return jnp.asarray(x), quantize(jnp.asarray(w, jnp.bfloat16), form)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_formats(check, bits: int, size: int) -> None:
    check(*draw((5, 8 * size), 64, Format(bits, size)))


@pytest.mark.parametrize("blocks", [1, 4, hopper.BLOCKS])
def test_parts_of_the_columns(check, monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """All steps in one block, two steps in each of two, one in each of four."""
    monkeypatch.setattr(hopper, "BLOCKS", blocks)
    x, w = draw((9, 1024), 128, Format(4, 32))
    assert gpu.sizes(9, w).splits == min(4, max(1, blocks // 2))
    check(x, w)


@pytest.mark.parametrize(("shape", "out_dtype"), [((512,), "bfloat16"), ((2, 3, 512), "float32")])
def test_leading_axes_and_types(check, shape: tuple[int, ...], out_dtype: str) -> None:
    check(*draw(shape, 64, Format(4, 64)), out_dtype=jnp.dtype(out_dtype))


def test_infinities_and_nans_stay_in_their_rows(hopper_mode) -> None:
    x, w = draw((3, 256), 64, Format(8, 32))
    positive = QuantizedArray(jnp.maximum(w.values, 1), jnp.abs(w.scales))
    y = gpu.matmul(
        x.at[1, 255].set(jnp.inf).at[2, 0].set(jnp.nan), positive, out_dtype=jnp.float32, interpret=hopper_mode
    )
    assert np.isfinite(y[0]).all() and np.isposinf(y[1]).all() and np.isnan(y[2]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("form", [Format(4, 32), Format(4, 64), Format(4, 128), Format(8, 64)], ids=str)
@pytest.mark.parametrize(("out_features", "columns"), [(5120, 3072), (16384, 3072), (3072, 8192)])
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_full_size(rows: int, out_features: int, columns: int, form: Format) -> None:
    """On the GPU, as XLA does it, which rounds the dequantized weight."""
    x, w = draw((rows, columns), out_features, form)
    try:
        y = matmul(x, w, implementation="gpu")
    except NotImplementedError as error:
        pytest.skip(str(error))
    expected = matmul(x, w, implementation="xla")
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-2 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("rows", "shape", "groups", "scales", "reason"),
    [
        (2, (64, 512), 1, "bfloat16", "several scales per row"),
        (2, (64, 512), 8, "float32", "not int4 and float32"),
        (33, (64, 512), 8, "bfloat16", "1 to 32 rows and a multiple of 64 outputs, not 33 and 64"),
        (2, (72, 512), 8, "bfloat16", "not 2 and 72"),
        (2, (64, 256), 4, "bfloat16", "a multiple of 8 groups of 32, 64 or 128 columns, not 256 / 4"),
        (2, (64, 512), 32, "bfloat16", "not 512 / 32"),
        (2, (64, 512), 8, "bfloat16", "Hopper"),
    ],
)
def test_what_it_leaves_to_xla(
    monkeypatch: pytest.MonkeyPatch, rows: int, shape: tuple[int, int], groups: int, scales: str, reason: str
) -> None:
    cpu = jax.devices("cpu")
    monkeypatch.setattr(jax, "devices", lambda: cpu)
    w = QuantizedArray(jnp.ones(shape, jnp.int4), jnp.ones((shape[0], groups), jnp.dtype(scales)))
    x = jnp.ones((rows, shape[1]))
    with pytest.raises(NotImplementedError, match=reason):
        matmul(x, w, implementation="gpu")
    np.testing.assert_array_equal(matmul(x, w, implementation=("gpu", "xla")), matmul(x, w, implementation="xla"))


def test_rounded_activations_are_left_to_xla() -> None:
    w = QuantizedArray(jnp.ones((64, 512), jnp.int8), jnp.ones((64, 8), jnp.bfloat16), "int8")
    with pytest.raises(NotImplementedError, match="float activations"):
        matmul(jnp.ones((2, 512)), w, implementation="gpu")


@pytest.mark.parametrize(("columns", "groups"), [(3072, 96), (3072, 48), (3072, 24), (8192, 64)])
@pytest.mark.parametrize("values", ["int4", "int8"])
def test_stages_fit_shared_memory(columns: int, groups: int, values: str) -> None:
    for rows in (8, 16, 24, 32):
        sizes = {"out_features": 3072, "columns": columns, "groups": groups, "values": jnp.dtype(values)}
        product = gpu.Product(rows=rows, **sizes)
        assert product.steps % product.splits == 0
        held = product.stages * product.step_bytes + product.kept_bytes
        assert product.stages == 1 or held <= hopper.SHARED_BYTES


def test_it_proves_itself_before_it_is_used(hopper_mode, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    gpu.is_right.cache_clear()
    assert jax.jit(lambda: jnp.full(1, gpu.is_right(hopper_mode)))()
    gpu.is_right.cache_clear()
    multiply = gpu._multiply
    monkeypatch.setattr(gpu, "_multiply", lambda *args: multiply(*args).at[3, 60].add(0.2))
    assert not gpu.is_right(hopper_mode)
    assert "matmul is left to XLA, as the kernel fails on this GPU: it is wrong here" in caplog.text
    gpu.is_right.cache_clear()
