"""The golden model as modules: no batches, caches or programs of the runtime."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.models.phi4mm import Phi4MMModel
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.weights.loader import load

GOLDEN = Path(__file__).parents[1] / "golden"


def load_module(directory: Path) -> tuple[ModelConfig, Phi4MMModel]:
    """A checkpoint in float32."""
    config = ModelConfig.from_checkpoint(directory)
    graph, state = nnx.split(nnx.eval_shape(lambda: Phi4MMModel(config, jnp.float32)))
    shapes = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    values, _ = load(directory, config, shapes, lambda path, value: jnp.asarray(value), progress=False)
    leaves = [values[".".join(map(str, path))] for path, _ in nnx.to_flat_state(state)]
    return config, nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))


@pytest.fixture(scope="session")
def loaded() -> tuple[ModelConfig, Phi4MMModel]:
    return load_module(GOLDEN / "hub")


@pytest.fixture(scope="session")
def config(loaded) -> ModelConfig:
    return loaded[0]


@pytest.fixture(scope="session")
def model(loaded) -> Phi4MMModel:
    return loaded[1]


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "model.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def media() -> Path:
    return GOLDEN / "media"


@pytest.fixture(scope="session")
def processor(config) -> Processor:
    return Processor.from_checkpoint(GOLDEN / "hub", config)


@pytest.fixture(scope="session")
def oracle_loaded(oracle_checkpoint) -> tuple[ModelConfig, Phi4MMModel]:
    return load_module(oracle_checkpoint)


@pytest.fixture(scope="session")
def cases() -> dict[str, dict]:
    """Ids and media of each golden prompt."""
    return json.loads((GOLDEN / "cases.json").read_text())
