"""A live server on the loopback interface with the bundled model, shared by all tests of serving."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import openai
import pytest

from phi4mm_jax import Phi4MM
from phi4mm_jax.serving.app import create_app
from phi4mm_jax.serving.process import Server
from phi4mm_jax.serving.settings import ServerSettings

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
    """Starts another server on the same model: `with start(api_key="k") as other: other.url`."""
    return lambda **settings: running(model, **{"warm_up": False, **settings})


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
