"""Requests of many threads on one engine."""

import dataclasses
import queue
import threading

import numpy as np
import pytest

from phi4mm_jax import Phi4MM
from phi4mm_jax.answer import Output
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.limits import RequestError
from phi4mm_jax.runtime.memory import MemoryPlanError, plan_memory
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.service import QueueFullError, Request, RequestTimeoutError, Service

ENGINE = {
    "max_batch": 4,
    "max_seq_len": 1024,
    "batch_buckets": [1, 2, 4],
    "cache_buckets": [256, 1024],
    "decode_steps": 4,
}
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Phi4MM:
    return Phi4MM.from_pretrained("nano", dtype="float32", progress=False, engine=ENGINE)


@pytest.fixture
def service(model):
    return new_service(model)


def new_service(model, **settings):
    return Service(model.steps, model.weights, model.processor.tokenizer, **settings)


def prompt(seed, length=12):
    return Prompt(np.random.default_rng(seed).integers(2, 900, length).astype(np.int32))


class Caller:
    """Collects what a request receives."""

    def __init__(self, prompt, params=PARAMS, **settings):
        self.inbox = queue.SimpleQueue()
        self.request = Request(prompt=prompt, params=params, receive=self.inbox.put, **settings)

    def pieces(self):
        while True:
            piece = self.inbox.get(timeout=120)
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish_reason:
                return

    def tokens(self):
        return Output.of(list(self.pieces())).token_ids


@pytest.fixture(scope="module")
def alone(model):
    """Tokens of the prompts, one at a time."""
    found = {}

    def tokens(seed, params=PARAMS):
        if (seed, params.max_tokens) not in found:
            service, caller = new_service(model), Caller(prompt(seed), params)
            service.submit([caller.request])
            found[seed, params.max_tokens] = caller.tokens()
        return found[seed, params.max_tokens]

    return tokens


def test_requests_of_many_threads(service, alone):
    found = {}

    def ask(seed):
        caller = Caller(prompt(seed), streaming=seed % 2 == 0)
        service.submit([caller.request])
        found[seed] = caller.tokens()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: alone(seed) for seed in range(12)}


def test_the_thread_ends_with_the_work(service):
    caller = Caller(prompt(0))
    service.submit([caller.request])
    caller.tokens()
    service.release()
    assert not [thread for thread in threading.enumerate() if thread.name == "phi4mm-service"]
    load = service.load()
    assert dataclasses.astuple(load)[:5] == (0, 0, 0, 0, 0)
    assert (load.counts.prompt_tokens, load.counts.decode_tokens) == (12, 7)
    service.submit([caller.request])
    assert len(caller.tokens()) == 8


def test_one_that_fits_no_context_is_refused_with_its_companions(service):
    callers = [Caller(prompt(0)), Caller(prompt(1, 1100))]
    with pytest.raises(RequestError, match="1100 tokens"):
        service.submit([caller.request for caller in callers])
    assert service.load().waiting == 0


def test_a_longer_one_waits_for_a_longer_cache(service, alone):
    first, long, last = Caller(prompt(0)), Caller(prompt(1, 600)), Caller(prompt(2))
    service.submit([first.request])
    next(first.pieces())
    service.submit([long.request, last.request])
    assert len(long.tokens()) == 8
    assert last.tokens() == alone(2)
    assert service.load().length == 1024


def test_the_queue_has_an_end(model, alone):
    service = new_service(model, max_waiting=3)
    callers = [Caller(prompt(seed)) for seed in range(4)]
    with pytest.raises(QueueFullError, match="0 requests are waiting and 3 may"):
        service.submit([caller.request for caller in callers])
    service.submit([caller.request for caller in callers[:3]])
    assert [caller.tokens() for caller in callers[:3]] == [alone(seed) for seed in range(3)]


def test_cancelling(service, alone):
    endless = dataclasses.replace(PARAMS, max_tokens=900)
    gone, stays = Caller(prompt(0), endless, streaming=True), Caller(prompt(1))
    service.submit([gone.request, stays.request])
    next(gone.pieces())
    service.cancel(gone.request)
    assert stays.tokens() == alone(1)
    service.release()
    assert gone.inbox.qsize() < 100
    service.cancel(gone.request)  # once more does nothing
    again = Caller(prompt(1))
    service.submit([again.request])
    assert again.tokens() == alone(1)


def test_time_limit(service, alone):
    endless = dataclasses.replace(PARAMS, max_tokens=900)
    late, other = Caller(prompt(0), endless, timeout=0.05), Caller(prompt(1))
    service.submit([late.request, other.request])
    with pytest.raises(RequestTimeoutError, match=r"not finished within 0\.05 s"):
        late.tokens()
    assert other.tokens() == alone(1)


def test_what_fails_is_told_and_the_service_lives_on(service, alone, monkeypatch):
    callers = [Caller(prompt(seed)) for seed in range(2)]

    def fail(*_, **__):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("phi4mm_jax.runtime.engine.Engine.step", fail)
        service.submit([caller.request for caller in callers])
        for caller in callers:
            with pytest.raises(RuntimeError, match="out of luck"):
                caller.tokens()
    service.submit([callers[1].request])
    assert callers[1].tokens() == alone(1)


def test_no_memory(service, monkeypatch, alone):
    caller = Caller(prompt(0))
    with monkeypatch.context() as patch:
        patch.setattr("phi4mm_jax.service.available_memory", lambda device: 1000)
        service.submit([caller.request])
        with pytest.raises(MemoryPlanError, match="0.0 left"):
            caller.tokens()
    service.submit([caller.request])
    assert caller.tokens() == alone(0)


def test_memory_for_media_is_that_of_the_rows_and_not_of_all_that_wait(monkeypatch):
    model = Phi4MM.from_pretrained("nano", dtype="float32", progress=False, engine=ENGINE | {"media_cache_mib": 0})
    pictures = [np.full((64, 64, 3), shade, np.uint8) for shade in range(0, 240, 12)]
    prompts = [model.processor.raw("<|user|><|image_1|>What?<|end|><|assistant|>", images=[p]) for p in pictures]
    [media] = {found.images[0].num_tokens for found in prompts}
    plan = plan_memory(model.steps, 1, 256, media)
    enough = plan.total - plan.weights
    monkeypatch.setattr("phi4mm_jax.service.available_memory", lambda device: enough)
    service, callers = new_service(model), [Caller(prompt) for prompt in prompts]
    service.submit([caller.request for caller in callers])
    assert all(len(caller.tokens()) == 8 for caller in callers)


def test_stop_strings(service, model):
    said = Output.of(list(_pieces(service, PARAMS)))
    stop = said.text[2:4]
    cut = Output.of(list(_pieces(service, dataclasses.replace(PARAMS, stop=[stop]))))
    assert (cut.text, cut.finish_reason) == (said.text.split(stop)[0], "stop")


def _pieces(service, params):
    caller = Caller(prompt(3), params)
    service.submit([caller.request])
    return caller.pieces()


def test_reports_every_cache(model):
    plans = []
    service = new_service(model, shape=(2, 256), report=plans.append)
    for _ in range(2):
        caller = Caller(prompt(0))
        service.submit([caller.request])
        caller.tokens()
    assert [(plan.batch, plan.length) for plan in plans] == [(2, 256)]


def test_a_receiver_that_fails_ends_its_request_alone(service, alone):
    def fail(_):
        raise OSError("nobody is there")

    endless, good = dataclasses.replace(PARAMS, max_tokens=900), Caller(prompt(0))
    service.submit([Request(prompt=prompt(1), params=endless, receive=fail, streaming=True), good.request])
    assert good.tokens() == alone(0)
    service.release()
    assert service.load().counts.prompt_tokens == 24


def test_a_cache_that_cannot_be_made(service, alone, monkeypatch):
    """What the plan did not foresee ends the request that was to begin, and is not tried for ever."""

    def fail(*_):
        raise RuntimeError("out of memory")

    caller = Caller(prompt(0))
    with monkeypatch.context() as patch:
        patch.setattr("phi4mm_jax.service.Engine", fail)
        service.submit([caller.request])
        with pytest.raises(RuntimeError, match="out of memory"):
            caller.tokens()
    service.submit([caller.request])
    assert caller.tokens() == alone(0)


@pytest.fixture
def limited(service, model, monkeypatch):
    """Gives the device no more memory than a cache of some shape needs."""

    def limit(*shape, beyond=0):
        plan = plan_memory(model.steps, *shape)

        def available(_):
            load = service.load()
            taken = plan_memory(model.steps, load.rows, load.length).state if load.rows else 0
            return plan.total - plan.weights + beyond - taken

        monkeypatch.setattr("phi4mm_jax.service.available_memory", available)

    return limit


def test_what_no_memory_is_for_ends_alone(service, alone, limited):
    limited(1, 1024, beyond=-1)
    callers = [Caller(prompt(0)), Caller(prompt(1, 600)), Caller(prompt(2))]
    service.submit([caller.request for caller in callers])
    assert callers[0].tokens() == alone(0)
    with pytest.raises(MemoryPlanError):
        callers[1].tokens()
    assert callers[2].tokens() == alone(2)


def test_a_busy_cache_grows_as_far_as_memory_allows(service, model, alone, limited):
    first = Caller(prompt(0), dataclasses.replace(PARAMS, max_tokens=200), streaming=True)
    service.submit([first.request])
    pieces = first.pieces()
    next(pieces)
    limited(2, 256, beyond=plan_memory(model.steps, 1, 256).state)  # the old and the new one
    callers = [Caller(prompt(seed)) for seed in range(1, 4)]
    service.submit([caller.request for caller in callers])
    assert [caller.tokens() for caller in callers] == [alone(seed) for seed in range(1, 4)]
    assert service.load().rows == 2
    assert sum(len(piece.token_ids) for piece in pieces) == 199


def test_what_has_ended_can_be_asked_again(service, alone):
    caller = Caller(prompt(0))
    for _ in range(2):
        service.submit([caller.request])
        assert caller.tokens() == alone(0)
        service.release()
        service.cancel(caller.request)  # does nothing, now or later


def test_load_counts_what_has_a_row(service):
    callers = [Caller(prompt(seed, 100), dataclasses.replace(PARAMS, max_tokens=600)) for seed in range(12)]
    service.submit([caller.request for caller in callers])
    next(callers[0].pieces())
    load = service.load()
    assert (load.running, load.waiting, load.rows) == (4, 8, 4)
    assert 400 <= load.used < 1200
    for caller in callers:
        service.cancel(caller.request)
