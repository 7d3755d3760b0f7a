"""Logits of whole prompts against the original."""

import dataclasses

import numpy as np
import pytest

from phi4mm_jax.runtime.scoring import score

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}
CASES = [
    "text",
    "text_long",
    "image_bottom",
    "image_exact",
    "images",
    "audio",
    "audios",
    "image_audio",
    "image_audio_long",
    "switch_text",
    "switch_image_audio",
]


@pytest.mark.parametrize("name", CASES)
def test_logits_of_every_position(steps, weights, prompts, golden, name):
    logits = score(steps, weights, prompts[name])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, golden[f"logits/{name}"], **TOLERANCE)


def test_cases_are_complete(prompts):
    assert sorted(prompts) == sorted(CASES)


def test_the_last_tokens_do_not_change_the_first_logits(steps, weights, prompts):
    """Causal, across the border of two chunks."""
    prompt = prompts["switch_text"]
    shorter = dataclasses.replace(prompt, token_ids=prompt.token_ids[:20])
    np.testing.assert_allclose(score(steps, weights, shorter), score(steps, weights, prompt)[:20], **TOLERANCE)
