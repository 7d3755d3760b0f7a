"""The attention operators against a slow one in float64, and that neither time nor memory follow the cache's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.encoder_attention import encoder_attention
from pallas_kernels.encoder_attention import reference as encoder_reference
from pallas_kernels.prefill_attention import prefill_attention

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "bits": 2e-2}


def draw(shape, dtype, seed):
    """Normal values in an operator's dtype, and what they stand for in float64."""
    values = np.random.default_rng(seed).normal(size=shape)
    array = jnp.asarray(values, "bfloat16" if dtype == "bits" else dtype)
    exact = np.asarray(array, np.float64)
    return (jax.lax.bitcast_convert_type(array, jnp.uint16) if dtype == "bits" else array), exact


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bits"])
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
def test_prefill(dtype, chunk, heads, kv_heads, cache, q_start, block_size):
    batch, width, scale = len(q_start), 16, 0.3
    q, exact_q = draw((batch, chunk, heads, width), "float32" if dtype == "bits" else dtype, 0)
    k, exact_k = draw((batch, kv_heads, cache, width), dtype, 1)
    v, exact_v = draw((batch, kv_heads, cache, width), dtype, 2)
    if dtype == "bits":
        exact_q = np.asarray(q.astype(jnp.bfloat16), np.float64)
    starts = jnp.array(q_start, jnp.int32)
    out = jax.jit(lambda *a: prefill_attention(*a, scale=scale, block_size=block_size))(q, k, v, starts)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    expected = cached_attention(exact_q, exact_k, exact_v, q_start, scale)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bits"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "cache", "lengths"),
    [(3, 1, 1, (1,)), (6, 2, 300, (1, 300, 257)), (2, 2, 600, (600, 256))],
)
def test_decode(dtype, heads, kv_heads, cache, lengths):
    batch, width, scale = len(lengths), 16, 0.3
    q, exact_q = draw((batch, heads, width), "float32" if dtype == "bits" else dtype, 0)
    k, exact_k = draw((batch, kv_heads, cache, width), dtype, 1)
    v, exact_v = draw((batch, kv_heads, cache, width), dtype, 2)
    if dtype == "bits":
        exact_q = np.asarray(q.astype(jnp.bfloat16), np.float64)
    out = jax.jit(lambda *a: decode_attention(*a, scale=scale))(q, k, v, jnp.array(lengths, jnp.int32))
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    expected = cached_attention(exact_q[:, None], exact_k, exact_v, [n - 1 for n in lengths], scale)[:, 0]
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=TOLERANCE[dtype], rtol=0)


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


def test_the_dead_part_of_the_cache_is_not_read():
    cache = np.ones((1, 2, 2048, 8), np.float32)
    cache[:, :, 1024:] = np.nan
    length, start = jnp.array([200], jnp.int32), jnp.array([180], jnp.int32)
    decode = jax.jit(lambda *a: decode_attention(*a, scale=1.0))(jnp.ones((1, 4, 8)), cache, cache, length)
    prefill = jax.jit(lambda *a: prefill_attention(*a, scale=1.0))(jnp.ones((1, 20, 4, 8)), cache, cache, start)
    np.testing.assert_allclose(decode, 1, rtol=1e-6)
    np.testing.assert_allclose(prefill, 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.uint16, jnp.float32])
def test_memory_does_not_follow_the_cache(dtype):
    def temporaries(cache):
        k = jax.ShapeDtypeStruct((2, 2, cache, 64), dtype)
        rows = jax.ShapeDtypeStruct((2,), jnp.int32)
        decode = jax.jit(lambda *a: decode_attention(*a, scale=1.0))
        prefill = jax.jit(lambda *a: prefill_attention(*a, scale=1.0, block_size=64))
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
