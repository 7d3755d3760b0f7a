import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.cpu import library
from pallas_kernels.kv import encode


@pytest.fixture
def kernels(monkeypatch):
    """The compiled kernels; skips where there is no CPU or no compiler for it."""
    monkeypatch.delenv("PHI4MM_NATIVE", raising=False)
    if jax.default_backend() != "cpu" or library._compiler() is None:
        pytest.skip("no CPU kernels")
    assert library.available()


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(kernels, monkeypatch, request):
    """Each; a machine that lacks one takes the next narrower."""
    monkeypatch.setenv("PHI4MM_NATIVE", request.param)


@pytest.fixture
def draw_cache():
    """Draws normal keys or values as a cache of some dtype holds them; returns them, and what they are in float64."""

    def draw(shape, dtype, seed):
        cache = encode(jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32), dtype)
        if dtype == "uint16":
            return cache, np.asarray(jax.lax.bitcast_convert_type(cache, jnp.bfloat16), np.float64)
        if dtype == "int8":
            return cache, np.asarray(cache.values, np.float64) * np.asarray(cache.scales, np.float64)[..., None]
        return cache, np.asarray(cache, np.float64)

    return draw


@pytest.fixture
def bury():
    """Makes what lies where `live` [C, S] is false in a cache nan, or the least that int8 has."""

    def run(cache, live):
        def one(array):  # [C, K, S, ...]
            dead = {"uint16": 0x7FC0, "int8": -128}.get(array.dtype.name, jnp.nan)
            return jnp.where(live[:, None, :, *[None] * (array.ndim - 3)], array, jnp.asarray(dead, array.dtype))

        return jax.tree.map(one, cache)

    return run


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def hopper_mode(monkeypatch, request):
    """How kernels for Hopper run: their `interpret`. Skips on another GPU."""
    if request.param == "gpu":
        try:
            hopper.check_device("a test")
        except NotImplementedError as error:
            pytest.skip(str(error))
        yield None
        return
    monkeypatch.setattr(hopper, "dot", _dot)
    try:
        params = plgpu.InterpretGPUParams
    except AttributeError:  # before jax 0.11
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as params
    yield params(detect_races=True)
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    assert not interpret_pallas_call.get_races().races_found


def _dot(a, b, *, transposed=False):
    """`hopper.dot`; the interpreter knows no product whose first factor is in registers."""
    return jnp.dot(a[...], b[...].T if transposed else b[...], preferred_element_type=jnp.float32)
