"""The one configuration system: what the model is (`ModelConfig`) and how it is run (`RuntimeConfig`).

Both are frozen, validated dataclasses. A `ModelConfig` is read from a checkpoint's own `config.json`; a
`RuntimeConfig` comes from a TOML preset in `configs/`, changed by `--set engine.max_batch=8` or by keyword.
"""

from phi4mm_jax.config.building import ConfigError
from phi4mm_jax.config.model import (
    AudioConfig,
    LoraConfig,
    ModelConfig,
    TextConfig,
    TokenConfig,
    VisionConfig,
    models,
)
from phi4mm_jax.config.quantization import QuantizationConfig, WeightFormat, quantization_settings
from phi4mm_jax.config.runtime import (
    DType,
    DTypeConfig,
    EngineConfig,
    MeshConfig,
    RuntimeConfig,
    parse_settings,
    presets,
)

__all__ = [
    "AudioConfig",
    "ConfigError",
    "DType",
    "DTypeConfig",
    "EngineConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "QuantizationConfig",
    "RuntimeConfig",
    "TextConfig",
    "TokenConfig",
    "VisionConfig",
    "WeightFormat",
    "models",
    "parse_settings",
    "presets",
    "quantization_settings",
]
