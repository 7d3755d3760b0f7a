"""How keys and values lie in a cache, and the products that attention takes with them.

A cache holds vectors of H numbers as floats, as the bits of bfloat16 (uint16), or as int8 with a scale for each vector.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKV:
    """Keys or values as int8 times a scale for each vector.

    The scales are float32 because they then lie better, not because they would need it: XLA:CPU rewrites all of a
    bfloat16 array for each update, and eight kv heads are the rows of one float32 tile of a TPU, of which bfloat16
    would leave half empty.
    """

    values: jax.Array
    """[B, K, S, H] int8."""
    scales: jax.Array
    """[B, K, S] float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, K, S, H]."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """int8."""
        return self.values.dtype


KV = jax.Array | QuantizedKV
"""Keys or values [B, K, S, H]: any float type, uint16 (the bits of bfloat16), or quantized."""


def encode(x: jax.Array, dtype: jax.typing.DTypeLike) -> KV:
    """Brings vectors x [B, K, S, H], any float type, into the form that a cache of `dtype` holds.

    With int8 the largest number of a vector becomes 127 or -127; a vector that is not finite reads as nan.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    if dtype != jnp.int8:
        return x.astype(dtype)
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / 127
    values = jnp.round(wide / jnp.where(scales == 0, 1, scales)[..., None])
    finite = jnp.isfinite(wide).all(axis=-1)  # the largest number may hide a nan: XLA:CPU reduces in more than one way
    return QuantizedKV(values.astype(jnp.int8), jnp.where(finite, scales, jnp.nan))


def product_dtype(kv: KV) -> jnp.dtype:
    """The type that both factors of a product with `kv` have; bfloat16 holds int8 without loss."""
    return jnp.dtype(jnp.bfloat16) if kv.dtype in (jnp.uint16, jnp.int8) else kv.dtype


def dot_keys(q: jax.Array, keys: KV) -> jax.Array:
    """Products of queries [B, K, R, H], of `product_dtype`, with keys [B, K, S, H]: float32 [B, K, R, S]."""
    products = einsum("bkrh,bksh->bkrs", q, _floats(keys))
    return products * keys.scales[:, :, None, :] if isinstance(keys, QuantizedKV) else products


def sum_values(weights: jax.Array, values: KV, live: jax.Array) -> jax.Array:
    """Sums of values [B, K, S, H] with float32 weights [B, K, R, S]: float32 [B, K, R, H].

    Where `live` [B, 1, S] is false the value does not count, even if it is not finite: a weight of 0 would not silence
    what an earlier user of the cache may have left there.
    """
    if isinstance(values, QuantizedKV):
        weights = weights * jnp.where(live, values.scales, 0)[:, :, None, :]
    else:
        values = jnp.where(live[..., None], values, jnp.zeros_like(values))
    return einsum("bkrs,bksh->bkrh", weights.astype(product_dtype(values)), _floats(values))


def _floats(kv: KV) -> jax.Array:
    """The numbers of `kv` in `product_dtype`, before scales."""
    if isinstance(kv, QuantizedKV):
        return kv.values.astype(product_dtype(kv))
    return lax.bitcast_convert_type(kv, jnp.bfloat16) if kv.dtype == jnp.uint16 else kv
