"""The released model's sizes, by shape alone."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.models.audio import LEAD
from phi4mm_jax.models.phi4mm import Phi4MMModel

BUFFERS = 160  # mean and inverse deviation of 80 mel bins


@pytest.fixture(scope="module")
def released() -> ModelConfig:
    return ModelConfig.from_toml(Path(__file__).parents[2] / "configs" / "model" / "phi4mm.toml")


@pytest.fixture(scope="module")
def shapes(released):
    return nnx.eval_shape(lambda: Phi4MMModel(released, jnp.bfloat16))


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def outputs(model, function, *arguments):
    """Shapes of `function(model, *arguments)` for a model that is itself only shapes."""
    graph, state = nnx.split(model)
    return jax.eval_shape(lambda state, *args: function(nnx.merge(graph, state), *args), state, *arguments)


def test_number_of_parameters(shapes):
    leaves = jax.tree.leaves(nnx.state(shapes))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 5_543_980_224
    wide = [leaf for leaf in leaves if leaf.dtype == jnp.float32]
    assert sum(math.prod(leaf.shape) for leaf in wide) == BUFFERS


def test_vision(shapes, released):
    assert len(shapes.vision.layers) == released.vision.num_layers - 1
    crops, mask, positions = array(5, 3, 448, 448), array(5, 1024, dtype=jnp.bool_), array(5, 1024, dtype=jnp.int32)
    tokens = outputs(shapes.vision, lambda tower, *args: tower(*args), crops, mask, positions)
    assert (tokens.shape, tokens.dtype) == ((5 * 256 + 2, 3072), jnp.bfloat16)
    features = outputs(shapes.vision, lambda tower, *args: tower.features(*args), crops, mask, positions)
    assert features.shape == (5, 1024, 1152)


@pytest.mark.parametrize("frames", [8, 1000, 4000])
def test_audio(shapes, frames):
    row = partial(array, 2)
    features, integers, flags = array(2, LEAD + frames, 80), row(dtype=jnp.int32), row(dtype=jnp.bool_)
    tokens = outputs(shapes.audio, lambda tower, *args: tower(*args), features, flags, integers, integers, flags)
    assert (tokens.shape, tokens.dtype) == ((2, frames // 8, 3072), jnp.bfloat16)


def test_text(shapes, released):
    text = released.text

    def attend(q, k, v, cache):
        assert q.shape == (3, 7, 24, 128)
        assert k.shape == v.shape == (3, 7, 8, 128)
        return q, cache

    def run(model, x, positions, flags):
        adapters = {"vision": flags, "speech": ~flags}
        hidden, _ = model(x, positions, flags, adapters, attend, [None] * text.num_layers)
        return hidden, model.embed.attend(hidden)

    x, positions, flags = array(3, 7, 3072), array(3, 7, dtype=jnp.int32), array(3, dtype=jnp.bool_)
    hidden, logits = outputs(shapes.text, run, x, positions, flags)
    assert (hidden.shape, hidden.dtype) == ((3, 7, 3072), jnp.bfloat16)
    assert (logits.shape, logits.dtype) == ((3, 7, 200064), jnp.float32)


def test_rope_of_the_released_model(released):
    assert released.text.rotary_dim == 96
    assert released.text.rope_scale == pytest.approx(1.190238, abs=1e-6)
    assert np.asarray(released.text.short_factor).tolist() == [1.0] * 48
