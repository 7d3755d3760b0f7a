"""Sampling against a plain numpy implementation of every setting, and its independence of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi4mm_jax.runtime.sampling import (
    MAX_LOGPROBS,
    SamplingError,
    SamplingParams,
    SamplingState,
    _truncate,
    sample,
)

VOCAB, ROWS = 32, 1024
draw = jax.jit(sample, static_argnames="kind")
truncate = jax.jit(_truncate)


def state_of(params, *, prompt=(), answer=(), max_tokens=1000, stop_ids=()):
    """One row's state after the tokens `answer`."""
    row = SamplingState.row(params, np.array(prompt, np.int32), max_tokens, stop_ids, VOCAB)
    counts = np.bincount(np.array(answer, np.int64), minlength=VOCAB).astype(np.int32)
    return dataclasses.replace(row, counts=counts, drawn=np.int32(len(answer)))


def stack(states):
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *states)


def run(logits, states, kind="full"):
    tokens, goes_on, logprobs, after = draw(
        jnp.asarray(logits, jnp.float32), stack(states), jnp.ones(len(states), jnp.bool_), kind=kind
    )
    return np.asarray(tokens), np.asarray(goes_on), logprobs, after


def random_logits(seed=0):
    return np.random.default_rng(seed).normal(scale=3.0, size=(ROWS, VOCAB)).astype(np.float32)


# --- the plain implementation --------------------------------------------------------------------------------


def penalised(logits, params, prompt, answer):
    logits = logits.astype(np.float64).copy()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in set(prompt) | set(answer):
        repeated = logits[token] / params.repetition_penalty
        logits[token] = repeated if logits[token] > 0 else logits[token] * params.repetition_penalty
    for token in set(answer):
        logits[token] -= params.frequency_penalty * list(answer).count(token) + params.presence_penalty
    return logits


def distribution(logits, params):
    """Probabilities after temperature and truncation: top-k, then top-p of what is left, then min-p."""
    warm = logits.astype(np.float64) / params.temperature
    order = np.argsort(-warm, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(warm[order] - warm[order[0]])
    weights /= weights.sum()
    keep = np.cumsum(weights) - weights < params.top_p
    keep &= weights >= params.min_p * weights[0]
    out = np.zeros(VOCAB)
    out[order[keep]] = weights[keep] / weights[keep].sum()
    return out


# --- every setting -------------------------------------------------------------------------------------------

PENALTIES = {
    "none": {},
    "bias": {"logit_bias": {3: 4.0, 5: -100.0}},
    "presence": {"presence_penalty": 1.5},
    "negative presence": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.8},
    "weak repetition": {"repetition_penalty": 0.5},
    "all": {
        "logit_bias": {0: 2.0, 31: -3.0},
        "presence_penalty": 0.5,
        "frequency_penalty": -0.4,
        "repetition_penalty": 1.3,
    },
}


def test_penalties_and_bias():
    """Greedy choices over random logits and histories, all settings in one batch."""
    random = np.random.default_rng(1)
    logits, settings = random_logits(1), list(PENALTIES.values())
    states, expected = [], []
    for i in range(ROWS):
        params = SamplingParams(**settings[i % len(settings)])
        prompt, answer = (random.integers(0, VOCAB, random.integers(1, 20)).tolist() for _ in range(2))
        states.append(state_of(params, prompt=prompt, answer=answer))
        expected.append(int(np.argmax(penalised(logits[i], params, prompt, answer))))
    tokens, *_ = run(logits, states)
    np.testing.assert_array_equal(tokens, expected)
    assert np.mean(np.argmax(logits, axis=1) == expected) < 0.9  # they do change the choice


TRUNCATIONS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB + 10},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 8, "top_p": 0.8, "min_p": 0.05},
    {"top_k": 3, "top_p": 0.9, "temperature": 0.3},
    {},
]


def test_truncation_keeps_exactly_the_allowed_tokens():
    logits = random_logits(2)
    all_params = [SamplingParams(**({"temperature": 1.7} | TRUNCATIONS[i % len(TRUNCATIONS)])) for i in range(ROWS)]
    warm = logits / np.array([[params.temperature] for params in all_params], np.float32)
    kept = np.isfinite(truncate(jnp.asarray(warm), stack([state_of(params) for params in all_params])))
    for i, params in enumerate(all_params):
        np.testing.assert_array_equal(kept[i], distribution(logits[i], params) > 0, err_msg=str(params))


def test_ties_at_the_threshold_all_stay():
    """Equal logits are not told apart, so top-k never depends on the order of ids."""
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, :4] = 1.0
    kept = np.isfinite(truncate(jnp.asarray(logits), stack([state_of(SamplingParams(top_k=2))])))
    assert np.flatnonzero(kept[0]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 6},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.0, "logit_bias": {7: 3.0}, "presence_penalty": 1.0, "top_k": 12, "top_p": 0.9},
    ],
    ids=str,
)
def test_frequencies(settings):
    """4,096 draws follow the distribution: chi-square over tokens that are expected often enough."""
    params = SamplingParams(**settings)
    logits = random_logits(3)[0] / 2
    prompt, answer = [1, 2], [3, 3, 4]
    expected = distribution(penalised(logits, params, prompt, answer), params)
    counts = np.zeros(VOCAB)
    for batch in range(4):
        states = [
            state_of(dataclasses.replace(params, seed=batch * ROWS + i), prompt=prompt, answer=answer)
            for i in range(ROWS)
        ]
        tokens, *_ = run(np.tile(logits, (ROWS, 1)), states)
        counts += np.bincount(tokens, minlength=VOCAB)
    assert not counts[expected == 0].any()
    wanted = expected * counts.sum()
    often = wanted >= 5
    chi_square, freedom = ((counts - wanted)[often] ** 2 / wanted[often]).sum(), often.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_draws_are_independent_from_step_to_step():
    """One row's consecutive draws cover the distribution as different rows do, and do not repeat."""
    params = SamplingParams(temperature=1.0, seed=11)
    states = [dataclasses.replace(state_of(params), drawn=np.int32(i)) for i in range(ROWS)]
    tokens, *_ = run(np.zeros((ROWS, VOCAB)), states)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert ((counts - ROWS / VOCAB) ** 2 / (ROWS / VOCAB)).sum() < 31 + 4 * np.sqrt(62)


# --- seeds ---------------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_whatever_else_is_in_the_batch():
    logits = random_logits(4)
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=123)
    alone, *_ = run(np.tile(logits[0], (ROWS, 1)), [state_of(params)] * ROWS)
    assert len(set(alone.tolist())) == 1
    others = [state_of(SamplingParams(temperature=0.5 + i % 3, top_k=i % 9, seed=i)) for i in range(ROWS)]
    for place in (0, 17, ROWS - 1):
        mixed_logits, mixed = logits.copy(), others.copy()
        mixed_logits[place], mixed[place] = logits[0], state_of(params)
        tokens, *_ = run(mixed_logits, mixed)
        assert tokens[place] == alone[0]


def test_all_64_bits_of_a_seed_count():
    flat = np.zeros((ROWS, VOCAB))
    seeds = [5, 5 + 2**32, 5 + 2**63, -5, 2**64 - 5]
    first = [tuple(state_of(SamplingParams(temperature=1.0, seed=s)).seed.tolist()) for s in seeds]
    assert len(set(first)) == 4
    assert first[3] == first[4]  # negative seeds wrap
    tokens, *_ = run(flat, [state_of(SamplingParams(temperature=1.0, seed=i << 32)) for i in range(ROWS)])
    assert len(set(tokens.tolist())) == VOCAB


def test_without_a_seed_every_answer_differs():
    tokens, *_ = run(np.zeros((ROWS, VOCAB)), [state_of(SamplingParams(temperature=1.0)) for _ in range(ROWS)])
    assert len(set(tokens.tolist())) > VOCAB // 2


# --- ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["greedy", "full"])
def test_stop_tokens_minimum_and_limit(kind):
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[:, 9], logits[:, 4] = 5.0, 3.0
    plain = SamplingParams()
    states = [
        state_of(plain, stop_ids=(9, 30)),
        state_of(dataclasses.replace(plain, min_tokens=2), stop_ids=(9, 30)),  # first token: no stop yet
        state_of(dataclasses.replace(plain, min_tokens=2), answer=[4, 4], stop_ids=(9, 30)),
        state_of(plain, stop_ids=()),
        state_of(plain, max_tokens=1),
        state_of(plain, answer=[1, 1], max_tokens=4),
        state_of(plain, answer=[1, 1, 1], max_tokens=4),
    ]
    tokens, goes_on, _, after = run(logits, states + states[-1:] * (ROWS - len(states)), kind)
    assert tokens[:7].tolist() == [9, 4, 9, 9, 9, 9, 9]
    assert goes_on[:7].tolist() == [False, True, False, True, False, True, False]
    assert np.asarray(after.drawn)[:7].tolist() == [1, 1, 3, 1, 1, 3, 4]


def test_rows_that_sit_out_keep_their_history():
    states = [state_of(SamplingParams(temperature=1.0, seed=i), answer=[1, 2]) for i in range(ROWS)]
    before, running = stack(states), jnp.arange(ROWS) % 2 == 0
    tokens, _, _, after = draw(jnp.asarray(random_logits(5)), before, running, kind="full")
    changed = np.asarray(after.counts - before.counts)
    np.testing.assert_array_equal(changed.sum(axis=1), np.asarray(running))
    assert all(changed[i, tokens[i]] == 1 for i in range(0, ROWS, 2))
    np.testing.assert_array_equal(after.drawn - before.drawn, np.asarray(running))


# --- log-probabilities ---------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model():
    """Of the unmodified logits, whatever shapes the draw."""
    logits = random_logits(6)
    params = SamplingParams(temperature=0.7, top_k=4, logit_bias={3: 5.0}, repetition_penalty=1.5, logprobs=20, seed=1)
    tokens, _, logprobs, _ = run(logits, [state_of(params, prompt=[3])] * ROWS)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs.chosen, expected[np.arange(ROWS), tokens], atol=1e-5)
    order = np.argsort(-logits, axis=1)[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(logprobs.top_ids, order)
    np.testing.assert_allclose(logprobs.top, np.take_along_axis(expected, order, axis=1), atol=1e-5)


# --- what is accepted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", None),
        ("min_p", -0.1),
        ("min_p", 1.01),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 3),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("seed", 1.5),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 1),
        ("temperature", 1e308),
        ("repetition_penalty", 1e40),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {1: "much"}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", None),
        ("logit_bias", [1]),
    ],
)
def test_bad_values_are_named(name, value):
    with pytest.raises(SamplingError, match=name):
        SamplingParams(**{name: value})


def test_min_tokens_beyond_max_tokens():
    with pytest.raises(SamplingError, match="min_tokens = 5: must not exceed max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "greedy"),
        ({"top_k": 5, "top_p": 0.5, "seed": 1}, "greedy"),
        ({"temperature": 1}, "full"),
        ({"logprobs": 0}, "full"),
        ({"logit_bias": {1: 1}}, "full"),
        ({"presence_penalty": 1}, "full"),
        ({"frequency_penalty": 1}, "full"),
        ({"repetition_penalty": 1.1}, "full"),
    ],
)
def test_kind(settings, kind):
    assert SamplingParams(**settings).kind == kind
