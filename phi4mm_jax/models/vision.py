"""The SigLIP NaViT tower with the dynamic-HD merge (phi4mm-reference, 4.3 and 4.4).

Every crop is encoded by itself, so crops of any pictures and rows share a batch. The merge only orders tokens; the
caller does that by index (processing/images.py `layout`), which leaves nothing ragged in here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from phi4mm_jax.config import ModelConfig, VisionConfig
from phi4mm_jax.models.layers import EncoderAttention, LayerNorm, Linear, Projector, in_float32, param


class MLP(nnx.Module):
    """Two layers with the tanh form of GELU."""

    def __init__(self, config: VisionConfig, dtype: Any):
        self.up = Linear(config.hidden_size, config.intermediate_size, dtype, ("mlp", None))
        self.down = Linear(config.intermediate_size, config.hidden_size, dtype, (None, "mlp"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., D] to the same."""
        return self.down(in_float32(partial(jax.nn.gelu, approximate=True), self.up(x)))


class EncoderLayer(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig, dtype: Any):
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.attention = EncoderAttention(config.hidden_size, config.num_heads, dtype)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.mlp = MLP(config, dtype)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x [C, P, D] to the same; mask [C, P]."""
        # The shipped flash attention never computes masked queries.
        x = x + self.attention(self.norm1(x), mask, mask_queries=True)
        return x + self.mlp(self.norm2(x))


class VisionModel(nnx.Module):
    """Crops in, decoder-width image tokens out."""

    def __init__(self, config: ModelConfig, dtype: Any):
        vision = config.vision
        self.config = vision
        self.patch_embedding = Linear(3 * vision.patch_size**2, vision.hidden_size, dtype)
        self.position_embedding = param((vision.patches_per_side**2, vision.hidden_size), dtype, (None, None))
        self.layers = nnx.List([EncoderLayer(vision, dtype) for _ in range(vision.num_used_layers)])
        self.row_separator = param((vision.hidden_size,), dtype, (None,))
        self.view_separator = param((vision.hidden_size,), dtype, (None,))
        self.projector = Projector(vision.hidden_size, config.text.hidden_size, dtype)

    def features(self, crops: jax.Array, mask: jax.Array, position_ids: jax.Array) -> jax.Array:
        """The tower's feature of every patch.

        Args:
          crops: [C, 3, S, S] pixels in about [-1, 1]; their dtype is the tower's activation dtype.
          mask: [C, P] bool, true for real patches, row-major.
          position_ids: [C, P] int32 rows of the position embedding.

        Returns:
          [C, P, vision width], the output of layer `num_used_layers` (no final norm).
        """
        x = self.patch_embedding(_patchify(crops, self.config.patch_size))
        x = x + self.position_embedding.get_value()[position_ids].astype(x.dtype)
        for layer in self.layers:
            # XLA would keep what every layer adds, in float32, and sum it up where x is read.
            x = jax.lax.optimization_barrier(layer(x, mask))
        return x

    def __call__(self, crops: jax.Array, mask: jax.Array, position_ids: jax.Array) -> jax.Array:
        """Projected tokens of every crop, then the two separators.

        Args: as `features`.

        Returns:
          [C * tokens_per_crop + 2, D]: crop by crop, row-major; the last two are the projected row separator
          (sub_GN) and view separator (glb_GN).
        """
        return self.project(self.features(crops, mask, position_ids))

    def project(self, x: jax.Array) -> jax.Array:
        """Pools features [C, P, vision width] and projects them: see `__call__`."""
        side = self.config.tokens_per_side
        x = x.reshape(-1, side, 2, side, 2, x.shape[-1])
        pooled = jnp.mean(x.astype(jnp.float32), axis=(2, 4)).astype(x.dtype).reshape(-1, x.shape[-1])
        separators = jnp.stack([self.row_separator.get_value(), self.view_separator.get_value()])
        return self.projector(jnp.concatenate([pooled, separators.astype(x.dtype)]))


def _patchify(crops: jax.Array, patch_size: int) -> jax.Array:
    """[C, 3, S, S] -> [C, P, 3 * patch * patch], patches row-major, values channel-major as the conv weight."""
    count, channels, side, _ = crops.shape
    grid = side // patch_size
    x = crops.reshape(count, channels, grid, patch_size, grid, patch_size)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(count, grid * grid, -1)
