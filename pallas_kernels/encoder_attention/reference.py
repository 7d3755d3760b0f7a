"""`encoder_attention` in XLA."""

import jax
import jax.numpy as jnp
from jax import lax


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
    dtype = k.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT

    def dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)

    def one(row: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        queries, keys, values, mask = row
        scores = scale * dot("tnh,snh->nts", queries.astype(dtype), keys)
        if bias is not None:
            scores += bias
        if mask is not None:
            scores = jnp.where(mask[None, None, :], scores, -jnp.inf)
        # A finite floor keeps a row without keys at exp(-inf) = 0 instead of NaN.
        largest = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1).T[..., None]  # [T, N, 1]
        out = dot("nts,snh->tnh", weights.astype(dtype), values)
        return (out / jnp.where(total == 0, 1, total)).astype(q.dtype)

    return lax.map(one, (q, k, v, key_mask))
