"""`decode_attention`: every backend against a slow one in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import dispatch, flash, hopper
from pallas_kernels.decode_attention import decode_attention, gpu, tpu
from pallas_kernels.kv import encode

CACHES = ["float32", "bfloat16", "uint16", "int8"]
SCALE = 0.3
XLA, CPU = (partial(decode_attention, implementation=name) for name in ("xla", "cpu"))


def dense(q, k, v, lengths):
    """Scores, softmax, average; of the live keys alone."""
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for b, n in np.ndindex(q.shape[:2]):
        keys, values = (x[b, n // group, : lengths[b]] for x in (k, v))
        scores = SCALE * keys @ q[b, n]
        weights = np.exp(scores - scores.max())
        out[b, n] = weights @ values / weights.sum()
    return out


@pytest.fixture
def check(draw_cache, bury):
    """Compares a backend with `dense`; whatever lies behind the live keys is nan."""

    def run(attend, dtype, heads, kv_heads, width, cache, lengths, tolerance, q_dtype="float32"):
        batch = len(lengths)
        q = jnp.asarray(np.random.default_rng(0).normal(size=(batch, heads, width)), q_dtype)
        live = np.arange(cache) < np.array(lengths)[:, None]

        (k, exact_k), (v, exact_v) = (draw_cache((batch, kv_heads, cache, width), dtype, seed) for seed in (1, 2))
        k, v = bury(k, live), bury(v, live)
        out = jax.jit(partial(attend, scale=SCALE))(q, k, v, jnp.array(lengths, jnp.int32))
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        expected = dense(np.asarray(q, np.float64), exact_k, exact_v, lengths)
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance, rtol=0)

    return run


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "cache", "lengths"),
    [(3, 1, 1, (1,)), (6, 2, 300, (1, 300, 257)), (2, 2, 600, (600, 256))],
)
def test_xla(check, dtype, heads, kv_heads, cache, lengths):
    exact = dtype == "float32"
    q_dtype = "float32" if exact else "bfloat16"  # what reads a cache that holds no floats is rounded to it
    check(XLA, dtype, heads, kv_heads, 16, cache, lengths, 1e-5 if exact else 2e-2, q_dtype)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "cache", "lengths"),
    [
        (3, 1, 128, 1, (1,)),
        (24, 8, 128, 1100, (1100, 1, 512)),
        (6, 2, 32, 1030, (2, 3, 5, 511, 513, 1024, 1025)),
        (4, 4, 8, 40, (17, 40)),  # vectors of AVX-512 do not divide the width
        (10, 2, 24, 70, (70, 16, 15)),  # five heads for each kv head
        (4, 2, 80, 33, (33, 31)),
        (8, 2, 64, 33, (1, 33)),
    ],
)
def test_cpu(instruction_set, check, dtype, heads, kv_heads, width, cache, lengths):
    check(CPU, dtype, heads, kv_heads, width, cache, lengths, 1e-5)


def test_cpu_every_length(kernels, check):
    for length in range(1, 40):
        check(CPU, "bfloat16", 3, 1, 16, 48, (length, 48), 1e-5)


def test_cpu_scores_of_any_size(kernels):
    """The largest decides, in its own block and among the blocks."""
    k = np.zeros((1, 1, 1500, 8), np.float32)
    k[0, 0, :, 0] = np.linspace(-500, 500, 1500)
    v = np.broadcast_to(np.arange(1500, dtype=np.float32)[:, None], k.shape)
    for peak, q in ((1499, 400.0), (0, -400.0)):
        queries = jnp.zeros((1, 1, 8), jnp.float32).at[0, 0, 0].set(q)
        out = decode_attention(queries, jnp.array(k), jnp.array(v), jnp.array([1500]), scale=1.0, implementation="cpu")
        np.testing.assert_allclose(out, peak, atol=1e-5)


@pytest.mark.parametrize("dtype", CACHES)
def test_cpu_nan_stays_in_its_row(instruction_set, dtype):
    x = np.ones((3, 2, 20, 16), np.float32)
    x[1, 1, 7, 3] = np.nan
    cache, whole = encode(jnp.asarray(x), dtype), encode(jnp.ones_like(x), dtype)
    lengths = jnp.full(3, 20, jnp.int32)
    expected = np.zeros((3, 4), bool)
    expected[1, 2:] = True
    for k, v in ((cache, whole), (whole, cache)):
        out = decode_attention(jnp.ones((3, 4, 16)), k, v, lengths, scale=1.0, implementation="cpu")
        np.testing.assert_array_equal(np.isnan(out).any(axis=-1), expected)


def test_cpu_is_the_default(kernels):
    cache = jnp.ones((1, 2, 8, 16))
    text = jax.jit(lambda *a: decode_attention(*a, scale=1.0)).lower(cache[:, :, 0], cache, cache, jnp.ones(1, int))
    assert "phi4mm_decode_attention" in text.as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "cache", "lengths"),
    [
        (6, 2, 1300, (1, 1024, 513, 1300, 512)),  # the last block has 276 keys
        (3, 3, 100, (37,)),  # a block is the whole cache; an odd number of kv heads
        (24, 8, 1024, (700, 3)),
    ],
)
def test_tpu(check, dtype, heads, kv_heads, cache, lengths):
    attend = partial(tpu.decode_attention, interpret=True)
    check(attend, dtype, heads, kv_heads, 128, cache, lengths, 2e-2, "bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_tpu_memory(check, dtype):
    """What is not written is nan, and what is copied arrives when it is waited for."""
    attend = partial(tpu.decode_attention, interpret=pltpu.InterpretParams())
    check(attend, dtype, 6, 2, 128, 600, (513, 2, 600), 2e-2, "bfloat16")


def test_tpu_takes_a_step_for_each_live_block():
    lengths = jnp.array([513, 1, 512, 1300], jnp.int32)
    rows, blocks, steps = flash.live_blocks(lengths, block=512, most=3)
    assert rows.shape == blocks.shape == (12,)
    live = list(zip(rows.tolist(), blocks.tolist(), strict=True))[: int(steps)]
    assert live == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (3, 1), (3, 2)]


def test_what_the_tpu_does_not_do():
    def attend(k, v):
        q = jnp.ones((1, 2, k.shape[3]), jnp.bfloat16)
        return decode_attention(q, k, v, jnp.ones(1, int), scale=1.0, implementation="tpu")

    cache = jnp.ones((1, 2, 8, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="bfloat16 or int8, not float32 and float32"):
        attend(cache.astype(jnp.float32), cache.astype(jnp.float32))
    with pytest.raises(NotImplementedError, match="not bfloat16 and int8"):
        attend(cache, encode(cache, jnp.int8))
    with pytest.raises(NotImplementedError, match="a multiple of 128, not 64"):
        attend(cache[..., :64], cache[..., :64])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "cache", "lengths"),
    [
        (6, 2, 200, (1, 129, 200)),  # the last block moves back; a row has fewer blocks than there are parts
        (9, 1, 64, (64,)),
    ],
)
def test_gpu(check, hopper_mode, dtype, heads, kv_heads, cache, lengths):
    attend = partial(gpu.decode_attention, interpret=hopper_mode)
    check(attend, dtype, heads, kv_heads, 128, cache, lengths, 2e-2, "bfloat16")


def test_gpu_takes_several_blocks_in_turn(check, hopper_mode, monkeypatch):
    monkeypatch.setattr(hopper, "BLOCKS", 2)  # two parts, of up to three blocks
    gpu._call.cache_clear()
    attend = partial(gpu.decode_attention, interpret=hopper_mode)
    check(attend, "bfloat16", 3, 1, 128, 340, (340,), 2e-2, "bfloat16")
    gpu._call.cache_clear()


def test_gpu_proves_itself_before_it_is_used(hopper_mode):
    gpu._call.cache_clear()
    gpu.is_right.cache_clear()
    assert jax.jit(lambda: jnp.full(1, gpu.is_right(hopper_mode)))()
    gpu.is_right.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_gpu_full_size(check, dtype):
    try:
        hopper.check_device("a test")
    except NotImplementedError as error:
        pytest.skip(str(error))
    attend = partial(decode_attention, implementation="gpu")
    check(attend, dtype, 24, 8, 128, 4096, (4096, 1, 2049, 64, 65, 1000, 3000, 4095), 2e-2, "bfloat16")


def test_what_the_gpu_does_not_do(monkeypatch):
    cpu = jax.devices("cpu")
    monkeypatch.setattr(jax, "devices", lambda: cpu)

    def attend(k, v, heads=2):
        q = jnp.ones((1, heads, k.shape[3]), jnp.bfloat16)
        return decode_attention(q, k, v, jnp.ones(1, int), scale=1.0, implementation="gpu")

    cache = jnp.ones((1, 2, 64, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="bfloat16 or int8, not float32 and float32"):
        attend(cache.astype(jnp.float32), cache.astype(jnp.float32))
    with pytest.raises(NotImplementedError, match="not 64 and 1"):
        attend(cache[..., :64], cache[..., :64])
    with pytest.raises(NotImplementedError, match="not 128 and 65"):
        attend(cache, cache, 130)
    with pytest.raises(NotImplementedError, match="64 or more keys, in fours, not 60"):
        attend(cache[:, :, :60], cache[:, :, :60])
    with pytest.raises(NotImplementedError, match="Hopper"):
        attend(cache, cache)


def test_a_sharded_cache_is_not_gathered_where_xla_is_preferred():
    def traced(*operands):
        with dispatch.prefer("xla"):
            return decode_attention(*operands, scale=1.0)

    mesh = Mesh(jax.devices()[:1] if jax.device_count() < 2 else jax.devices()[:2], "model")
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    cache = jax.ShapeDtypeStruct((1, 2, 4096, 64), jnp.float32, sharding=sharding)
    q = jax.ShapeDtypeStruct((1, 6, 64), jnp.float32, sharding=sharding)
    compiled = jax.jit(traced).lower(q, cache, cache, jax.ShapeDtypeStruct((1,), jnp.int32)).compile()
    assert "phi4mm_decode_attention" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 64 * 4


def test_what_the_cpu_does_not_do(kernels, monkeypatch):
    def attend(k, v, implementation="cpu"):
        return decode_attention(
            jnp.ones((1, 2, k.shape[3])), k, v, jnp.ones(1, int), scale=1.0, implementation=implementation
        )

    cache = jnp.ones((1, 2, 8, 16))
    with pytest.raises(NotImplementedError, match="not float16 and float16"):
        attend(cache.astype(jnp.float16), cache.astype(jnp.float16))
    with pytest.raises(NotImplementedError, match="not float32 and bfloat16"):
        attend(cache, cache.astype(jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="a multiple of 8, not a cache"):
        attend(cache[..., :12], cache[..., :12])
    monkeypatch.setenv("PHI4MM_NATIVE", "0")
    with pytest.raises(NotImplementedError, match="no compiled kernels"):
        attend(cache, cache)
    np.testing.assert_allclose(attend(cache, cache, None), 1)
