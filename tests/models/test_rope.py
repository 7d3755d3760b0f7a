"""Rotary tables under both sets of factors."""

import jax.numpy as jnp
import numpy as np
import pytest

from phi4mm_jax.models.rope import rotary_table, rotate


def check(text, arrays, prefix, regime):
    positions = arrays[f"{prefix}{regime}_positions"].astype(np.int32)
    long = np.array([regime == "long"])
    half = text.rotary_dim // 2
    for table, name in zip(rotary_table(text, positions[None], long, jnp.float32), ("cos", "sin"), strict=True):
        expected = arrays[f"{prefix}{regime}_{name}"]
        np.testing.assert_allclose(table[0, :, 0], expected[:, :half], atol=1e-6, rtol=1e-5)
        np.testing.assert_array_equal(expected[:, :half], expected[:, half:])


@pytest.mark.parametrize("regime", ["short", "long"])
def test_matches_the_original(config, golden, regime):
    check(config.text, golden, "rope/", regime)


@pytest.mark.parametrize("regime", ["short", "long"])
def test_oracle(oracle_loaded, oracle, regime):
    text = oracle_loaded[0].text
    with np.load(oracle / "data" / "rope.npz") as arrays:
        check(text, dict(arrays), "", regime)
        assert text.rope_scale == pytest.approx(float(arrays["attention_scaling"]), rel=1e-12)


def test_each_row_has_its_own_regime(config):
    positions = np.tile(np.arange(70, dtype=np.int32), (2, 1))
    mixed = rotary_table(config.text, positions, np.array([True, False]), jnp.float32)
    for row, long in enumerate([True, False]):
        alone = rotary_table(config.text, positions[:1], np.array([long]), jnp.float32)
        for a, b in zip(mixed, alone, strict=True):
            np.testing.assert_array_equal(a[row], b[0])


def test_rotation_keeps_lengths_and_the_rest(config):
    """Up to the longrope scale, a rotation; dimensions beyond rotary_dim pass unchanged."""
    text = config.text
    x = np.random.default_rng(0).standard_normal((1, 9, 2, text.head_dim)).astype(np.float32)
    table = rotary_table(text, np.arange(9, dtype=np.int32)[None], np.array([False]), jnp.float32)
    y = np.asarray(rotate(jnp.asarray(x), table))
    width = text.rotary_dim
    norms = [np.linalg.norm(a[..., :width], axis=-1) for a in (x, y)]
    np.testing.assert_allclose(norms[1], norms[0] * text.rope_scale, rtol=1e-5)
    np.testing.assert_array_equal(y[..., width:], x[..., width:])
