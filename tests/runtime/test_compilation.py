"""Nothing compiles anew from request to request."""

import dataclasses
import logging
import re

import jax
import numpy as np
import pytest

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime import compilation, prefill
from phi4mm_jax.runtime.compilation import set_up_compilation, watch_compilations
from phi4mm_jax.runtime.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
SAMPLED = dataclasses.replace(GREEDY, temperature=0.8, top_k=9, seed=3)


def requests(processor, seed):
    """A text, a picture, a clip and both, of random content and of lengths that share the buckets of every seed."""
    random = np.random.default_rng(seed)

    def prompt(images, audios, shortest, longest):
        """Random media, and behind them random text of so many tokens."""
        pictures = [  # 3 x 2 crops, with more or less padding
            random.integers(0, 256, (random.integers(90, 100), 150, 3)).astype(np.uint8) for _ in range(images)
        ]
        clips = [(random.normal(scale=0.1, size=random.integers(9000, 16000)), 16000) for _ in range(audios)]
        text = random.integers(2, 490, random.integers(shortest, longest)).astype(np.int32)
        if not images and not audios:
            return Prompt(text)
        media = processor.raw("<|image_1|>" * images + "<|audio_1|>" * audios, pictures, clips)
        return dataclasses.replace(media, token_ids=np.concatenate([media.token_ids, text]))

    return {
        "short": prompt(0, 0, 3, 15),
        "crossing": prompt(0, 0, 59, 64),
        "long": prompt(0, 0, 90, 95),
        "image": prompt(1, 0, 10, 20),
        "audio": prompt(0, 1, 3, 4),
        "both": prompt(1, 1, 25, 30),
    }


@pytest.fixture(scope="module")
def warm(session_engine, processor, run):
    """All buckets have been in use, alone and together."""
    session_engine.reset()
    some = requests(processor, 0)
    for params in (GREEDY, SAMPLED):
        run(session_engine, some, params)
        for name, prompt in some.items():
            run(session_engine, {name: prompt}, params)


@pytest.mark.parametrize("seed", [1, 2])
def test_other_requests_compile_nothing(warm, engine, processor, run, seed):
    """Other lengths, pictures, clips and settings; all at once, a part of them, and one at a time."""
    random = np.random.default_rng(seed)
    prompts = requests(processor, seed)
    names = list(prompts)
    settings = {
        "temperature": 1.3,
        "top_p": 0.7,
        "min_p": 0.01,
        "presence_penalty": 0.3,
        "logit_bias": {5: 2.0},
        "logprobs": 4,
        "min_tokens": 2,
        "ignore_eos": False,
        "max_tokens": 5,
    }
    with watch_compilations() as log:
        run(engine, prompts, dataclasses.replace(SAMPLED, **settings))
        run(engine, prompts, {name: SAMPLED if i % 2 else GREEDY for i, name in enumerate(names)})
        run(engine, prompts, GREEDY, max_steps=1)
        for name in random.permutation(names):
            run(engine, {name: prompts[name]}, GREEDY)
    assert log.count == 0


def test_a_shape_that_leaks_is_noticed(warm, engine, processor, run, monkeypatch):
    """The test above would fail if prompts were not rounded up."""
    monkeypatch.setattr(prefill, "plan_chunks", lambda length, buckets, call_cost: (length,))
    with watch_compilations() as log:
        run(engine, {"short": requests(processor, 3)["short"]}, GREEDY)
    assert log.count > 0


def test_compilations_are_counted_and_logged(caplog, monkeypatch):
    def tripled(x):
        return x * 3 + 1

    set_up_compilation()
    monkeypatch.setattr(compilation, "SLOW_SECONDS", 0)
    with caplog.at_level(logging.INFO, logger="phi4mm_jax"), watch_compilations() as log:
        jax.jit(tripled)(np.ones(3, np.float32)).block_until_ready()
    assert log.count == 1
    assert re.search(r"compiled .*tripled.* in \d", caplog.text)
    jax.jit(lambda x: x * 5 + 1)(np.ones(3, np.float32)).block_until_ready()
    assert log.count == 1  # no longer listening


def test_an_existing_cache_directory_is_respected():
    before = jax.config.jax_compilation_cache_dir
    if not before:
        pytest.skip("no cache directory is set")
    set_up_compilation()
    assert jax.config.jax_compilation_cache_dir == before
