"""What an engine says it has done: by hand for prompts whose chunks are known, and in time that adds up."""

import time

import pytest

from phi4mm_jax.runtime.counts import Counts, Meter
from phi4mm_jax.runtime.engine import Engine
from phi4mm_jax.runtime.sampling import SamplingParams


@pytest.fixture
def fresh(steps, weights):
    return Engine(steps, weights, 4, 128)


def test_tokens_and_their_padding(fresh, run, text_prompt):
    """Chunks of 16 and 64, four rows; six tokens of an answer are one of the prefill and 4 + 1 of decode steps."""
    run(fresh, {"a": text_prompt(70), "b": text_prompt(5)}, SamplingParams(max_tokens=6, ignore_eos=True))
    counts = fresh.counts
    assert (counts.prefill_tokens, counts.prefill_computed) == (75, 64 + 16 + 16)
    assert (counts.decode_tokens, counts.decode_computed) == (2 * 5, 4 * 5)


def test_media_and_their_padding(fresh, run, prompts, model_config):
    asked = {name: prompt for name, prompt in prompts.items() if prompt.images or prompt.audios}
    run(fresh, asked, SamplingParams(max_tokens=1))
    images = [image for prompt in asked.values() for image in prompt.images]
    clips = [clip for prompt in asked.values() for clip in prompt.audios]
    counts = fresh.counts
    assert counts.crops <= sum(len(image.crops) for image in images)  # the same picture is encoded once
    assert counts.crops * model_config.vision.patches_per_side**2 == counts.patches_computed
    assert 0 < counts.patches < counts.patches_computed
    assert 0 < counts.audio_frames <= min(sum(len(c.features) for c in clips), counts.audio_frames_computed)


def test_device_time_is_charged_once(fresh, run, prompts):
    begun = time.perf_counter()
    run(fresh, prompts, SamplingParams(max_tokens=4))
    counts = fresh.counts
    parts = counts.encode_seconds, counts.prefill_seconds, counts.decode_seconds
    assert all(parts) and sum(parts) <= time.perf_counter() - begun


class Call:
    """The result of a call that is ready at some time."""

    def __init__(self, clock, at):
        self._clock, self._at = clock, at

    def block_until_ready(self):
        self._clock.now = max(self._clock.now, self._at)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_call_takes_the_time_since_the_one_before(monkeypatch):
    clock, counts = Clock(), Counts()
    monkeypatch.setattr("phi4mm_jax.runtime.counts.clock", clock)
    meter = Meter(counts)
    meter.made("encode", Call(clock, 3))
    clock.now = 1.0
    meter.made("prefill", Call(clock, 5))
    last = meter.made("decode", Call(clock, 6))
    meter.wait_for(last)
    clock.now = 10.0  # idle
    meter.made("decode", Call(clock, 12))
    meter.wait(leave=0)
    assert (counts.encode_seconds, counts.prefill_seconds, counts.decode_seconds) == (3, 2, 1 + 2)
