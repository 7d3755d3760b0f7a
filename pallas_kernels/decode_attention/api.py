"""Attention of one new token of each row over the cache."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.decode_attention import cpu, gpu, reference, tpu
from pallas_kernels.kv import KV
from pallas_kernels.partition import Layout, Names

BACKENDS = {
    "cpu": cpu.decode_attention,
    "gpu": gpu.decode_attention,
    "tpu": tpu.decode_attention,
    "xla": reference.decode_attention,
}


def decode_attention(
    q: jax.Array,
    k: KV,
    v: KV,
    lengths: jax.Array,
    *,
    scale: float,
    names: Names | None = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Attends one query of each row to the first `lengths[b]` keys of its cache.

    Query head n reads kv head `n // (N / K)`. The softmax is in float32; both products take the cache's type (see
    `kv.product_dtype`) and accumulate in float32.

    Args:
      q: [B, N, H] queries, any float type.
      k: [B, K, S, H] cached keys, any float type, uint16 (the bits of bfloat16) or a `QuantizedKV`.
      v: [B, K, S, H] cached values, as `k`.
      lengths: [B] int32, valid keys, the query's own among them; 1 to S.
      scale: factor on the scores.
      names: of the cache's dimensions, by which a kernel finds its part on each of several devices (see `partition`).
      implementation: see `dispatch.run`.

    Returns:
      [B, N, H] of q's type.

    Raises:
      ValueError: the shapes do not fit.
    """
    b, n, h = q.shape
    if k.shape != v.shape or k.shape[0] != b or k.shape[3] != h or n % k.shape[1] or lengths.shape != (b,):
        raise ValueError(
            "decode_attention: q [B, N, H], k and v [B, K, S, H] with K dividing N, lengths [B] expected, "
            f"got {q.shape}, {k.shape}, {v.shape}, {lengths.shape}"
        )
    by_names = None if names is None else partial(_spread, names=names)
    return dispatch.run("decode_attention", BACKENDS, implementation, q, k, v, lengths, spread=by_names, scale=scale)


def _spread(
    layout: Layout,
    backend: Callable[..., jax.Array],
    q: jax.Array,
    k: KV,
    v: KV,
    lengths: jax.Array,
    *,
    scale: float,
    names: Names,
) -> jax.Array:
    """Each device attends with the rows and kv heads that it holds."""
    rows, heads, *_ = layout.spec(k.shape, names)
    cut = PartitionSpec(rows, heads)  # kv heads, or the query heads that read them
    attend = layout.call(partial(backend, scale=scale), (cut, cut, cut, PartitionSpec(rows)), cut)
    return attend(q, k, v, lengths)
