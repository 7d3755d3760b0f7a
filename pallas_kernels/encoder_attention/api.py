"""Bidirectional attention of an encoder."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.encoder_attention import reference

BACKENDS = {"xla": reference.encoder_attention}


def encoder_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    bias: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Attends every query to every key that is not masked.

    The softmax is in float32; both products take k's type and accumulate in float32.

    Args:
      q: [B, T, N, H] queries, any float type.
      k: [B, T, N, H] keys, any float type.
      v: [B, T, N, H] values, as `k`.
      scale: factor on the scores.
      bias: [N, T, T] float32 added to the scaled scores (head, query, key), or None.
      key_mask: [B, T] bool, true for the keys to attend to, or None: all. A row without any gives zeros.
      implementation: see `dispatch.run`.

    Returns:
      [B, T, N, H] of q's type.

    Raises:
      ValueError: the shapes do not fit.
    """
    b, t, n, _ = q.shape
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"encoder_attention: q, k and v of one shape [B, T, N, H] expected, got {q.shape}, {k.shape}, {v.shape}"
        )
    if bias is not None and bias.shape != (n, t, t):
        raise ValueError(f"encoder_attention: bias [N, T, T] = {(n, t, t)} expected, got {bias.shape}")
    if key_mask is not None and key_mask.shape != (b, t):
        raise ValueError(f"encoder_attention: key_mask [B, T] = {(b, t)} expected, got {key_mask.shape}")
    return dispatch.run(
        "encoder_attention", BACKENDS, implementation, q, k, v, scale=scale, bias=bias, key_mask=key_mask
    )
