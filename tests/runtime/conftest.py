"""The golden model under a small runtime configuration; programs are compiled once for the whole session."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import pytest

from phi4mm_jax.config import ModelConfig, RuntimeConfig
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.engine import Engine
from phi4mm_jax.runtime.mesh import create_mesh
from phi4mm_jax.runtime.rows import Event
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.runtime.steps import Steps, Weights
from phi4mm_jax.weights.loader import load

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS, LENGTH = 12, 128


@pytest.fixture(scope="session")
def runtime() -> RuntimeConfig:
    """Everything in float32; prompts of more than 64 tokens take several chunks."""
    return RuntimeConfig().override(
        dtypes={"params": "float32", "activations": "float32", "kv_cache": "float32", "matmul_precision": "highest"},
        engine={
            "max_batch": ROWS,
            "max_seq_len": 256,
            "batch_buckets": [1, 2, 4, 12],
            "cache_buckets": [LENGTH, 512],
            "prefill_buckets": [16, 64],
            "prefill_call_cost": 4,
            "prefill_block": 32,
            "crop_buckets": [1, 2, 4],
            "window_buckets": [1],
            "audio_buckets": [128, 256],
            "decode_steps": 4,
        },
    )


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
    return ModelConfig.from_checkpoint(GOLDEN / "hub")


@pytest.fixture(scope="session")
def load_weights() -> Callable[[Path, Steps], Weights]:
    """Loads a checkpoint for given steps."""

    def load_into(directory: Path, steps: Steps) -> Weights:
        shapes = steps.abstract()
        place = lambda path, value: jax.device_put(value, shapes[path].sharding)  # noqa: E731
        return steps.pack(load(directory, steps.model, shapes, place, progress=False)[0])

    return load_into


@pytest.fixture(scope="session")
def build(model_config, load_weights) -> Callable[[RuntimeConfig], tuple[Steps, Weights]]:
    """Builds the golden model under another configuration."""

    def build_under(runtime: RuntimeConfig) -> tuple[Steps, Weights]:
        steps = Steps(model_config, runtime, create_mesh(runtime.mesh))
        return steps, load_weights(GOLDEN / "hub", steps)

    return build_under


@pytest.fixture(scope="session")
def built(build, runtime) -> tuple[Steps, Weights]:
    return build(runtime)


@pytest.fixture(scope="session")
def steps(built) -> Steps:
    return built[0]


@pytest.fixture(scope="session")
def weights(built) -> Weights:
    return built[1]


@pytest.fixture(scope="session")
def session_engine(steps, weights) -> Engine:
    return Engine(steps, weights, ROWS, LENGTH)


@pytest.fixture
def engine(session_engine) -> Engine:
    """Twelve idle rows."""
    session_engine.reset()
    return session_engine


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "model.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def processor(model_config) -> Processor:
    return Processor.from_checkpoint(GOLDEN / "hub", model_config)


@pytest.fixture(scope="session")
def prompts(processor) -> dict[str, Prompt]:
    """Every golden case."""
    return {
        name: processor.raw(
            case["ids"],
            images=[GOLDEN / "media" / f"{image}.png" for image in case["images"]],
            audios=[GOLDEN / "media" / f"{clip}.wav" for clip in case["audios"]],
        )
        for name, case in json.loads((GOLDEN / "cases.json").read_text()).items()
    }


@pytest.fixture(scope="session")
def text_prompt(model_config) -> Callable[[int], Prompt]:
    """A text of so many tokens, always the same."""

    def of_length(length: int) -> Prompt:
        return Prompt(np.random.default_rng(length).integers(2, 490, length).astype(np.int32))

    return of_length


Run = Callable[..., dict[str, list[Event]]]


@pytest.fixture(scope="session")
def run() -> Run:
    """Serves named prompts to the end; returns each one's events."""

    def run_all(
        engine: Engine,
        prompts: Mapping[str, Prompt],
        params: SamplingParams | Mapping[str, SamplingParams],
        max_steps: int = 4,
    ) -> dict[str, list[Event]]:
        names = {}
        for name, prompt in prompts.items():
            own = params if isinstance(params, SamplingParams) else params[name]
            names[engine.submit(prompt, own)] = name
        events = {name: [] for name in prompts}
        while engine.busy:
            for event in engine.step(max_steps):
                events[names[event.request]].append(event)
        return events

    return run_all


@pytest.fixture(scope="session")
def tokens_of() -> Callable[[list[Event]], list[int]]:
    """All tokens of a request's events, whose last one alone is final."""

    def joined(events: list[Event]) -> list[int]:
        assert [event.finish_reason is None for event in events] == [True] * (len(events) - 1) + [False]
        return [token for event in events for token in event.token_ids]

    return joined
