"""A model small enough for tests, with the toy tokenizer of `tests/golden`."""

import dataclasses
from pathlib import Path

import pytest

from phi4mm_jax.config import ModelConfig, TokenConfig
from phi4mm_jax.processing.media import MediaLimits
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def golden() -> Path:
    return REPOSITORY / "tests" / "golden"


@pytest.fixture(scope="session")
def released() -> ModelConfig:
    """The released model's numbers."""
    return ModelConfig.from_toml(REPOSITORY / "configs" / "model" / "phi4mm.toml")


@pytest.fixture(scope="session")
def config(released: ModelConfig) -> ModelConfig:
    """4 x 4 patches a crop, at most 6 crops, and the ids of the toy tokenizer."""
    return dataclasses.replace(
        released,
        text=dataclasses.replace(released.text, vocab_size=512),
        vision=dataclasses.replace(released.vision, image_size=56, max_crops=6),
        tokens=TokenConfig(image=500, audio=501, pad=505, eos=(505, 506)),
    )


@pytest.fixture(scope="session")
def tokenizer(golden: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(golden)


@pytest.fixture(scope="session")
def processor(config: ModelConfig, tokenizer: Tokenizer) -> Processor:
    return Processor(config, tokenizer)


@pytest.fixture(scope="session")
def limits() -> MediaLimits:
    return MediaLimits()


@pytest.fixture(scope="session")
def media(shared: Path) -> Path:
    """Real pictures and recordings."""
    path = shared / "media"
    if not path.is_dir():
        pytest.skip(f"no media at {path}")
    return path
