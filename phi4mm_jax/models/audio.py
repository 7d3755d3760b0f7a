"""The speech encoder: NeMo subsampling and a conformer in windows of 40 s (phi4mm-reference, 5.2 and 5.3).

Windows do not see each other, so every window is encoded by itself and windows of any clips and rows share a padded
batch. A clip's windows come with the few frames before them that the subsampling needs; each window's own length
decides what is zero and which keys are seen, so its result depends neither on the padding nor on its neighbours.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phi4mm_jax.config import AudioConfig, ModelConfig
from phi4mm_jax.models.layers import (
    EncoderAttention,
    LayerNorm,
    Linear,
    Projector,
    in_float32,
    over_rows,
    param,
    value,
)

LEAD = 8
"""Frames before a window that its first sub-frame depends on (seven), rounded up to a whole sub-frame."""


class StridedConv(nnx.Module):
    """3x3 convolution with stride 2 and zero padding 1, one filter per output channel.

    Written as nine shifted multiply-adds: XLA:CPU runs grouped convolutions several times slower.
    """

    def __init__(self, channels: int, dtype: Any):
        self.weight = param((channels, 3, 3), dtype, (None, None, None))
        self.bias = param((channels,), dtype, (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [T, F, C or 1] to [ceil(T/2), ceil(F/2), C]."""
        weight, bias = (w.get_value().astype(jnp.float32) for w in (self.weight, self.bias))
        out_length, out_width = -(-x.shape[0] // 2), -(-x.shape[1] // 2)
        # One frame more than the convolution needs where a length is even, so that every tap slices alike.
        x = jnp.pad(x, ((1, 2), (1, 2), (0, 0)))
        y = over_rows(bias, x)
        for row in range(3):
            for column in range(3):
                taps = x[row : row + 2 * out_length : 2, column : column + 2 * out_width : 2]
                y = y + taps.astype(jnp.float32) * over_rows(weight[:, row, column], x)
        return y.astype(x.dtype)


class Subsampling(nnx.Module):
    """NeMo's depthwise-striding front end: eight frames to one sub-frame."""

    def __init__(self, config: AudioConfig, dtype: Any):
        channels = config.conv_channels
        self.conv = StridedConv(channels, dtype)
        self.depthwise1, self.depthwise2 = StridedConv(channels, dtype), StridedConv(channels, dtype)
        self.pointwise1, self.pointwise2 = (Linear(channels, channels, dtype) for _ in range(2))
        width = -(-config.input_size // config.time_reduction)
        self.out = Linear(channels * width, config.hidden_size, dtype)

    def __call__(self, x: jax.Array, continues: jax.Array, frames: jax.Array) -> jax.Array:
        """Maps windows [W, LEAD + T, mel] to [W, T/8, D]; sub-frames beyond a window's end are zero.

        One after the other: at half its frames a window of 40 s takes 160 MB in bfloat16.
        """
        return jax.lax.map(lambda window: self._window(*window), (x, continues, frames))

    def _window(self, x: jax.Array, continues: jax.Array, frames: jax.Array) -> jax.Array:
        """Maps a window [LEAD + T, mel] to [T/8, D].

        Zeroing what lies outside of the clip after each stage makes the ends of a clip inside a longer array equal to
        the ends of an array, where the convolution itself pads with zeros.
        """

        def inside(x: jax.Array, stride: int) -> jax.Array:
            first = jnp.where(continues, 0, LEAD // stride)
            position = jnp.arange(x.shape[0])
            real = (position >= first) & (position < LEAD // stride - (-frames // stride))
            return jnp.where(real.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

        x = inside(x, 1)[..., None]
        x = inside(jax.nn.relu(self.conv(x)), 2)
        x = inside(jax.nn.relu(self.pointwise1(self.depthwise1(x))), 4)
        x = jax.nn.relu(self.pointwise2(self.depthwise2(x)))
        x = x.transpose(0, 2, 1)  # channel-major: the order in which `out` was trained
        return inside(self.out(x.reshape(x.shape[0], -1)), 8)[LEAD // 8 :]


class FeedForward(nnx.Module):
    """Gated feed-forward with its own norm: first half * silu(second half)."""

    def __init__(self, config: AudioConfig, dtype: Any):
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.up_gate = Linear(config.hidden_size, 2 * config.intermediate_size, dtype)
        self.down = Linear(config.intermediate_size, config.hidden_size, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, T, D] to the same."""
        up, gate = jnp.split(self.up_gate(self.norm(x)), 2, axis=-1)
        return self.down(up * in_float32(jax.nn.silu, gate))


class Convolution(nnx.Module):
    """Gated pointwise, causal depthwise and two pointwise convolutions."""

    def __init__(self, config: AudioConfig, dtype: Any):
        width = config.hidden_size
        self.norm = LayerNorm(width, config.layer_norm_eps, dtype)
        self.glu = Linear(width, 2 * width, dtype)
        self.value_bias, self.gate_bias = param((width,), dtype, (None,)), param((width,), dtype, (None,))
        self.depthwise = DepthwiseConv(width, config.kernel_size, dtype)
        self.pointwise_in, self.pointwise_out = Linear(width, width, dtype), Linear(width, width, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, T, D] to the same."""
        up, gate = jnp.split(self.glu(self.norm(x)), 2, axis=-1)
        gate = gate + over_rows(value(self.gate_bias, x), x)
        x = (up + over_rows(value(self.value_bias, x), x)) * in_float32(jax.nn.silu, gate)
        return self.pointwise_out(in_float32(jax.nn.silu, self.pointwise_in(self.depthwise(x))))


class DepthwiseConv(nnx.Module):
    """Causal convolution over time, one filter per channel."""

    def __init__(self, channels: int, kernel_size: int, dtype: Any):
        self.weight = param((channels, kernel_size), dtype, (None, None))
        self.bias = param((channels,), dtype, (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, T, C] to the same."""
        weight, bias = value(self.weight, x), value(self.bias, x)
        taps, length = weight.shape[-1], x.shape[1]
        x = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
        return over_rows(bias, x) + sum(x[:, i : i + length] * over_rows(weight[:, i], x) for i in range(taps))


class ConformerLayer(nnx.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm."""

    def __init__(self, config: AudioConfig, dtype: Any):
        self.ff_in = FeedForward(config, dtype)
        self.attention_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.attention = EncoderAttention(config.hidden_size, config.num_heads, dtype)
        self.conv = Convolution(config, dtype)
        self.ff_out = FeedForward(config, dtype)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)

    def __call__(self, x: jax.Array, bias: jax.Array, key_mask: jax.Array) -> jax.Array:
        """Maps x [B, T, D] to the same; bias [heads, T, T], key_mask [B, T]."""
        x = x + self.ff_in(x) * 0.5
        x = x + self.attention(self.attention_norm(x), key_mask, bias)
        x = x + self.conv(x)
        x = x + self.ff_out(x) * 0.5
        return self.norm(x)


class AudioModel(nnx.Module):
    """Log-mel frames in, decoder-width audio tokens out."""

    def __init__(self, config: ModelConfig, dtype: Any):
        audio = config.audio
        self.config = audio
        self.mean = param((audio.input_size,), jnp.float32, (None,))
        self.inv_std = param((audio.input_size,), jnp.float32, (None,))
        self.subsampling = Subsampling(audio, dtype)
        self.relative_bias = param((2 * audio.bias_max_distance, audio.num_heads), dtype, (None, "heads"))
        self.layers = nnx.List([ConformerLayer(audio, dtype) for _ in range(audio.num_layers)])
        self.speech_projector = Projector(audio.hidden_size, config.text.hidden_size, dtype)
        self.vision_projector = Projector(audio.hidden_size, config.text.hidden_size, dtype)

    def encode(self, features: jax.Array, continues: jax.Array, frames: jax.Array, num_keys: jax.Array) -> jax.Array:
        """Conformer output of each window.

        Args:
          features: [W, LEAD + T, mel] log-mel frames, T a multiple of 8 and at most one window; zero beyond the clip's
            own end. Their dtype is the activation dtype.
          continues: [W] bool, whether the leading frames are real; false where a window begins its clip.
          frames: [W] int32, frames after the leading ones that exist: up to the end of the longest clip of the
            request, since the original pads the clips of one request to a common length before it subsamples them.
          num_keys: [W] int32, sub-frames that attention may see.

        Returns:
          [W, T/8, audio width].
        """
        mean, inv_std = self.mean.get_value(), self.inv_std.get_value()
        normalised = (features.astype(jnp.float32) - over_rows(mean, features)) * over_rows(inv_std, features)
        x = self.subsampling(normalised.astype(features.dtype), continues, frames)
        length = x.shape[1]
        key_mask = jnp.arange(length)[None, :] < num_keys[:, None]
        bias = self.position_bias(length)
        for layer in self.layers:
            x = layer(x, bias, key_mask)
        return x

    def position_bias(self, window: int) -> jax.Array:
        """Additive bias of key j for query i: float32 [heads, window, window]."""
        reach = self.config.bias_max_distance
        distance = np.arange(window)[None, :] - np.arange(window)[:, None]
        table = self.relative_bias.get_value().astype(jnp.float32)
        return table[np.clip(distance, -reach, reach - 1) + reach].transpose(2, 0, 1)

    def __call__(
        self,
        features: jax.Array,
        continues: jax.Array,
        frames: jax.Array,
        num_keys: jax.Array,
        with_image: jax.Array,
    ) -> jax.Array:
        """Projected tokens of each window.

        Args:
          features: as `encode`.
          continues: as `encode`.
          frames: as `encode`.
          num_keys: as `encode`.
          with_image: [W] bool, windows of rows that also hold an image take the `vision` projector.

        Returns:
          [W, T/8, D].
        """
        x = self.encode(features, continues, frames, num_keys)
        return jnp.where(with_image[:, None, None], self.vision_projector(x), self.speech_projector(x))
