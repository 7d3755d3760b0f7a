"""Causal attention of a chunk of a prompt over the cache that already holds it."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.kv import KV
from pallas_kernels.partition import Layout, Names
from pallas_kernels.prefill_attention import cpu, reference, tpu

BACKENDS = {"cpu": cpu.prefill_attention, "tpu": tpu.prefill_attention, "xla": reference.prefill_attention}


def prefill_attention(
    q: jax.Array,
    k: KV,
    v: KV,
    q_start: jax.Array,
    slots: jax.Array | None = None,
    *,
    scale: float,
    block_size: int = 256,
    names: Names | None = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Attends T consecutive queries of each row to all keys up to their own.

    Query t of row b stands at position `q_start[b] + t` and sees keys 0 to that position; the chunk's own keys are
    in the cache. Query head n reads kv head `n // (N / K)`. The softmax is in float32; both products take the
    cache's type and accumulate in float32. No part of the cache after the last live key is read.

    Args:
      q: [B, T, N, H] queries, any float type.
      k: [C, K, S, H] cached keys, any float type, uint16 (the bits of bfloat16) or a `QuantizedKV`.
      v: [C, K, S, H] cached values, as `k`.
      q_start: [B] int32, keys before the chunk; `q_start + T <= S`.
      slots: [B] int32, the row of the cache that each row reads; None for row b itself, with C = B. The cache is read
        where it lies: a copy of a few rows of it is never made.
      scale: factor on the scores.
      block_size: queries, and keys, that XLA works on at once.
      names: of the cache's dimensions, by which a kernel finds its part on each of several devices (see `partition`).
      implementation: see `dispatch.run`.

    Returns:
      [B, T, N, H] of q's type.

    Raises:
      ValueError: the shapes do not fit.
    """
    b, _, n, h = q.shape
    rows_fit = k.shape[0] == b if slots is None else slots.shape == (b,)
    if k.shape != v.shape or not rows_fit or k.shape[3] != h or n % k.shape[1] or q_start.shape != (b,):
        raise ValueError(
            "prefill_attention: q [B, T, N, H], k and v [C, K, S, H] with K dividing N, q_start and slots [B] (C = B "
            f"without slots) expected, got {q.shape}, {k.shape}, {v.shape}, {q_start.shape}, "
            f"{None if slots is None else slots.shape}"
        )
    by_names = None if names is None else partial(_spread, names=names)
    operands = q, k, v, q_start, slots
    sizes = {"scale": scale, "block_size": block_size}
    return dispatch.run("prefill_attention", BACKENDS, implementation, *operands, spread=by_names, **sizes)


def _spread(
    layout: Layout, backend: Callable[..., jax.Array], q: jax.Array, k: KV, *others: KV, names: Names, **sizes: float
) -> jax.Array:
    """Each device attends with the kv heads that it holds.

    Raises:
      NotImplementedError: the rows of the cache are spread too, and any may be asked for.
    """
    rows, heads, *_ = layout.spec(k.shape, names)
    if layout.parts(rows) > 1:
        raise NotImplementedError(f"prefill_attention: rows of the cache over {layout.parts(rows)} devices")
    cache, queries, whole = PartitionSpec(None, heads), PartitionSpec(None, None, heads), PartitionSpec()
    attend = layout.call(partial(backend, **sizes), (queries, cache, cache, whole, whole), queries)
    return attend(q, k, *others)
