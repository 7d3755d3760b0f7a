import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from phi4mm_jax.config import ModelConfig, TokenConfig
from phi4mm_jax.models.phi4mm import Phi4MMModel
from tools.checkpoint_files import write_checkpoint
from tools.random_checkpoint import RandomValues

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def released() -> ModelConfig:
    return ModelConfig.from_toml(REPOSITORY / "configs" / "model" / "phi4mm.toml")


@pytest.fixture(scope="session")
def small(released: ModelConfig) -> ModelConfig:
    """Every size differs, so that no two axes can be confused."""
    pairs = 9  # head_dim 24, of which 18 rotate
    return dataclasses.replace(
        released,
        text=dataclasses.replace(
            released.text,
            **dict(vocab_size=250, hidden_size=144, intermediate_size=208, num_layers=2, num_heads=6, num_kv_heads=2),
            short_factor=(1.0,) * pairs,
            long_factor=(2.0,) * pairs,
        ),
        vision=dataclasses.replace(
            released.vision,
            **dict(hidden_size=48, intermediate_size=72, num_layers=4, num_heads=4, image_size=112, max_crops=9),
        ),
        audio=dataclasses.replace(
            released.audio,
            **dict(hidden_size=32, intermediate_size=56, num_layers=3, num_heads=4, conv_channels=16),
            bias_max_distance=300,
        ),
        vision_lora=dataclasses.replace(released.vision_lora, rank=8, alpha=16.0),
        speech_lora=dataclasses.replace(released.speech_lora, rank=10, alpha=30.0),
        tokens=TokenConfig(image=240, audio=241, pad=245, eos=(246, 245)),
    )


@pytest.fixture(scope="session")
def abstract_leaves() -> Callable[[ModelConfig], dict[str, jax.ShapeDtypeStruct]]:
    """Returns the real model's leaves, by dotted path."""

    def abstract_leaves(config: ModelConfig, dtype: jnp.dtype = jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
        leaves = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Phi4MMModel(config, dtype))))
        return {".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}

    return abstract_leaves


@pytest.fixture
def write(small: ModelConfig, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small random checkpoint; keyword arguments are those of `write_checkpoint`."""

    def write(name: str = "checkpoint", seed: int = 0, **options) -> Path:
        write_checkpoint(tmp_path / name, small, RandomValues(seed), **options)
        return tmp_path / name

    return write
