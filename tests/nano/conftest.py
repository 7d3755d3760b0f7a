import pytest

from phi4mm_jax.api import Phi4MM


@pytest.fixture(scope="session")
def nano() -> Phi4MM:
    """The bundled model in float32."""
    return Phi4MM.from_pretrained("nano", dtype="float32", progress=False)
