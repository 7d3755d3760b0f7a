"""Logits and greedy tokens of the published oracle, in both layouts."""

import numpy as np
import pytest
from PIL import Image

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.runtime.engine import Engine, cache_length
from phi4mm_jax.runtime.mesh import create_mesh
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.runtime.scoring import score
from phi4mm_jax.runtime.steps import Steps

MEDIA = {  # images and clips of each case
    "text": ("", []),
    "text_long": ("", []),
    "image_b": ("b", []),
    "image_d": ("d", []),
    "image_a_c": ("ac", []),
    "audio": ("", ["w16a"]),
    "audio2": ("", ["w16a", "w16b"]),
    "image_audio": ("c", ["w16a"]),
    "image_audio_long": ("a", ["w16a"]),
    "e2e": ("d", ["w16b"]),
    "switch_text": ("", []),
    "switch_image_audio": ("a", ["w16a"]),
}
GENERATED = ["text", "image_b", "audio", "image_audio", "switch_text", "switch_image_audio"]


@pytest.fixture(scope="module")
def arrays(oracle):
    names = ("logits", "generate", "audio_features")
    return {name: dict(np.load(oracle / "data" / f"{name}.npz")) for name in names}


@pytest.fixture(scope="module")
def oracle_steps(oracle, runtime):
    """One set of programs: the two layouts differ in names only."""
    config = ModelConfig.from_checkpoint(oracle / "ckpt_hub")
    runtime = runtime.override(engine={"prefill_buckets": [32, 128], "max_seq_len": 512})
    return Steps(config, runtime, create_mesh(runtime.mesh))


@pytest.fixture(scope="module")
def oracle_weights(oracle_checkpoint, oracle_steps, load_weights):
    return load_weights(oracle_checkpoint, oracle_steps)


@pytest.fixture(scope="module")
def oracle_prompts(oracle, oracle_checkpoint, arrays):
    processor = Processor.from_checkpoint(oracle_checkpoint, ModelConfig.from_checkpoint(oracle_checkpoint))
    found = {}
    for name, (images, clips) in MEDIA.items():
        source = arrays["generate" if name.startswith("switch") else "logits"]
        waves = [(arrays["audio_features"][f"{clip}_int16"] / 32768, 16000) for clip in clips]
        pictures = [Image.open(oracle / "images" / f"{image}.png") for image in images]
        found[name] = processor.raw(source[f"{name}_input_ids"], images=pictures, audios=waves)
    return found


def test_logits(oracle_steps, oracle_weights, oracle_prompts, arrays):
    for name, prompt in oracle_prompts.items():
        if not name.startswith("switch"):
            found = score(oracle_steps, oracle_weights, prompt)
            np.testing.assert_allclose(found, arrays["logits"][f"{name}_logits"], atol=2e-4, rtol=1e-4, err_msg=name)


def test_logits_of_rows_of_a_padded_batch(oracle_steps, oracle_weights, oracle_prompts, arrays):
    """The original's left-padded batch gives each row what it gives alone."""
    expected = arrays["logits"]
    short, full = expected["leftpad_input_ids"]
    for ids, name in ((short[5:], "leftpad_logits_row0_valid"), (full, "leftpad_logits_row1")):
        prompt = type(oracle_prompts["text"])(ids)
        np.testing.assert_allclose(score(oracle_steps, oracle_weights, prompt), expected[name], atol=2e-4, rtol=1e-4)


def test_tokens(oracle_steps, oracle_weights, oracle_prompts, arrays, run, tokens_of):
    """All in one batch, and each alone."""
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    prompts = {name: oracle_prompts[name] for name in GENERATED}
    length = max(cache_length(oracle_steps, prompt, 16) for prompt in prompts.values())
    engine = Engine(oracle_steps, oracle_weights, len(prompts), length)
    expected = {name: arrays["generate"][f"{name}_tokens"].tolist() for name in GENERATED}
    assert {name: tokens_of(events) for name, events in run(engine, prompts, params).items()} == expected
    for name, prompt in prompts.items():
        assert tokens_of(run(engine, {name: prompt}, params)[name]) == expected[name]
