"""The same answers under other configurations: meshes, several prompts per prefill, other cache formats."""

import jax
import numpy as np
import pytest

from phi4mm_jax.config import ConfigError, MeshConfig
from phi4mm_jax.runtime.engine import Engine
from phi4mm_jax.runtime.mesh import create_mesh, sharding
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.runtime.scoring import score

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
LENGTH = 128


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def answers(build, runtime, prompts, run, tokens_of, params=GREEDY):
    steps, weights = build(runtime)
    engine = Engine(steps, weights, len(prompts), LENGTH)
    return {name: tokens_of(events) for name, events in run(engine, prompts, params).items()}


@pytest.mark.parametrize("mesh", [{"model": 2}, {"data": 2, "model": 2}], ids=str)
def test_meshes(build, runtime, prompts, golden, run, tokens_of, mesh):
    """Heads, MLP columns and vocabulary over `model`, rows over `data`; a switch of rope factors included."""
    some = {name: prompts[name] for name in ("text", "image_audio", "audio", "switch_text")}
    steps, weights = build(runtime.override(mesh=mesh))
    engine = Engine(steps, weights, len(some), LENGTH)
    for name, events in run(engine, some, GREEDY).items():
        assert tokens_of(events) == golden[f"tokens/{name}"].tolist(), name
    logits = score(steps, weights, prompts["image_bottom"])
    np.testing.assert_allclose(logits, golden["logits/image_bottom"], atol=2e-4, rtol=1e-4)


def test_weights_and_cache_are_spread(build, runtime):
    steps, weights = build(runtime.override(mesh={"data": 2, "model": 2}))
    assert len(steps.mesh.devices.flat) == 4
    shapes = steps.abstract()
    assert shapes["text.layers.0.attention.qkv.weight"].sharding.shard_shape((128, 64)) == (64, 64)
    assert shapes["text.layers.0.attention.out.weight"].sharding.shard_shape((64, 64)) == (64, 32)
    assert shapes["text.embed.weight"].sharding.shard_shape((512, 64)) == (256, 64)
    assert all(x.sharding.shard_shape(x.shape) != x.shape for x in weights.text if x.ndim == 2 and min(x.shape) > 8)
    keys, _ = steps.new_state(4, LENGTH).caches[0]
    assert keys.shape == (4, 4, LENGTH, 8)
    assert {shard.data.shape for shard in keys.addressable_shards} == {(2, 2, LENGTH, 8)}


def test_what_does_not_divide_stays_whole():
    mesh = create_mesh(MeshConfig(data=2, model=3))
    assert sharding(mesh, (6, 5, 4), ("heads", "mlp", None)).shard_shape((6, 5, 4)) == (2, 5, 4)
    assert sharding(mesh, (3, 4), ("batch", "unheard of")).shard_shape((3, 4)) == (3, 4)


def test_too_few_devices():
    with pytest.raises(ConfigError, match=r"mesh.data x mesh.model = 3 x 3 needs 9 devices; there are 8"):
        create_mesh(MeshConfig(data=3, model=3), jax.devices("cpu")[:8])


def test_several_prompts_per_prefill(build, runtime, prompts, golden, run, tokens_of):
    """Four rows share the calls, then two, of the adapters and media that they have."""
    names = ["text", "audio", "image_exact", "audios", "switch_text", "switch_image_audio"]
    runtime = runtime.override(engine={"prefill_rows": 4})
    found = answers(build, runtime, {name: prompts[name] for name in names}, run, tokens_of)
    assert found == {name: golden[f"tokens/{name}"].tolist() for name in names}


def test_cache_formats(build, runtime, prompts, run, tokens_of):
    """Bits of bfloat16 are bfloat16; float32 agrees in the first token, which no rounding has touched much."""
    some = {name: prompts[name] for name in ("text", "switch_text")}
    found = {
        kv_cache: answers(build, runtime.override(dtypes={"kv_cache": kv_cache}), some, run, tokens_of)
        for kv_cache in ("bfloat16", "bfloat16_bits", "float16", "int8")
    }
    assert found["bfloat16"] == found["bfloat16_bits"]
    assert all(len(tokens) == 16 for rows in found.values() for tokens in rows.values())


@pytest.mark.parametrize("kv_cache", ["bfloat16", "bfloat16_bits", "float16", "int8"])
def test_rounded_caches_stay_close(build, runtime, prompts, golden, kv_cache):
    steps, weights = build(runtime.override(dtypes={"kv_cache": kv_cache}))
    error = np.abs(score(steps, weights, prompts["text"]) - golden["logits/text"])
    assert 1e-6 < error.max() < (0.02 if kv_cache == "float16" else 0.2)


@pytest.mark.parametrize("name", ["text_long", "image_audio", "switch_text"])
def test_int8_cache_hardly_changes_the_distribution(build, runtime, prompts, golden, name):
    """The divergence from the original's next-token distributions, and how often the likeliest token is the same."""
    steps, weights = build(runtime.override(dtypes={"kv_cache": "int8"}))
    found, expected = (
        log_softmax(logits) for logits in (score(steps, weights, prompts[name]), golden[f"logits/{name}"])
    )
    divergence = np.sum(np.exp(expected) * (expected - found), axis=-1)
    assert 1e-5 < divergence.mean() < 2e-3
    assert np.mean(found.argmax(axis=-1) == expected.argmax(axis=-1)) > 0.95


def test_rows_share_an_int8_cache(build, runtime, prompts, run, tokens_of):
    """Each row's tokens are those that it has alone."""
    some = {name: prompts[name] for name in ("text", "audio", "image_exact", "switch_text")}
    steps, weights = build(runtime.override(dtypes={"kv_cache": "int8"}))
    engine = Engine(steps, weights, len(some), LENGTH)
    together = {name: tokens_of(events) for name, events in run(engine, some, GREEDY).items()}
    for name, prompt in some.items():
        assert tokens_of(run(engine, {name: prompt}, GREEDY)[name]) == together[name], name


def test_int8_cache_on_several_devices(build, runtime, prompts):
    """Scales are cut as their values are."""
    runtime = runtime.override(dtypes={"kv_cache": "int8"})
    alone, spread = (
        score(*build(runtime.override(mesh=mesh)), prompts["image_audio"]) for mesh in ({}, {"data": 2, "model": 2})
    )
    np.testing.assert_allclose(spread, alone, atol=0.05)
    steps, _ = build(runtime.override(mesh={"data": 2, "model": 2}))
    keys, _ = steps.new_state(4, LENGTH).caches[0]
    assert {shard.data.shape for shard in keys.values.addressable_shards} == {(2, 2, LENGTH, 8)}
    assert {shard.data.shape for shard in keys.scales.addressable_shards} == {(2, 2, LENGTH)}


def test_bfloat16_throughout(build, runtime, prompts, golden):
    """As on an accelerator: close to the original's float32, though not equal."""
    dtypes = {"params": "bfloat16", "activations": "bfloat16", "kv_cache": "bfloat16", "matmul_precision": "default"}
    steps, weights = build(runtime.override(dtypes=dtypes))
    logits = score(steps, weights, prompts["image_audio"])
    expected = golden["logits/image_audio"]
    assert np.sqrt(np.mean((logits - expected) ** 2)) < 0.2 * expected.std()
