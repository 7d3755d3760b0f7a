"""The decoder by itself, with a plain causal attention and no cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi4mm_jax.models.rope import rotary_table

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


def attend(q, k, v, cache):
    """Causal attention of a whole sequence over itself."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], jnp.bool_))[None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v), cache


def logits(text, tokens, *, use_long=None, adapters=None):
    """float32 [B, T, V] of tokens [B, T]."""
    tokens = np.asarray(tokens, np.int32)
    use_long = np.zeros(len(tokens), bool) if use_long is None else use_long

    @jax.jit
    def run(tokens, use_long, adapters):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        x = text.embed.encode(tokens, jnp.float32)
        hidden, _ = text(x, positions, use_long, adapters, attend, [None] * len(text.layers))
        return text.embed.attend(hidden)

    return np.asarray(run(tokens, use_long, adapters or {}))


@pytest.fixture(scope="module")
def tokens(config):
    return np.random.default_rng(3).integers(2, 490, (1, 14))


@pytest.mark.parametrize("name", ["text", "text_long"])
def test_matches_the_original(model, golden, cases, name):
    found = logits(model.text, [cases[name]["ids"]], use_long=np.array([name == "text_long"]))
    np.testing.assert_allclose(found[0], golden[f"logits/{name}"], **TOLERANCE)


def test_rows_mix_adapters_and_rope_regimes(model, tokens):
    """A batch of every adapter under both regimes gives each row what it gives alone."""
    kinds = [(adapter, long) for adapter in (None, "vision", "speech") for long in (False, True)]
    adapters = {name: np.array([adapter == name for adapter, _ in kinds]) for name in ("vision", "speech")}
    use_long = np.array([long for _, long in kinds])
    mixed = logits(model.text, np.repeat(tokens, len(kinds), axis=0), use_long=use_long, adapters=adapters)
    for row, (adapter, long) in enumerate(kinds):
        own = {adapter: np.array([True])} if adapter else {}
        alone = logits(model.text, tokens, use_long=np.array([long]), adapters=own)
        np.testing.assert_allclose(mixed[row], alone[0], **TOLERANCE)
    assert all(np.abs(mixed[i] - mixed[j]).max() > 0.1 for i in range(len(kinds)) for j in range(i))


def test_an_adapter_is_the_update_of_its_weights(model, tokens):
    """Folding B A into the base weight gives the same."""
    linear = model.text.layers[0].attention.qkv
    x = np.random.default_rng(0).standard_normal((1, 5, linear.weight.shape[1])).astype(np.float32)
    found = linear(jnp.asarray(x), {"speech": np.array([True])})
    a, b, weight = (np.asarray(w.get_value()) for w in (linear.speech_a, linear.speech_b, linear.weight))
    np.testing.assert_allclose(found, x @ (weight + b @ a).T, **TOLERANCE)


def test_oracle_hidden_states_and_adapters(oracle_loaded, oracle):
    _, model = oracle_loaded
    text = model.text
    with np.load(oracle / "data" / "logits.npz") as arrays:
        expected = {name: arrays[name] for name in arrays if name.startswith("text_")}
    ids = expected["text_input_ids"][None]
    np.testing.assert_allclose(text.embed.encode(ids, jnp.float32)[0], expected["text_hidden_0"], **TOLERANCE)
    for mode, adapter in {"text": None, "image": "vision", "audio": "speech"}.items():
        found = logits(text, ids, adapters={adapter: np.array([True])} if adapter else {})
        np.testing.assert_allclose(found[0, -1], expected[f"text_under_{mode}_lora_last_logits"], **TOLERANCE)
    found = logits(text, expected["text_long_input_ids"][None], use_long=np.array([True]))
    np.testing.assert_allclose(found[0], expected["text_long_logits"], **TOLERANCE)


def test_oracle_layers(oracle_loaded, oracle):
    """The residual stream after each layer; the last entry follows the final norm."""
    config, model = oracle_loaded
    text = model.text
    with np.load(oracle / "data" / "logits.npz") as arrays:
        expected = [arrays[f"text_hidden_{i}"] for i in range(config.text.num_layers + 1)]

    @jax.jit
    def run(x):
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        rope = rotary_table(config.text, positions, jnp.zeros(1, jnp.bool_), x.dtype)
        hidden = [x]
        for layer in text.layers:
            hidden.append(layer(hidden[-1], rope, {}, attend, None)[0])
        return [*hidden[:-1], text.norm(hidden[-1])]

    for found, wanted in zip(run(expected[0][None]), expected, strict=True):
        np.testing.assert_allclose(found[0], wanted, **TOLERANCE)
