"""A live server on the loopback interface with the bundled model, shared by all tests of serving."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import openai
import pytest

from phi4mm_jax import Phi4MM
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serving.app import create_app
from phi4mm_jax.serving.grammar import Grammar, Grammars
from phi4mm_jax.serving.process import Server
from phi4mm_jax.serving.settings import ServerSettings

VOCAB_SIZE = 1024
"""Of the bundled model; more than its tokenizer has."""
ENGINE = {
    "max_batch": 4,
    "batch_buckets": [1, 2, 4],
    "cache_buckets": [1024, 2048],
    "prefill_buckets": [64, 256],
    "prefill_rows": 1,
    "crop_buckets": [1, 2],
    "window_buckets": [1],
    "audio_buckets": [1024, 4000],
    "decode_steps": 4,
}


@pytest.fixture(scope="session")
def model() -> Phi4MM:
    return Phi4MM.from_pretrained("nano", dtype="float32", progress=False, engine=ENGINE)


@contextlib.contextmanager
def running(model: Phi4MM, **settings) -> Iterator[Server]:
    """A server with these settings."""
    settings = ServerSettings(port=0, **settings)
    server = Server(create_app(model, settings), settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def start(model: Phi4MM) -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """Starts another server, on the same model or another: `with start(api_key="k") as other: other.url`."""
    return lambda **settings: running(**{"model": model, "warm_up": False, **settings})


@pytest.fixture(scope="session")
def server(start) -> Iterator[str]:
    """The base URL of a server."""
    with start() as live:
        yield live.url


@pytest.fixture(scope="session")
def client(server: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client of that server."""
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


# --- grammars ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The bundled model's."""
    return Tokenizer.from_checkpoint(Path(str(files("phi4mm_jax") / "assets" / "nano")))


@pytest.fixture(scope="session")
def eos(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.control_ids[name] for name in ("<|end|>", "<|endoftext|>")]


@pytest.fixture(scope="session")
def grammars(tokenizer: Tokenizer, eos: list[int]) -> Grammars:
    return Grammars(tokenizer, VOCAB_SIZE, eos)


@pytest.fixture(scope="session")
def draw(tokenizer: Tokenizer, eos: list[int]) -> Callable[[Grammar, int], list[int]]:
    """Draws an answer by random logits, which come to favour the end, so that there is one."""
    closing = [
        *eos,
        *(i for i in range(VOCAB_SIZE) if tokenizer.token_bytes(i) in (b'"', b"}", b"]", b"<|/tool_call|>")),
    ]

    def answer(grammar: Grammar, seed: int) -> list[int]:
        generator = np.random.default_rng(seed)
        constraint, drawn = grammar.constraint(), []
        for step in range(2000):
            mask = constraint.mask()
            assert mask.dtype == np.uint32 and mask.shape == (VOCAB_SIZE // 32,)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            logits = generator.gumbel(size=VOCAB_SIZE)
            logits[closing] += max(step - 60, 0) / 10
            token = int(allowed[np.argmax(logits[allowed])])
            constraint.accept(token)
            if token in eos:
                return drawn
            drawn.append(token)
        raise AssertionError(f"no end: {tokenizer.decode(drawn)[:500]!r}")

    return answer
