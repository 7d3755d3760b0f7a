"""The decoder: Phi-4-mini with grouped-query attention, partial longrope and LoRA (phi4mm-reference, 2 and 3).

Axes: B rows, T new tokens, D model width, F MLP width, N query heads, K kv heads, H head width, V vocabulary.
Fused projections are stored as K groups of rows (weights/mapping.py), so that a tensor-parallel cut between groups
gives each device whole heads and matching gate and up columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.quantized import take
from phi4mm_jax.config import ModelConfig
from phi4mm_jax.models.layers import RMSNorm, merge_heads, param, product
from phi4mm_jax.models.lora import LoraLinear, RowAdapters
from phi4mm_jax.models.rope import rotary_table, rotate

LayerCache = TypeVar("LayerCache")


class Attend(Protocol[LayerCache]):
    """Attention over one layer's cache, given by the caller: stores the new keys and values, then attends."""

    def __call__(
        self,
        q: jax.Array,  # [B, T, N, H]
        k: jax.Array,  # [B, T, K, H]
        v: jax.Array,  # [B, T, K, H]
        cache: LayerCache,
    ) -> tuple[jax.Array, LayerCache]:
        """Returns the attention output [B, T, N, H] and the updated cache."""
        ...


class Embedding(nnx.Module):
    """The token embedding, which is also the output head."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: Any):
        self.weight = param((vocab_size, hidden_size), dtype, ("vocab", None))

    def encode(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """Looks up tokens [...] int32 -> [..., D]."""
        return take(self.weight.get_value(), tokens, dtype)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """Logits of hidden [..., D]: float32 [..., V]."""
        return product(hidden, self.weight, jnp.float32)


class Attention(nnx.Module):
    """Causal grouped-query attention with a rotary embedding."""

    def __init__(self, config: ModelConfig, ranks: dict[str, int], dtype: Any):
        text = config.text
        self.num_kv_heads, self.head_dim = text.num_kv_heads, text.head_dim
        width = text.num_heads * text.head_dim
        fused = width + 2 * text.num_kv_heads * text.head_dim
        self.qkv = LoraLinear(text.hidden_size, fused, ranks, dtype, ("heads", None))
        self.out = LoraLinear(width, text.hidden_size, ranks, dtype, (None, "heads"))

    def __call__(
        self,
        x: jax.Array,  # [B, T, D]
        rope: tuple[jax.Array, jax.Array],
        adapters: RowAdapters,
        attend: Attend[LayerCache],
        cache: LayerCache,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Returns the output [B, T, D] and the layer's updated cache.

        Args:
          x: the input.
          rope: of `rotary_table`.
          adapters: rows by adapter.
          attend: attention over the cache.
          cache: this layer's.
          wanted: [B] int32, of each row the one token whose output is returned, [B, 1, D]; all if None.
        """
        batch, length, _ = x.shape
        groups = self.qkv(x, adapters).reshape(batch, length, self.num_kv_heads, -1, self.head_dim)
        q = groups[..., :-2, :].reshape(batch, length, -1, self.head_dim)
        k, v = groups[..., -2, :], groups[..., -1, :]
        out, cache = attend(rotate(q, rope), rotate(k, rope), v, cache)
        return self.out(_at(wanted, merge_heads(out)), adapters), cache


class GatedMLP(nnx.Module):
    """down(up * silu(gate))."""

    def __init__(self, config: ModelConfig, ranks: dict[str, int], dtype: Any):
        text = config.text
        self.num_groups = text.num_kv_heads
        self.gate_up = LoraLinear(text.hidden_size, 2 * text.intermediate_size, ranks, dtype, ("mlp", None))
        self.down = LoraLinear(text.intermediate_size, text.hidden_size, ranks, dtype, (None, "mlp"))

    def __call__(self, x: jax.Array, adapters: RowAdapters) -> jax.Array:
        """Maps x [B, T, D] to the same."""
        return self.down(self.gate_up.gated(x, adapters, self.num_groups), adapters)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: ModelConfig, ranks: dict[str, int], dtype: Any):
        text = config.text
        self.input_norm = RMSNorm(text.hidden_size, text.rms_norm_eps, dtype)
        self.attention = Attention(config, ranks, dtype)
        self.post_attention_norm = RMSNorm(text.hidden_size, text.rms_norm_eps, dtype)
        self.mlp = GatedMLP(config, ranks, dtype)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        adapters: RowAdapters,
        attend: Attend[LayerCache],
        cache: LayerCache,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """As `Attention`, residuals included."""
        out, cache = self.attention(self.input_norm(x), rope, adapters, attend, cache, wanted)
        x = _at(wanted, x) + out
        return x + self.mlp(self.post_attention_norm(x), adapters), cache


class TextModel(nnx.Module):
    """The decoder stack between the embedding and the head."""

    def __init__(self, config: ModelConfig, dtype: Any):
        text = config.text
        ranks = {"vision": config.vision_lora.rank, "speech": config.speech_lora.rank}
        self.config = text
        self.embed = Embedding(text.vocab_size, text.hidden_size, dtype)
        self.layers = nnx.List([DecoderLayer(config, ranks, dtype) for _ in range(text.num_layers)])
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, dtype)

    def __call__(
        self,
        x: jax.Array,  # [B, T, D] embedded tokens and media
        positions: jax.Array,  # [B, T] int32
        use_long: jax.Array,  # [B] bool: the row's rope regime
        adapters: RowAdapters,
        attend: Attend[LayerCache],
        caches: Sequence[LayerCache],
        wanted: jax.Array | None = None,  # [B] int32: the one token of each row that is returned; all if None
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Runs all layers; returns the normed hidden states [B, T or 1, D] and each layer's updated cache."""
        rope = rotary_table(self.config, positions, use_long, x.dtype)
        updated = []
        for layer, cache in zip(self.layers, caches, strict=True):
            last = len(updated) == len(self.layers) - 1  # of which other tokens need no more than keys and values
            x, cache = layer(x, rope, adapters, attend, cache, wanted if last else None)
            updated.append(cache)
        return self.norm(x), updated


def _at(index: jax.Array | None, x: jax.Array) -> jax.Array:
    """Of x [B, T, D] the tokens at index [B], as [B, 1, D]; all without one."""
    return x if index is None else jnp.take_along_axis(x, index[:, None, None], axis=1)
