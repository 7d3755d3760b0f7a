"""`encoder_attention` in XLA: as many rows and heads at once as have scores that fit the device."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import einsum

# Bytes of float32 scores that exist at once: a CPU wants one head in its caches. On an accelerator all heads of a
# SigLIP crop run together: a TPU then keeps the scores in its vector memory, and heads may lie on several devices.
_SCORE_BYTES = {"cpu": 4 << 20}
_DEFAULT_SCORE_BYTES = 64 << 20


def encoder_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, T, N, H]
    v: jax.Array,  # [B, T, N, H]
    *,
    scale: float,
    bias: jax.Array | None,  # [N, T, T]
    key_mask: jax.Array | None,  # [B, T]
) -> jax.Array:
    """See `api.encoder_attention`."""
    t, n = q.shape[1:3]
    budget = _SCORE_BYTES.get(jax.default_backend(), _DEFAULT_SCORE_BYTES)
    heads = max(1, budget // (4 * t * t))
    rows = max(1, heads // n)
    penalty = None if key_mask is None else jnp.where(key_mask, 0.0, -jnp.inf).astype(jnp.float32)

    def head(operands: tuple[jax.Array, ...], penalty: jax.Array | None) -> jax.Array:
        return _attend(*operands, penalty, scale).astype(q.dtype)

    def row(operands: tuple[jax.Array, ...]) -> jax.Array:
        queries, keys, values, penalty = operands  # [N, T, H], [T]
        return _map(lambda xs: head(xs, penalty), (queries, keys, values, bias), heads)

    queries, keys, values = (x.swapaxes(1, 2) for x in (q.astype(k.dtype), k, v))  # [B, N, T, H]
    return _map(row, (queries, keys, values, penalty), rows).swapaxes(1, 2)


def _attend(
    q: jax.Array,  # [T, H]
    k: jax.Array,  # [T, H]
    v: jax.Array,  # [T, H]
    bias: jax.Array | None,  # [T, T]
    penalty: jax.Array | None,  # [T]: -inf for a masked key, else 0
    scale: float,
) -> jax.Array:
    """One head of one row: [T, H] in float32."""
    scores = scale * einsum("th,sh->ts", q, k)
    if bias is not None:
        scores += bias
    if penalty is not None:
        scores += penalty[None, :]
    # A finite floor keeps a row without keys at exp(-inf) = 0.
    weights = jnp.exp(scores - jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min))
    total = weights.sum(axis=-1, keepdims=True)
    return einsum("ts,sh->th", weights.astype(v.dtype), v) / jnp.where(total == 0, 1, total)


def _map(function, operands: tuple[jax.Array | None, ...], at_once: int) -> jax.Array:
    """Maps over the leading axis, `at_once` elements together; without a loop if that is all of them."""
    if at_once >= operands[0].shape[0]:
        return jax.vmap(function)(operands)
    return lax.map(function, operands, batch_size=at_once if at_once > 1 else None)
