"""The attention operators against a slow one in float64, and that neither time nor memory follow the cache's size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.encoder_attention import encoder_attention
from pallas_kernels.encoder_attention import reference as encoder_reference
from pallas_kernels.kv import encode
from pallas_kernels.prefill_attention import prefill_attention, tpu

CACHES = ["float32", "bfloat16", "uint16", "int8"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "uint16": 2e-2, "int8": 2e-2}


def draw(shape, dtype, seed):
    """Normal values, and what they are in float64."""
    array = jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
    return array, np.asarray(array, np.float64)


def softmax_average(scores, values):
    """Scores [keys] with at least one finite, values [keys, H]."""
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def cached_attention(q, k, v, q_start, scale):
    """`prefill_attention`, one query at a time."""
    group = q.shape[2] // k.shape[1]
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = k[b, n // group, : q_start[b] + t + 1]
        out[b, t, n] = softmax_average(scale * keys @ q[b, t, n], v[b, n // group, : len(keys)])
    return out


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(
    ("chunk", "heads", "kv_heads", "cache", "q_start", "block_size"),
    [
        (1, 3, 1, 5, (0,), 4),
        (1, 2, 2, 9, (8, 0), 4),
        (16, 6, 2, 40, (0, 24, 3), 8),
        (21, 6, 2, 37, (0, 16), 8),
        (21, 2, 2, 37, (16, 5, 0), 256),
    ],
)
def test_prefill_xla(draw_cache, dtype, chunk, heads, kv_heads, cache, q_start, block_size):
    batch, width, scale = len(q_start), 16, 0.3
    # What reads a cache that holds no floats is rounded to bfloat16.
    q, exact_q = draw((batch, chunk, heads, width), "float32" if dtype == "float32" else "bfloat16", 0)
    k, exact_k = draw_cache((batch, kv_heads, cache, width), dtype, 1)
    v, exact_v = draw_cache((batch, kv_heads, cache, width), dtype, 2)
    starts = jnp.array(q_start, jnp.int32)
    attend = partial(prefill_attention, scale=scale, block_size=block_size, implementation="xla")
    out = jax.jit(attend)(q, k, v, starts)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    expected = cached_attention(exact_q, exact_k, exact_v, q_start, scale)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.fixture
def check(draw_cache, bury):
    """Compares a kernel with `cached_attention`; dead keys are nan."""

    def run(attend, dtype, chunk, heads, kv_heads, cache, starts, slots, width=128, q_dtype="bfloat16"):
        rows = len(starts) if slots is None else max(slots) + 1
        live = np.zeros((rows, cache), bool)
        for slot, start in zip(slots or range(rows), starts, strict=True):
            live[slot, : start + chunk] = True

        q, exact_q = draw((len(starts), chunk, heads, width), q_dtype, 0)
        (k, exact_k), (v, exact_v) = (draw_cache((rows, kv_heads, cache, width), dtype, seed) for seed in (1, 2))
        k, v = bury(k, live), bury(v, live)
        numbers = (None if n is None else jnp.array(n, jnp.int32) for n in (starts, slots))
        out = jax.jit(partial(attend, scale=0.1))(q, k, v, *numbers)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        rows = slice(None) if slots is None else np.array(slots)
        expected = cached_attention(exact_q, exact_k[rows], exact_v[rows], starts, 0.1)
        tolerance = 1e-5 if dtype == q_dtype == "float32" else 2e-2
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance, rtol=0)

    return run


@pytest.fixture
def check_tpu(check, monkeypatch):
    """The same for the TPU's kernel, in blocks of 32 queries and 64 keys."""
    monkeypatch.setattr(tpu, "_QUERIES", 32)
    monkeypatch.setattr(tpu, "_KEYS", 64)

    def run(*case, interpret=True):
        check(partial(tpu.prefill_attention, block_size=0, interpret=interpret), *case)

    return run


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(
    ("width", "chunk", "heads", "kv_heads", "cache", "starts", "slots"),
    [
        (128, 1, 3, 1, 1, (0,), None),
        (128, 70, 6, 2, 300, (0, 230, 33), (4, 0, 1)),  # 64 queries of three heads are a tile, 96 keys a block
        (32, 21, 6, 2, 37, (16, 5), (1, 1)),  # the cache is smaller than a block; two chunks of one row
        (8, 5, 4, 4, 101, (96, 90), None),  # vectors of AVX-512 do not divide the width
        (24, 40, 10, 2, 70, (30, 0), None),  # five heads for each kv head
        (80, 3, 8, 2, 200, (95, 94, 93, 0), None),  # an odd number of keys in the last block
    ],
)
def test_prefill_cpu(instruction_set, check, dtype, width, chunk, heads, kv_heads, cache, starts, slots):
    attend = partial(prefill_attention, implementation="cpu")
    check(attend, dtype, chunk, heads, kv_heads, cache, starts, slots, width, "float32")


def test_prefill_cpu_every_number_of_keys(kernels, check):
    attend = partial(prefill_attention, implementation="cpu")
    for start in range(0, 200, 7):
        check(attend, "uint16", 5, 3, 1, 205, (start,), None, 16)


def test_prefill_cpu_is_the_default(kernels):
    cache, rows = jnp.ones((1, 2, 8, 16)), jnp.zeros(1, jnp.int32)
    text = jax.jit(lambda *a: prefill_attention(*a, scale=1.0)).lower(jnp.ones((1, 3, 4, 16)), cache, cache, rows)
    assert "phi4mm_prefill_attention" in text.as_text()


@pytest.mark.parametrize("dtype", CACHES)
def test_prefill_cpu_nan_stays_in_its_row(instruction_set, dtype):
    """And its head; queries of the same tile may share it."""
    x = np.ones((3, 2, 130, 16), np.float32)
    x[1, 1, 7, 3] = np.nan
    cache, whole = encode(jnp.asarray(x), dtype), encode(jnp.ones_like(x), dtype)
    starts = jnp.full(3, 110, jnp.int32)
    expected = np.zeros((3, 20, 4), bool)
    expected[1, :, 2:] = True
    for k, v in ((cache, whole), (whole, cache)):
        out = prefill_attention(jnp.ones((3, 20, 4, 16)), k, v, starts, scale=1.0, implementation="cpu")
        np.testing.assert_array_equal(np.isnan(out).any(axis=-1), expected)


def test_prefill_cpu_scores_of_any_size(kernels):
    """The largest decides, in whichever block it lies."""
    k = np.zeros((1, 1, 1500, 8), np.float32)
    k[0, 0, :, 0] = np.linspace(-500, 500, 1500)
    v = np.broadcast_to(np.arange(1500, dtype=np.float32)[:, None], k.shape)
    for peak, q in ((1499, 400.0), (0, -400.0)):
        queries = jnp.zeros((1, 1, 1, 8), jnp.float32).at[..., 0].set(q)
        starts = jnp.array([1499])
        out = prefill_attention(queries, jnp.array(k), jnp.array(v), starts, scale=1.0, implementation="cpu")
        np.testing.assert_allclose(out, peak, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("chunk", "heads", "kv_heads", "cache", "starts", "slots"),
    [
        (1, 6, 2, 100, (70,), None),  # a block is not filled
        (32, 2, 2, 64, (0, 32), None),  # whole blocks
        (50, 6, 2, 200, (0, 150, 77), (4, 0, 1)),  # neither queries nor keys fill their last blocks
        (21, 3, 1, 37, (16, 5), (1, 1)),  # the cache is smaller than a block; two chunks of one row
    ],
)
def test_prefill_tpu(check_tpu, dtype, chunk, heads, kv_heads, cache, starts, slots):
    check_tpu(dtype, chunk, heads, kv_heads, cache, starts, slots)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_prefill_tpu_memory(check_tpu, dtype):
    """What is not written is nan, and copies are checked for races."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager", uninitialized_memory="nan")
    check_tpu(dtype, 40, 3, 1, 100, (30, 0), (1, 0), interpret=params)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("visible", [None, (13, 5, 0)])
def test_encoder(dtype, biased, visible):
    batch, length, heads, width, scale = 3, 13, 2, 8, 0.3
    (q, exact_q), (k, exact_k), (v, exact_v) = (draw((batch, length, heads, width), dtype, i) for i in range(3))
    bias = draw((heads, length, length), "float32", 3)[0] if biased else None
    key_mask = None if visible is None else np.arange(length) < np.array(visible)[:, None]
    out = jax.jit(lambda q, k, v: encoder_attention(q, k, v, scale=scale, bias=bias, key_mask=key_mask))(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    expected = np.zeros(q.shape)
    for b, t, n in np.ndindex(batch, length, heads):
        seen = np.ones(length, bool) if key_mask is None else key_mask[b]
        scores = scale * exact_k[b, :, n] @ exact_q[b, t, n] + (np.asarray(bias)[n, t] if biased else 0)
        expected[b, t, n] = softmax_average(scores[seen], exact_v[b, seen, n]) if seen.any() else 0
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=TOLERANCE[dtype], rtol=0)


def test_encoder_gives_the_same_in_pieces(monkeypatch):
    q, k, v = (draw((5, 16, 6, 8), "float32", i)[0] for i in range(3))
    bias, key_mask = draw((6, 16, 16), "float32", 3)[0], np.arange(16) < np.array([[16], [3], [9], [0], [1]])

    def attend():
        return jax.jit(lambda *a: encoder_attention(*a, scale=0.3, bias=bias, key_mask=key_mask))(q, k, v)

    whole = attend()
    for elements in (256, 4 * 256, 12 * 256):  # one head, some heads, some rows
        monkeypatch.setitem(encoder_reference._SCORE_BYTES, jax.default_backend(), 4 * elements)
        np.testing.assert_allclose(attend(), whole, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("dtype", CACHES)
def test_the_dead_part_of_the_cache_does_not_count(dtype, implementation):
    cache = np.full((1, 2, 2048, 8), 127, np.float32)  # of which int8 keeps every bit
    cache[:, :, 200:] = np.nan
    cache = encode(jnp.asarray(cache), dtype)
    length, start = jnp.array([200], jnp.int32), jnp.array([180], jnp.int32)
    decode = jax.jit(lambda *a: decode_attention(*a, scale=1.0, implementation=implementation))(
        jnp.ones((1, 4, 8)), cache, cache, length
    )
    prefill = jax.jit(lambda *a: prefill_attention(*a, scale=1.0, implementation=implementation))(
        jnp.ones((1, 20, 4, 8)), cache, cache, start
    )
    np.testing.assert_allclose(decode, 127, rtol=1e-6)
    np.testing.assert_allclose(prefill, 127, rtol=1e-6)


def test_quantized_vectors():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 64)).astype(np.float32) * 10.0 ** np.arange(-20, -10, 2)[:, None]
    x[1, 2, 3] = 0
    for dtype in ("float32", "bfloat16"):
        exact = jnp.asarray(x, dtype)
        found = encode(exact, jnp.int8)
        assert (found.shape, found.dtype, found.scales.shape) == (x.shape, jnp.int8, x.shape[:3])
        exact = np.asarray(exact, np.float64)
        peak = np.abs(exact).max(axis=-1)
        np.testing.assert_allclose(found.scales, peak / 127, rtol=1e-6)
        error = np.abs(np.asarray(found.values, np.float64) * np.asarray(found.scales, np.float64)[..., None] - exact)
        assert (error <= peak[..., None] / 127 * 0.5001).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden_by_rounding(bad):
    for length in (2, 130):  # XLA:CPU reduces few vectors and many in different ways
        x = np.ones((1, 2, length, 16), np.float32)
        x[0, 1, 1, 3] = bad
        scales = encode(jnp.asarray(x), jnp.int8).scales
        np.testing.assert_array_equal(np.argwhere(np.isnan(scales)), [[0, 1, 1]])


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8"])
def test_memory_does_not_follow_the_cache(dtype):
    def temporaries(cache):
        vectors = jax.ShapeDtypeStruct((2, 2, cache, 64), jnp.float32)
        k = jax.eval_shape(lambda x: encode(x, dtype), vectors)
        rows = jax.ShapeDtypeStruct((2,), jnp.int32)
        decode = jax.jit(lambda *a: decode_attention(*a, scale=1.0, implementation="xla"))
        prefill = jax.jit(lambda *a: prefill_attention(*a, scale=1.0, block_size=64, implementation="xla"))
        step = decode.lower(jax.ShapeDtypeStruct((2, 6, 64), jnp.float32), k, k, rows)
        chunk = prefill.lower(jax.ShapeDtypeStruct((2, 128, 6, 64), jnp.float32), k, k, rows)
        return [x.compile().memory_analysis().temp_size_in_bytes for x in (step, chunk)]

    assert temporaries(4096) == temporaries(16384)


def test_shapes_that_do_not_fit():
    q, k, rows = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 8, 4)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="prefill_attention: .* K dividing N"):
        prefill_attention(q, k, k, rows, scale=1.0)
    with pytest.raises(ValueError, match="decode_attention: .* K dividing N"):
        decode_attention(q[:, 0], k, k, rows, scale=1.0)
    with pytest.raises(ValueError, match="encoder_attention: q, k and v of one shape"):
        encoder_attention(q, k, k, scale=1.0)
    with pytest.raises(ValueError, match=r"bias \[N, T, T\] = \(3, 2, 2\) expected"):
        encoder_attention(q, q, q, scale=1.0, bias=jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"key_mask \[B, T\] = \(1, 2\) expected"):
        encoder_attention(q, q, q, scale=1.0, key_mask=jnp.ones((1, 3), bool))
