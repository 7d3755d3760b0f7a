"""The product that attention uses."""

import jax
import jax.numpy as jnp
from jax import lax


def einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum accumulated in float32, whose float32 operands are not rounded on any platform."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
