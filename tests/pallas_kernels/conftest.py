import jax
import pytest

from pallas_kernels.cpu import library


@pytest.fixture
def kernels(monkeypatch):
    """The compiled kernels; skips where there is no CPU or no compiler for it."""
    monkeypatch.delenv("PHI4MM_NATIVE", raising=False)
    if jax.default_backend() != "cpu" or library._compiler() is None:
        pytest.skip("no CPU kernels")
    assert library.available()


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(kernels, monkeypatch, request):
    """Each; a machine that lacks one takes the next narrower."""
    monkeypatch.setenv("PHI4MM_NATIVE", request.param)
