"""What requests share: the beginnings of prompts, the embeddings of media, the time between dispatches."""

import dataclasses

import numpy as np
import pytest

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.engine import Engine
from phi4mm_jax.runtime.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
ROWS, LENGTH = 4, 256


@pytest.fixture
def fresh(steps, weights):
    """An engine that has seen nothing."""
    return Engine(steps, weights, ROWS, LENGTH)


@pytest.fixture(scope="module")
def alone(steps, weights, run, tokens_of):
    """The tokens of a prompt in an engine of its own."""

    def answer(prompt, params=GREEDY):
        return tokens_of(run(Engine(steps, weights, 1, LENGTH), {"row": prompt}, params)["row"])

    return answer


@pytest.fixture
def answer(fresh, run, tokens_of):
    """The tokens of a prompt, and how many tokens of it were not computed."""

    def ask(prompt, params=GREEDY):
        events = run(fresh, {"row": prompt}, params)["row"]
        return tokens_of(events), events[0].cached

    return ask


def text(seed, length):
    return np.random.default_rng(seed).integers(2, 490, length).astype(np.int32)


def joined(*parts):
    return Prompt(np.concatenate(parts))


def test_the_same_again(answer, alone):
    prompt = joined(text(0, 50))
    assert answer(prompt) == (alone(prompt), 0)
    assert answer(prompt) == (alone(prompt), 49)


def test_the_next_turn_of_a_conversation(fresh, answer, alone):
    first = joined(text(0, 30))
    said, _ = answer(first)
    second = joined(first.token_ids, said, text(1, 5))
    assert answer(second) == (alone(second), 37)  # all that was said but the last token, which was never run
    assert dataclasses.astuple(fresh.counts)[:4] == (30 + 43, 37, 0, 0)


def test_a_common_beginning_is_copied_and_both_stay(answer, alone):
    system = text(0, 40)
    prompts = [joined(system, text(seed, 60)) for seed in (1, 2, 1)]
    for prompt, expected in zip(prompts, (0, 40, 99), strict=True):
        assert answer(prompt) == (alone(prompt), expected)


def test_requests_that_come_together_share_too(fresh, run, tokens_of, alone):
    system = text(0, 40)
    prompts = {seed: joined(system, text(seed, 8)) for seed in range(1, 10)}
    events = run(fresh, prompts, GREEDY)
    assert {seed: tokens_of(e) for seed, e in events.items()} == {seed: alone(p) for seed, p in prompts.items()}
    assert [e[0].cached for e in events.values()] == [0] + [40] * 8


def test_a_row_is_used_while_it_is_decoding(fresh, alone):
    first, second = joined(text(0, 50)), joined(text(0, 50), text(1, 5))
    tokens = {fresh.submit(first, dataclasses.replace(GREEDY, max_tokens=40)): []}
    for event in fresh.step(2):
        tokens[event.request] += event.token_ids
    tokens[late := fresh.submit(second, GREEDY)] = []
    while fresh.busy:
        for event in fresh.step(2):
            tokens[event.request] += event.token_ids
            assert event.request != late or event.cached == 50
    assert list(tokens.values()) == [alone(first, dataclasses.replace(GREEDY, max_tokens=40)), alone(second)]


@pytest.mark.parametrize("other", ["switch_text", "text"])
def test_another_rope_regime_shares_nothing(answer, alone, other):
    """A row that crossed to the long factors holds other keys for the same tokens."""
    long = joined(text(0, 66))
    short = joined(text(0, 50))
    first, second = (long, short) if other == "text" else (short, long)
    assert answer(first) == (alone(first), 0)
    assert answer(second) == (alone(second), 0)


def test_what_crossed_over_is_gone_on_with(answer, alone):
    prompt = joined(text(0, 60))
    said, _ = answer(prompt)  # crosses 64 on the way
    second = joined(prompt.token_ids, said, text(1, 5))
    assert answer(second) == (alone(second), 67)


def with_text(prompt, seed, length=6):
    return dataclasses.replace(prompt, token_ids=np.concatenate([prompt.token_ids, text(seed, length)]))


@pytest.mark.parametrize("name", ["image_bottom", "audio", "image_audio"])
def test_the_same_media_in_another_question(fresh, answer, alone, prompts, name):
    first, second = with_text(prompts[name], 1), with_text(prompts[name], 2)
    assert answer(first) == (alone(first), 0)
    tokens, cached = answer(second)
    assert tokens == alone(second)
    assert cached == len(prompts[name].token_ids)
    media = len(first.images) + len(first.audios)
    assert dataclasses.astuple(fresh.counts)[2:4] == (2 * media, media)


def test_the_same_picture_elsewhere_is_not_encoded_again(fresh, answer, alone, prompts, steps, monkeypatch):
    """The beginnings differ, so the decoder runs anew; the encoder does not."""
    first = prompts["image_bottom"]
    assert answer(first)[1] == 0
    second = dataclasses.replace(first, token_ids=np.concatenate([text(3, 4), first.token_ids]))
    expected = alone(second)
    monkeypatch.setattr(steps, "encode_images", None)
    assert answer(second) == (expected, 0)


def test_other_media_of_the_same_size_share_nothing(answer, alone, processor):
    def prompt(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3)).astype(np.uint8)
        return with_text(processor.raw("<|image_1|>", [pixels]), 0)

    assert answer(prompt(1)) == (alone(prompt(1)), 0)
    tokens, cached = answer(prompt(2))
    assert tokens == alone(prompt(2))
    assert cached == 0


def test_the_adapter_is_part_of_it(answer, alone, prompts, model_config):
    """The same leading text before a picture and before speech is not the same to the decoder."""
    lead = text(0, 40)
    both = [
        dataclasses.replace(prompts[name], token_ids=np.concatenate([lead, prompts[name].token_ids]))
        for name in ("image_bottom", "audio")
    ]
    for prompt in (*both, joined(lead, text(1, 3))):
        assert answer(prompt) == (alone(prompt), 0)


def test_it_can_be_turned_off(build, runtime, run, tokens_of, alone):
    steps, weights = build(runtime.override(engine={"prefix_cache": False, "media_cache_mib": 0}))
    engine = Engine(steps, weights, ROWS, LENGTH)
    prompt = joined(text(0, 50))
    for _ in range(2):
        events = run(engine, {"row": prompt}, GREEDY)["row"]
        assert (tokens_of(events), events[0].cached) == (alone(prompt), 0)


def test_a_tight_cache_leaves_room_for_padding(steps, weights, run, tokens_of, alone):
    """What is left after a long beginning is padded to a chunk that would pass the end of the cache."""
    engine = Engine(steps, weights, 1, 129)
    first, second = joined(text(0, 114)), joined(text(0, 114), text(1, 5))
    for prompt, cached in ((first, 0), (second, 114)):
        events = run(engine, {"row": prompt}, GREEDY)["row"]
        assert (tokens_of(events), events[0].cached) == (alone(prompt), cached)


def test_cancelled_rows_leave_what_they_had_computed(fresh, answer, alone):
    prompt = joined(text(0, 200))
    gone = fresh.submit(prompt, GREEDY)
    fresh.step(1, max_calls=1)
    fresh.cancel(gone)
    tokens, cached = answer(prompt)
    assert tokens == alone(prompt)
    assert 0 < cached < 199


def test_a_request_ends_before_its_media_are_encoded(fresh, run, tokens_of, prompts, golden):
    """Another one with the same media does not wait for calls that were dropped."""
    gone = fresh.submit(prompts["image_audio"], GREEDY)
    fresh.step(1, max_calls=0)
    fresh.cancel(gone)
    assert not fresh.busy
    events = run(fresh, {"row": prompts["image_audio"]}, SamplingParams(max_tokens=16, ignore_eos=True))["row"]
    assert tokens_of(events) == golden["tokens/image_audio"].tolist()


def test_rows_decode_while_others_are_prepared(fresh, alone, prompts):
    """A long prompt and pictures come in pieces; the row that was there first gets a token with every step."""
    first = joined(text(0, 5))
    params = dataclasses.replace(GREEDY, max_tokens=24)
    tokens = {fresh.submit(first, params): []}
    (request,) = tokens
    while not tokens[request]:
        for event in fresh.step(1, 1):
            tokens[event.request] += event.token_ids
    late = {fresh.submit(p, GREEDY): p for p in (joined(text(1, 200)), prompts["image_audio"])}
    tokens |= {id: [] for id in late}
    while fresh.busy:
        before = len(tokens[request])
        waiting = [id for id in late if not tokens[id]]
        for event in fresh.step(1, 1):
            tokens[event.request] += event.token_ids
        if waiting and before < 24:
            assert len(tokens[request]) == before + 1
    assert tokens[request] == alone(first, params)
    assert {id: tokens[id] for id in late} == {id: alone(prompt) for id, prompt in late.items()}


def test_media_and_texts_take_turns(steps, weights, prompts):
    """While others decode, a picture is prepared however many texts come after it."""
    engine = Engine(steps, weights, 6, LENGTH)
    for seed in range(3):
        engine.submit(joined(text(seed, 5)), SamplingParams(max_tokens=100, ignore_eos=True))
    engine.step(1)
    engine.step(1, 1)
    picture = engine.submit(prompts["image_bottom"], GREEDY)
    for seed in range(3, 15):
        engine.submit(joined(text(seed, 10)), dataclasses.replace(GREEDY, max_tokens=1))
        if any(event.request == picture for event in engine.step(1, 1)):
            return
    pytest.fail("the picture still waits")


# --- shapes --------------------------------------------------------------------------------------------------


def test_resizing_in_the_middle(steps, weights, prompts, golden):
    """Rows of every kind go on in caches that grow, shrink and grow again."""
    engine = Engine(steps, weights, 6, 128)
    names = ["text", "image_bottom", "audio", "image_audio", "switch_text"]
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    ids = {engine.submit(prompts[name], params): name for name in names}
    tokens = {name: [] for name in names}
    shapes = iter([(12, 512), (5, 128), (8, 256)])
    while engine.busy:
        for event in engine.step(2, 1):
            tokens[ids[event.request]] += event.token_ids
        if shape := next(shapes, None):
            engine.resize(*shape)
            assert (engine.batch, engine.length) == shape
    assert tokens == {name: golden[f"tokens/{name}"].tolist() for name in names}


def test_resizing_keeps_what_was_used_last(fresh, answer, alone):
    prompts = [joined(text(seed, 50)) for seed in range(3)]
    for prompt in prompts:
        answer(prompt)
    fresh.resize(2, 128)
    assert answer(prompts[2]) == (alone(prompts[2]), 49)
    assert answer(prompts[1]) == (alone(prompts[1]), 49)
    assert answer(prompts[0]) == (alone(prompts[0]), 0)


# --- constraints ---------------------------------------------------------------------------------------------


class Only:
    """Allows given tokens, in order; ends with a stop token."""

    def __init__(self, tokens, vocab_size, fails_at=None):
        self._allowed, self._size, self._fails_at = list(tokens), vocab_size, fails_at
        self.accepted = []

    def mask(self):
        bits = np.zeros(-(-self._size // 32) * 32, np.uint8)
        bits[self._allowed[len(self.accepted)]] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token_id):
        assert token_id == self._allowed[len(self.accepted)]
        self.accepted.append(token_id)
        if len(self.accepted) == self._fails_at:
            raise ValueError("no way on")


@pytest.fixture
def only(steps):
    return lambda tokens, **settings: Only(tokens, steps.model.text.vocab_size, **settings)


def test_constrained_rows_beside_others(fresh, only, prompts, golden, model_config):
    """Each draws what it may, and the rest does not notice; one crosses to the long rope factors."""
    end = model_config.tokens.eos[0]
    params = SamplingParams(max_tokens=16)
    crossing = joined(text(0, 60))
    wanted = {"text": [9, 8, 7, end], "crossing": [*range(100, 110), end]}
    sampled = dataclasses.replace(params, temperature=1.0, seed=1, min_tokens=3, logprobs=2)
    ids = {
        fresh.submit(prompts["text"], params, only(wanted["text"])): "text",
        fresh.submit(crossing, sampled, only(wanted["crossing"])): "crossing",
        fresh.submit(prompts["audio"], dataclasses.replace(params, ignore_eos=True)): "audio",
    }
    events = {name: [] for name in ids.values()}
    while fresh.busy:
        for event in fresh.step(4):
            events[ids[event.request]].append(event)
    tokens = {name: [t for e in es for t in e.token_ids] for name, es in events.items()}
    assert tokens == wanted | {"audio": golden["tokens/audio"].tolist()}
    assert events["text"][-1].finish_reason == events["crossing"][-1].finish_reason == "stop"
    logprobs = [entry.logprob for event in events["crossing"] for entry in event.logprobs]
    assert max(logprobs) < -0.5  # of the model's own distribution, which knows no constraint


def test_a_constraint_that_fails_ends_its_row_alone(fresh, only, prompts, golden):
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    bad = fresh.submit(prompts["text"], params, only([9, 8, 7], fails_at=2))
    good = fresh.submit(prompts["audio"], params)
    tokens = {bad: [], good: []}
    errors = []
    while fresh.busy:
        for event in fresh.step(2):
            tokens[event.request] += event.token_ids
            errors += [(event.request, str(event.error))] if event.error else []
    assert errors == [(bad, "no way on")]
    assert tokens == {bad: [9, 8], good: golden["tokens/audio"].tolist()}
