"""Guessed tokens change how fast an answer comes, and nothing else."""

import dataclasses

import jax
import numpy as np
import pytest

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.engine import Engine
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.runtime.speculation import guess

ROWS, LENGTH = 6, 160
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),  # the last two stood there before
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # the latest occurrence
        ([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], [3, 8, 1]),  # rather three tokens than two
        ([1, 2, 1, 2], [1, 2, -1]),  # what follows has to be known
        ([7, 7, 7], [7, -1, -1]),
        ([1, 2, 3, 2], [-1, -1, -1]),  # one token is not enough
        ([5], [-1, -1, -1]),
    ],
)
def test_guess(tokens, expected):
    history = np.full((2, 16), 3, np.int32)  # what lies behind is old and means nothing
    history[0, : len(tokens)] = tokens
    found = jax.jit(guess, static_argnums=2)(history, np.array([len(tokens) - 1, 0], np.int32), 3)
    assert found[0].tolist() == expected


@pytest.fixture(scope="module")
def guessing(build, runtime):
    return build(runtime.override(engine={"guessed_tokens": 3, "prefix_cache": False}))


@pytest.fixture(scope="module")
def cases(prompts, text_prompt):
    """Prompts of every kind, one that repeats itself, and two that cross to the long rope factors."""
    repeating = Prompt(np.tile(np.array([11, 12, 13, 14, 15], np.int32), 6))
    return dict(prompts) | {"repeating": repeating, "crossing": text_prompt(58)}


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        dataclasses.replace(GREEDY, ignore_eos=False, min_tokens=3, max_tokens=7),
        dataclasses.replace(GREEDY, temperature=0.4, seed=5, presence_penalty=0.3, logprobs=2),
    ],
    ids=["greedy", "short", "sampled"],
)
def test_the_answers_are_the_same(guessing, steps, weights, cases, run, params):
    plain = run(Engine(steps, weights, ROWS, LENGTH), cases, params)
    quick = run(Engine(*guessing, ROWS, LENGTH), cases, params)
    for name in cases:
        of = [[t for event in events[name] for t in event.token_ids] for events in (plain, quick)]
        assert of[0] == of[1], name
        assert plain[name][-1].finish_reason == quick[name][-1].finish_reason
        if params.logprobs:
            found = [[x.logprob for e in events[name] for x in e.logprobs] for events in (plain, quick)]
            np.testing.assert_allclose(*found, atol=2e-4)


def test_right_guesses_save_steps(guessing, steps, weights, run):
    """An untrained model soon repeats itself, which is guessed."""
    prompt = {"row": Prompt(np.tile(np.array([11, 12, 13, 14, 15], np.int32), 6))}
    plain = run(Engine(steps, weights, 1, LENGTH), prompt, GREEDY, max_steps=1)["row"]
    quick = run(Engine(*guessing, 1, LENGTH), prompt, GREEDY, max_steps=1)["row"]
    assert len(plain) == 40
    assert len(quick) < 30


def test_the_cache_has_room_for_guesses(guessing, text_prompt, run, tokens_of):
    """With not one position to spare, in the last steps too."""
    from phi4mm_jax.runtime.limits import cache_length

    prompt = text_prompt(20)
    engines = [Engine(*guessing, 1, size) for size in (cache_length(guessing[0], prompt, 40), LENGTH)]
    tight, wide = (tokens_of(run(engine, {"row": prompt}, GREEDY)["row"]) for engine in engines)
    assert tight == wide


def test_a_shorter_cache_keeps_nothing_where_guesses_are_written(build, runtime, run, tokens_of):
    """Rows that sit out write guesses to scratch; once the cache grows again, these positions count."""
    engine = Engine(*build(runtime.override(engine={"guessed_tokens": 3})), 2, 256)
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)
    rng = np.random.default_rng(0)
    prompt, other = ({"row": Prompt(rng.integers(2, 490, n).astype(np.int32))} for n in (150, 30))
    first = run(engine, prompt, params)["row"]
    engine.resize(2, 128)
    run(engine, other, params)
    engine.resize(2, 256)
    again = run(engine, prompt, params)["row"]
    assert again[0].cached == 128 - 4
    assert tokens_of(again) == tokens_of(first)
    np.testing.assert_allclose(*([x.logprob for e in es for x in e.logprobs] for es in (again, first)), atol=2e-4)
