"""Mixture of LoRAs: one base product and, per row, at most one adapter (phi4mm-reference, 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.matmul import gated, gated_matmul
from phi4mm_jax.models.layers import param, product

ADAPTERS = ("vision", "speech")

RowAdapters = Mapping[str, jax.Array]
"""Adapter name -> [B] bool: the rows that use it. Adapters that no row uses are left out, so the keys are the
static LoRA mode of a compiled step (none, vision, speech, both) and an absent adapter's weights are never read."""


class LoraLinear(nnx.Module):
    """y = x W^T + (x A^T) B^T of the row's own adapter; no bias. B holds the factor alpha / r (folded at load)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Mapping[str, int],
        dtype: Any,
        axes: tuple[str | None, str | None],
    ):
        out_axis, in_axis = axes
        self.weight = param((out_features, in_features), dtype, axes)
        for name in ADAPTERS:
            setattr(self, f"{name}_a", param((ranks[name], in_features), dtype, (None, in_axis)))
            setattr(self, f"{name}_b", param((out_features, ranks[name]), dtype, (out_axis, None)))

    def __call__(self, x: jax.Array, adapters: RowAdapters) -> jax.Array:
        """Maps x [B, T, in] to [B, T, out]."""
        y = product(x, self.weight)
        for name, rows in adapters.items():
            low = product(x, getattr(self, f"{name}_a"))  # [B, T, R]
            low = jnp.where(rows[:, None, None], low, jnp.zeros_like(low))
            y = y + product(low, getattr(self, f"{name}_b"))
        return y

    def gated(self, x: jax.Array, adapters: RowAdapters, groups: int) -> jax.Array:
        """Maps x [B, T, in] to [B, T, out / 2], gated (see `pallas_kernels.matmul.gated`) by groups of outputs."""
        if adapters:
            return gated(self(x, adapters), groups)
        return gated_matmul(x, self.weight.get_value(), groups=groups, names=self.weight.get_metadata()["axes"])
