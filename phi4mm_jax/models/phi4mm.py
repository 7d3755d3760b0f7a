"""The whole network: decoder, image encoder and speech encoder."""

from __future__ import annotations

from typing import Any

from flax import nnx

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.models.audio import AudioModel
from phi4mm_jax.models.text import TextModel
from phi4mm_jax.models.vision import VisionModel


class Phi4MMModel(nnx.Module):
    """The three towers; `nnx.eval_shape(lambda: Phi4MMModel(config, dtype))` costs nothing and names every leaf."""

    def __init__(self, config: ModelConfig, dtype: Any):
        self.text = TextModel(config, dtype)
        self.vision = VisionModel(config, dtype)
        self.audio = AudioModel(config, dtype)
