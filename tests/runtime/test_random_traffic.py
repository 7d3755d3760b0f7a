"""Random traffic: whatever comes, goes, shares, crosses and is moved, each answer is that of its request alone."""

import dataclasses

import numpy as np
import pytest

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.engine import Engine
from phi4mm_jax.runtime.limits import cache_length
from phi4mm_jax.runtime.sampling import SamplingParams

LENGTH = 256
SHAPES = [(3, 150), (5, 256)]
LONGEST = 120
"""Tokens of a prompt that may stay in every shape."""
MEDIA = ["image_bottom", "audio", "image_audio", "images", "switch_image_audio"]


class Picky:
    """Allows a third of the vocabulary, another one after each token; now and then fails."""

    def __init__(self, seed, vocab_size, fails_at=None):
        self._seed, self._size, self._fails_at, self._told = seed, vocab_size, fails_at, []

    def _bits(self):
        return np.random.default_rng([self._seed, *self._told]).random(-(-self._size // 32) * 32) < 0.3

    def mask(self):
        return np.packbits(self._bits(), bitorder="little").view(np.uint32)

    def accept(self, token_id):
        assert self._bits()[token_id]
        self._told.append(token_id)
        if len(self._told) == self._fails_at:
            raise ValueError("no way on")


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, and what makes its constraint anew."""

    prompt: Prompt
    params: SamplingParams
    picky: tuple[int, int | None] | None = None

    def submit(self, engine, vocab_size):
        constraint = Picky(self.picky[0], vocab_size, self.picky[1]) if self.picky else None
        return engine.submit(self.prompt, self.params, constraint)


class Traffic:
    """Draws requests that have much in common, and keeps what each has to answer."""

    def __init__(self, rng, prompts, steps, weights):
        self._rng, self.vocab_size = rng, steps.model.text.vocab_size
        self._media_ids = (steps.model.tokens.image, steps.model.tokens.audio)
        self._alone = Engine(steps, weights, 1, LENGTH)
        systems = [rng.integers(2, 490, length).astype(np.int32) for length in (36, 50, 61, 64, 65, 90)]
        self._begun = [Prompt(ids) for ids in systems] + [prompts[name] for name in MEDIA]

    def case(self, room):
        """Another request, which needs no more than so many positions."""
        rng = self._rng
        prompt = self._begun[rng.integers(len(self._begun))]
        more = int(rng.choice([0, 1, 4, 13, 20, 60]))
        limit = max(len(prompt.token_ids), LONGEST, int(rng.choice([LONGEST, room - 40])))
        ids = np.concatenate([prompt.token_ids, rng.integers(2, 490, more).astype(np.int32)])
        prompt = dataclasses.replace(prompt, token_ids=ids[:limit])
        params = SamplingParams(max_tokens=int(rng.integers(1, 24)), ignore_eos=bool(rng.random() < 0.8))
        if rng.random() < 0.3:
            params = dataclasses.replace(
                params, temperature=0.8, seed=int(rng.integers(99)), presence_penalty=0.5, logprobs=1
            )
        picky = None
        if rng.random() < 0.2:
            picky = int(rng.integers(1 << 30)), int(rng.integers(1, 12)) if rng.random() < 0.3 else None
        return Case(prompt, params, picky)

    def answer(self, case):
        """What it gets in an engine without anything else; now and then begins a conversation."""
        request, answer = case.submit(self._alone, self.vocab_size), Answer()
        while self._alone.busy:
            for event in self._alone.step(4):
                assert event.request == request
                answer.take(event)
        ids = np.concatenate([case.prompt.token_ids, np.array(answer.tokens, np.int32)])
        if len(ids) < LONGEST - 10 and self._rng.random() < 0.3 and not np.isin(answer.tokens, self._media_ids).any():
            self._begun.append(dataclasses.replace(case.prompt, token_ids=ids))
        return answer


@dataclasses.dataclass
class Answer:
    """All that is said of a request."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    end: str | None = None

    def take(self, event):
        """Adds to it."""
        assert self.end is None
        self.tokens += event.token_ids
        self.logprobs += [entry.logprob for entry in event.logprobs or ()]
        self.end = str(event.error) if event.error else event.finish_reason


def check(seed, count, plain, tested, prompts, shapes=SHAPES):
    """Serves `count` requests in an engine of `tested` and compares each with its answer by `plain`."""
    rng = np.random.default_rng(seed)
    traffic = Traffic(rng, prompts, *plain)
    engine = Engine(*tested, *shapes[rng.integers(len(shapes))])
    cases, wanted, found, gone = {}, {}, {}, set()
    turns = 0
    while len(cases) < count or engine.busy:
        turns += 1
        assert turns < 200 * count
        for _ in range(int(rng.choice([0, 0, 1, 1, 4])) if len(cases) < count else 0):
            case = traffic.case(engine.length)
            request = case.submit(engine, traffic.vocab_size)
            cases[request], wanted[request], found[request] = case, traffic.answer(case), Answer()
        unfinished = [request for request in cases if not found[request].end and request not in gone]
        if unfinished and rng.random() < 0.08:
            gone.add(unfinished.pop(rng.integers(len(unfinished))))
            for request in gone:
                engine.cancel(request)
        rows, length = shapes[rng.integers(len(shapes))]
        needed = [cache_length(tested[0], cases[r].prompt, cases[r].params.max_tokens) for r in unfinished]
        if rng.random() < 0.1 and engine.running <= rows and max(needed, default=0) <= length:
            engine.resize(rows, length)
        for event in engine.step(int(rng.choice([1, 2, 4])), (None, 1, 1, 2)[rng.integers(4)]):
            assert event.request not in gone
            assert 0 <= event.cached < len(cases[event.request].prompt.token_ids)
            found[event.request].take(event)
    for request, case in cases.items():
        answer, expected = found[request], wanted[request]
        if request in gone:
            expected = dataclasses.replace(expected, tokens=expected.tokens[: len(answer.tokens)], end=None)
        assert (answer.tokens, answer.end) == (expected.tokens, expected.end), (seed, request, case)
        same = len(answer.logprobs)
        np.testing.assert_allclose(answer.logprobs, expected.logprobs[:same], atol=1e-3, err_msg=f"{seed}, {request}")
    return turns, engine.counts


@pytest.mark.slow  # dozens of shapes to compile
@pytest.mark.parametrize("guessed", [0, 3])
def test_random_traffic(build, runtime, prompts, guessed):
    off = {"prefix_cache": False, "media_cache_mib": 0}
    plain = build(runtime.override(engine=off))
    tested = build(runtime.override(engine={"guessed_tokens": guessed, "prefill_rows": 2, "stream_chunk": 16}))
    for seed in range(2):
        _, counts = check(seed, 30, plain, tested, prompts)
        assert counts.cached_tokens
