"""Continuous batching: every request's tokens are its own, whatever happens in the other rows."""

import dataclasses

import numpy as np
import pytest
from jax.nn import log_softmax

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.engine import Engine, RequestError, answer_limit, cache_length
from phi4mm_jax.runtime.sampling import SamplingError, SamplingParams
from phi4mm_jax.runtime.scoring import score

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
SAMPLED = SamplingParams(
    max_tokens=16,
    ignore_eos=True,
    temperature=1.0,
    top_p=0.9,
    top_k=50,
    seed=7,
    logprobs=3,
    presence_penalty=0.5,
    repetition_penalty=1.1,
)


@pytest.fixture(scope="module")
def sampled_alone(session_engine, prompts, run):
    """Sampled answers of every case, one at a time."""
    return {name: run(session_engine, {name: prompt}, SAMPLED)[name] for name, prompt in prompts.items()}


@pytest.mark.parametrize("name", ["text", "image_bottom", "audio", "image_audio", "switch_text", "switch_image_audio"])
def test_tokens_match_the_original_one_at_a_time(engine, prompts, golden, run, tokens_of, name):
    events = run(engine, {name: prompts[name]}, GREEDY)[name]
    assert tokens_of(events) == golden[f"tokens/{name}"].tolist()
    assert events[-1].finish_reason == "length"


@pytest.mark.parametrize("max_steps", [1, 4])
def test_tokens_match_the_original_in_one_mixed_batch(engine, prompts, golden, run, tokens_of, max_steps):
    """Text, images and speech under both rope regimes, two rows crossing from one to the other as the rest go on."""
    for name, events in run(engine, prompts, GREEDY, max_steps).items():
        assert tokens_of(events) == golden[f"tokens/{name}"].tolist(), name


def test_more_requests_than_rows(engine, prompts, golden, run, tokens_of):
    """Rows that become free are taken by waiting requests, of other adapters and regimes."""
    twice = {(name, i): prompt for i in range(2) for name, prompt in prompts.items()}
    limits = {key: dataclasses.replace(GREEDY, max_tokens=5 + n % 11) for n, key in enumerate(twice)}
    assert len(twice) > engine.batch
    for (name, i), events in run(engine, twice, limits).items():
        assert tokens_of(events) == golden[f"tokens/{name}"][: limits[name, i].max_tokens].tolist(), name


def test_sampled_tokens_do_not_depend_on_the_batch(engine, prompts, run, tokens_of, sampled_alone):
    together = run(engine, prompts, SAMPLED)
    for name, events in together.items():
        assert tokens_of(events) == tokens_of(sampled_alone[name]), name
        logprobs = [[x.logprob for e in es for x in e.logprobs] for es in (events, sampled_alone[name])]
        np.testing.assert_allclose(*logprobs, atol=2e-4)


def test_greedy_and_sampled_rows_share_a_batch(engine, prompts, golden, run, tokens_of, sampled_alone):
    params = {name: SAMPLED if i % 2 else GREEDY for i, name in enumerate(prompts)}
    for name, events in run(engine, prompts, params).items():
        if params[name] is GREEDY:
            assert tokens_of(events) == golden[f"tokens/{name}"].tolist()
            assert all(event.logprobs is None for event in events)
        else:
            assert tokens_of(events) == tokens_of(sampled_alone[name])


def check_against_one_forward(steps, weights, prompt, events):
    """Every step's log-probabilities, as drawn from the cache, are those of one forward pass over the sequence."""
    switch = steps.model.text.original_max_position_embeddings
    drawn = [token for event in events for token in event.token_ids]
    logprobs = [entry for event in events for entry in event.logprobs]
    ids = np.concatenate([prompt.token_ids, np.array(drawn[:-1], np.int32)])
    rows = {}
    if len(prompt.token_ids) <= switch:
        rows |= enumerate(score(steps, weights, dataclasses.replace(prompt, token_ids=ids[:switch])))
    if len(ids) > switch:
        long = score(steps, weights, dataclasses.replace(prompt, token_ids=ids))
        rows |= {i: row for i, row in enumerate(long) if i >= switch or len(prompt.token_ids) > switch}
    for step, entry in enumerate(logprobs):
        expected = np.asarray(log_softmax(rows[len(prompt.token_ids) - 1 + step]))
        assert entry.token_id == drawn[step]
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=2e-4)
        ids_found, values = zip(*entry.top, strict=True)
        np.testing.assert_allclose(values, expected[list(ids_found)], atol=2e-4)
        np.testing.assert_allclose(values, np.sort(expected)[::-1][: len(values)], atol=2e-4)


def test_a_mixed_batch_has_the_logits_of_each_row_alone(engine, steps, weights, prompts, run):
    events = run(engine, prompts, dataclasses.replace(GREEDY, logprobs=20))
    for name, prompt in prompts.items():
        check_against_one_forward(steps, weights, prompt, events[name])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 62, 63, 64, 65, 80])
def test_prompt_lengths_at_borders(engine, steps, weights, text_prompt, run, tokens_of, length):
    """One token, the chunk sizes, and the end of the short rope factors (64), each with one more and one less."""
    prompt = text_prompt(length)
    events = run(engine, {"row": prompt}, dataclasses.replace(GREEDY, max_tokens=6, logprobs=5))["row"]
    assert len(tokens_of(events)) == 6
    check_against_one_forward(steps, weights, prompt, events)


def test_limits(engine, prompts, golden, run, tokens_of):
    """Rows end on their own; the end is told with the last token."""
    params = {name: dataclasses.replace(GREEDY, max_tokens=n + 1) for n, name in enumerate(prompts)}
    for n, (name, events) in enumerate(run(engine, prompts, params).items()):
        assert tokens_of(events) == golden[f"tokens/{name}"][: n + 1].tolist()


def test_stop_tokens(engine, prompts, model_config, run, tokens_of):
    end = model_config.tokens.eos[-1]
    bias = {end: 100.0}
    base = SamplingParams(max_tokens=9, logit_bias=bias)
    params = {
        "at once": base,
        "not before": dataclasses.replace(base, min_tokens=3),
        "ignored": dataclasses.replace(base, ignore_eos=True),
    }
    rows = run(engine, dict.fromkeys(params, prompts["text"]), params)
    assert tokens_of(rows["at once"]) == [end]
    assert rows["at once"][-1].finish_reason == "stop"
    late = tokens_of(rows["not before"])
    assert len(late) == 4
    assert late.index(end) == 3
    assert not set(late[:3]) & set(model_config.tokens.eos)
    assert tokens_of(rows["ignored"]) == [end] * 9
    assert rows["ignored"][-1].finish_reason == "length"


def test_cancel(engine, prompts, golden, run, tokens_of):
    """A running and a waiting request end without a word; their neighbours and successors do not notice."""
    names = list(prompts) + ["text", "audio"]
    ids = [engine.submit(prompts[name], GREEDY) for name in names]
    waiting = ids[-1]
    tokens = {request: [] for request in ids}
    cancelled = None
    while engine.busy:
        for event in engine.step(1):
            assert event.request not in (cancelled, waiting)
            tokens[event.request] += event.token_ids
        if cancelled is None and len(tokens[ids[2]]) > 3:
            cancelled = ids[2]
            engine.cancel(cancelled)
            engine.cancel(waiting)
            extra = engine.submit(prompts["image_audio"], GREEDY)
            ids, names, tokens[extra] = [*ids, extra], [*names, "image_audio"], []
    for request, name in zip(ids, names, strict=True):
        if request not in (cancelled, waiting):
            assert tokens[request] == golden[f"tokens/{name}"].tolist()
    assert 3 < len(tokens[cancelled]) < 16
    engine.cancel(cancelled)  # what is over cannot be cancelled again


def test_reset(engine, prompts, golden, run, tokens_of):
    for prompt in prompts.values():
        engine.submit(prompt, SAMPLED)
    engine.step(1)
    engine.reset()
    assert not engine.busy
    assert engine.step(1) == []
    events = run(engine, {"text": prompts["text"]}, GREEDY)
    assert tokens_of(events["text"]) == golden["tokens/text"].tolist()


def test_times(engine, prompts, run):
    (events,) = run(engine, {"text": prompts["text"]}, GREEDY, max_steps=1).values()
    received = [event.received for event in events]
    assert len({event.admitted for event in events}) == 1
    assert events[0].admitted < received[0]
    assert received == sorted(received)


@pytest.mark.parametrize(
    ("length", "max_tokens", "message"),
    [
        (0, 1, "prompt: has no tokens"),
        (256, None, "prompt: 256 tokens leave no room for an answer"),
        (300, 1, "prompt: 300 tokens leave no room"),
        (250, 7, "max_tokens = 7: with a prompt of 250 tokens.*256.*at most 6"),
        (120, 8, "need 129 cache positions; this engine has 128"),
    ],
)
def test_what_cannot_fit_is_refused(engine, text_prompt, length, max_tokens, message):
    prompt = text_prompt(length) if length else Prompt(np.zeros(0, np.int32))
    with pytest.raises(RequestError, match=message):
        engine.submit(prompt, SamplingParams(max_tokens=max_tokens))
    assert not engine.busy


def test_limits_without_max_tokens(steps, text_prompt):
    assert answer_limit(steps, text_prompt(200), SamplingParams()) == 56
    assert answer_limit(steps, text_prompt(200), SamplingParams(max_tokens=56)) == 56


def test_logit_bias_outside_the_vocabulary(steps, text_prompt):
    vocab_size = steps.model.text.vocab_size
    with pytest.raises(SamplingError, match=f"logit_bias names token {vocab_size}.*0 to {vocab_size - 1}"):
        answer_limit(steps, text_prompt(3), SamplingParams(logit_bias={vocab_size: 1.0}))


@pytest.mark.parametrize(
    ("length", "max_tokens", "expected"),
    [
        (20, 4, 33),  # chunks of 16 + 16
        (20, 30, 51),  # prompt and answer
        (60, 4, 65),  # ends right at the switch: never rebuilt
        (60, 6, 81),  # rebuilt from 65 tokens: chunks of 64 + 16
        (64, 2, 81),
        (65, 1, 81),
    ],
)
def test_cache_length(steps, text_prompt, length, max_tokens, expected):
    assert cache_length(steps, text_prompt(length), max_tokens) == expected


@pytest.mark.parametrize("max_tokens", [1, 4, 5, 12])
def test_the_cache_length_is_enough(steps, weights, text_prompt, run, tokens_of, max_tokens):
    """With not one position to spare, a row that is rebuilt and its neighbour are right."""
    row = {"a": text_prompt(60), "b": text_prompt(20)}
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    tight = Engine(steps, weights, 2, max(cache_length(steps, p, max_tokens) for p in row.values()))
    wide = Engine(steps, weights, 2, 128)
    assert {n: tokens_of(e) for n, e in run(tight, row, params).items()} == {
        n: tokens_of(e) for n, e in run(wide, row, params).items()
    }
