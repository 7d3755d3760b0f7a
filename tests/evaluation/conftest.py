from pathlib import Path

import pytest

from phi4mm_jax.api import Phi4MM
from tools.nano.evaluation_sets import main

HELD_OUT = Path(__file__).parents[1] / "nano" / "heldout"


@pytest.fixture(scope="session")
def nano() -> Phi4MM:
    """The bundled model in float32."""
    return Phi4MM.from_pretrained("nano", dtype="float32", progress=False)


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of every kind of task, made of cases that are held out, and `custom` with JSONL beside its media."""
    path = tmp_path_factory.mktemp("data") / "sets"
    main([str(path), "--cases", str(HELD_OUT)])
    return path
