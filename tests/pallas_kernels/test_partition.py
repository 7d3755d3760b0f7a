"""Kernels over several devices, interpreted: what they give on one, with every operand where it lies."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from pallas_kernels import dispatch, partition
from pallas_kernels.decode_attention import api as decode_api
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.matmul import api as matmul_api
from pallas_kernels.matmul import gated, gated_matmul, matmul
from pallas_kernels.prefill_attention import api as prefill_api
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantized import Format, quantize

MESHES = [(1, 8), (2, 2), (4, 1)]
RULES = {"batch": "data", "heads": "model", "kv_heads": "model"}
COMMUNICATION = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Without `interpret`, which no caller passes on."""
    for api in (decode_api, matmul_api, prefill_api):
        monkeypatch.setitem(api.BACKENDS, "tpu", partial(api.BACKENDS["tpu"], interpret=True))


@pytest.fixture
def spread():
    """`spread(mesh shape, function, (array, names)...)` runs it over those devices; it also says what they exchange."""

    def run(shape, function, *operands):
        if jax.device_count() < np.prod(shape):
            pytest.skip(f"needs {np.prod(shape)} devices")
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        layout = partition.Layout(mesh, RULES)

        def place(array, names):
            spec = layout.spec(array.shape, names[: array.ndim])
            return jax.device_put(array, NamedSharding(mesh, spec))

        placed = [jax.tree.map(partial(place, names=names), array) for array, names in operands]

        def traced(*args):
            with partition.over(mesh, RULES):
                return function(*args)

        program = jax.jit(traced)
        text = program.lower(*placed).compile().as_text()
        return program(*placed), {name for name in COMMUNICATION if f" {name}(" in text}

    return run


def draw(shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("form", [Format(4, 64), Format(8, 32, "int8")], ids=str)
@pytest.mark.parametrize("names", [("heads", None), (None, "heads")], ids=["outputs", "inputs"])
def test_matmul(spread, mesh, form, names):
    x, w = draw((4, 1, 1024)), quantize(draw((256, 1024)), form)
    tpu = partial(matmul, names=names, implementation="tpu", out_dtype=jnp.float32)
    y, exchanged = spread(mesh, tpu, (x, ("batch", None, names[1])), (w, names))
    assert exchanged == ({"all-reduce"} if names[1] and mesh[1] > 1 else set())
    np.testing.assert_allclose(y, tpu(x, w), atol=2e-4, rtol=0)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decode_attention(spread, draw_cache, mesh, dtype):
    q, lengths = draw((4, 24, 128)), jnp.array([1, 700, 512, 513], jnp.int32)
    k, v = (draw_cache((4, 8, 700, 128), dtype, seed)[0] for seed in (1, 2))
    names = ("batch", "kv_heads", None, None)
    tpu = partial(decode_attention, scale=0.1, names=names, implementation="tpu")
    out, exchanged = spread(mesh, tpu, (q, names[:3]), (k, names), (v, names), (lengths, names[:1]))
    assert not exchanged
    np.testing.assert_array_equal(out, tpu(q, k, v, lengths))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_prefill_attention(spread, draw_cache, dtype):
    q, starts, slots = draw((2, 40, 24, 128)), jnp.array([100, 3], jnp.int32), jnp.array([2, 0], jnp.int32)
    k, v = (draw_cache((4, 8, 140, 128), dtype, seed)[0] for seed in (1, 2))
    names = ("batch", "kv_heads", None, None)
    tpu = partial(prefill_attention, scale=0.1, names=names, implementation="tpu")
    operands = (q, (None, None, "heads", None)), (k, names), (v, names), (starts, (None,)), (slots, (None,))
    out, exchanged = spread((1, 8), tpu, *operands)
    assert not exchanged
    np.testing.assert_array_equal(out, tpu(q, k, v, starts, slots))
    with pytest.raises(NotImplementedError, match="rows of the cache over 2 devices"):
        spread((2, 2), tpu, *operands)


def test_groups_of_columns_are_not_cut(spread):
    """Three groups over two devices; the same weight over one, and what XLA makes of it, are well."""
    x, w = draw((2, 768)), quantize(draw((8, 768)), Format(4, 256))
    operands = (x, ("batch", "heads")), (w, (None, None))
    tpu = partial(matmul, names=(None, "heads"), implementation="tpu")
    with pytest.raises(NotImplementedError, match="3 groups of columns over 2 devices"):
        spread((1, 2), tpu, *operands)
    y, _ = spread((1, 2), partial(tpu, implementation=("tpu", "xla")), *operands)
    np.testing.assert_allclose(y.astype(jnp.float32), tpu(x, w).astype(jnp.float32), atol=0.3)


def test_without_names_xla_serves_several_devices(spread):
    x, w = draw((4, 512)), quantize(draw((8, 512)), Format(4, 64))
    with pytest.raises(NotImplementedError, match="matmul: over several devices 'tpu' must know how the operands lie"):
        spread((1, 2), partial(matmul, implementation="tpu"), (x, (None, None)), (w, ("heads", None)))
    with dispatch.prefer("tpu"):
        y, _ = spread((1, 2), matmul, (x, (None, None)), (w, ("heads", None)))
    assert y.shape == (4, 8)


def test_what_is_gated_over_several_devices(spread):
    x, w, names = draw((26, 512)), quantize(draw((64, 512)), Format(4, 64)), ("heads", None)
    together = partial(gated_matmul, groups=4, names=names, out_dtype=jnp.float32)
    operands = (x, (None, None)), (w, names)
    with pytest.raises(NotImplementedError, match="gated_matmul: over several devices 'cpu' must know"):
        spread((1, 2), partial(together, implementation="cpu"), *operands)
    with dispatch.prefer("tpu"):
        y, _ = spread((1, 2), together, *operands)
    apart = gated(matmul(x, w, out_dtype=jnp.float32, implementation="tpu"), 4)
    np.testing.assert_allclose(y, apart, rtol=1e-5, atol=1e-3)


def test_one_device_is_no_different_from_none():
    with partition.over(jax.make_mesh((1, 1), ("data", "model")), RULES):
        assert partition.current() is None
