"""The cache is updated in place, and the memory plan says what will be held."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from phi4mm_jax.config import ModelConfig, RuntimeConfig
from phi4mm_jax.runtime import steps as steps_module
from phi4mm_jax.runtime.memory import MemoryPlan, MemoryPlanError, available_memory, plan_memory
from phi4mm_jax.runtime.mesh import create_mesh
from phi4mm_jax.runtime.steps import Steps

BATCH, LENGTH, CHUNK = 4, 2**15, 16  # a cache of 64 MiB in float32, beside weights of less than one


def abstract_arguments(steps):
    leaves = steps.abstract()
    text = tuple(leaf for path, leaf in leaves.items() if path.startswith("text."))
    return text, steps.state_shapes(BATCH, LENGTH)


def rows(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def decode_memory(steps):
    text, state = abstract_arguments(steps)
    keep, count = rows(jnp.bool_, BATCH), rows(jnp.int32, BATCH)
    adapters = {"speech": keep, "vision": keep}
    return steps.decode.lower(text, state, keep, count, adapters, kind="full").compile().memory_analysis()


def prefill_memory(steps, count):
    text, state = abstract_arguments(steps)
    tokens, index, flags = rows(jnp.int32, count, CHUNK), rows(jnp.int32, count), rows(jnp.bool_, count)
    media = rows(steps.activation_dtype, count, CHUNK, steps.model.text.hidden_size)
    is_media = rows(jnp.bool_, count, CHUNK)
    arguments = (tokens, media, is_media, index, index, index, flags, {"vision": flags})
    return steps.prefill.lower(text, state.caches, *arguments).compile().memory_analysis()


def share_of_cache(memory, steps):
    """Temporary memory over the size of the cache, which must be handed on in place."""
    cache = plan_memory(steps, BATCH, LENGTH).cache
    assert memory.alias_size_in_bytes >= cache
    return memory.temp_size_in_bytes / cache


@pytest.fixture(scope="module", params=["float32", "bfloat16_bits", "int8"])
def large_cache_steps(request, model_config, runtime):
    runtime = runtime.override(dtypes={"kv_cache": request.param})
    return Steps(model_config, runtime, create_mesh(runtime.mesh))


def test_decode_copies_no_cache(large_cache_steps):
    assert share_of_cache(decode_memory(large_cache_steps), large_cache_steps) < 0.1


@pytest.mark.parametrize("prompts", [1, 2])
def test_prefill_copies_no_cache(large_cache_steps, prompts):
    assert share_of_cache(prefill_memory(large_cache_steps, prompts), large_cache_steps) < 0.1


def test_a_copy_is_noticed(model_config, runtime, monkeypatch):
    """The tests above would fail if the attention moved the whole cache."""
    attend_of = steps_module.decode_attend

    def copying(*args, **kwargs):
        attend = attend_of(*args, **kwargs)

        def moved(q, k, v, cache):
            out, cache = attend(q, k, v, cache)
            return out, tuple(jnp.roll(c, 1, axis=2) for c in cache)

        return moved

    monkeypatch.setattr(steps_module, "decode_attend", copying)
    steps = Steps(model_config, runtime, create_mesh(runtime.mesh))
    assert share_of_cache(decode_memory(steps), steps) > 0.2


# --- the plan ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released() -> ModelConfig:
    return ModelConfig.from_toml(Path(__file__).parents[2] / "configs" / "model" / "phi4mm.toml")


def plan(model, runtime, batch, length) -> MemoryPlan:
    return plan_memory(Steps(model, runtime, create_mesh(runtime.mesh)), batch, length)


def test_plan_of_the_released_model_on_cpu(released):
    found = plan(released, RuntimeConfig.load("cpu"), 2, 1024)
    assert found.weights == (5_543_980_224 - 160) * 2 + 160 * 4
    assert found.cache == 2 * 1024 * (32 * 2 * 8 * 128) * 2  # rows, positions, keys and values of all layers, bytes
    assert 2 * 200064 * 9 < found.sampling < 2 * 200064 * 9 + 1000  # bias, prompt and answer over the vocabulary
    assert found.media == 128 * 2**20  # of the latest pictures and recordings
    assert 2**29 < found.workspace < 2**30  # the compiled encoder of speech takes 0.43 GiB
    assert found.total == found.weights + found.cache + found.sampling + found.media + found.workspace
    assert "weights 10.33, cache 0.25, sampling 0.00, media 0.12" in str(found)


@pytest.mark.parametrize(("kv_cache", "bytes_per_vector"), [("float32", 512), ("bfloat16", 256), ("int8", 128 + 4)])
def test_plan_of_the_cache(released, kv_cache, bytes_per_vector):
    """On one device, and cut by rows and heads."""
    for mesh, devices in ({}, 1), ({"data": 2, "model": 4}, 8):
        runtime = RuntimeConfig.load("cpu", dtypes={"kv_cache": kv_cache}, mesh=mesh)
        vectors = 4 * 1024 * 32 * 2 * 8
        assert plan(released, runtime, 4, 1024).cache == vectors * bytes_per_vector // devices


def test_plan_of_sharded_arrays_counts_one_device(released):
    one = plan(released, RuntimeConfig.load("cpu"), 4, 1024)
    eight = plan(released, RuntimeConfig.load("cpu", mesh={"data": 2, "model": 4}), 4, 1024)
    assert eight.cache == one.cache // 8
    assert one.weights // 4 < eight.weights < one.weights // 3


def test_plan_counts_what_stays_whole(released):
    """A batch of one is not spread over two data devices."""
    one = plan(released, RuntimeConfig.load("cpu"), 1, 1024)
    assert plan(released, RuntimeConfig.load("cpu", mesh={"data": 2}), 1, 1024).cache == one.cache


def test_plan_counts_encoded_media(released):
    runtime = RuntimeConfig.load("cpu")
    steps = Steps(released, runtime, create_mesh(runtime.mesh))
    assert plan_memory(steps, 1, 1024, media_tokens=50000).media == 50000 * 3072 * 4


def test_what_does_not_fit_names_the_setting():
    size = {"weights": 10 * 2**30, "cache": 8 * 2**30, "sampling": 0, "media": 0, "workspace": 2**30}
    rows = MemoryPlan(**size, batch=8, length=8192)
    rows.check(None)
    rows.check(19 * 2**30)
    rows.check(9 * 2**30, weights_loaded=True)
    with pytest.raises(MemoryPlanError, match=r"^19.0 GiB are needed .* 18.9 left .*8 x 8192 .*lower engine.max_batch"):
        rows.check(int(18.9 * 2**30))
    with pytest.raises(MemoryPlanError, match=r"^9.0 GiB are needed .* 8.0 left .*lower .*max_tokens"):
        rows.check(8 * 2**30, weights_loaded=True)
    with pytest.raises(MemoryPlanError, match=r"16-bit dtypes.params, raise mesh.model"):
        rows.check(10 * 2**30)
    with pytest.raises(MemoryPlanError, match=r"dtypes.params"):
        dataclasses.replace(rows, workspace=9 * 2**30).check(5 * 2**30, weights_loaded=True)


def test_available_memory_of_this_machine():
    available = available_memory(jax.devices("cpu")[0])
    assert available is None or available > 2**20
