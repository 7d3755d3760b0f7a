"""Test session set-up: a strict JAX on eight host CPU devices, and the optional reference data.

`JAX_PLATFORMS=cuda,cpu pytest -m gpu` (or tpu) runs the tests that need an accelerator.
"""

import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

assert "jax" not in sys.modules, "the settings below take effect only before jax is imported"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Reruns compile little. A hit still counts as a compilation and has the same memory analysis. The size limit also
    # makes JAX lock the directory, so that parallel sessions never read half an entry.
    cache = Path(tempfile.gettempdir()) / f"phi4mm_jax-tests-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30)}


# The scripts of tools/ are run as `python -m tools.NAME`. Only they: the packages come from where they are installed.
tools = sys.modules["tools"] = ModuleType("tools")
tools.__path__ = [str(Path(__file__).parents[1] / "tools")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test marked `gpu` or `tpu` where the default backend is another."""
    for platform in ("gpu", "tpu"):
        if item.get_closest_marker(platform):
            import jax

            if jax.default_backend() != platform:
                pytest.skip(f"needs a {platform}; the default backend is {jax.default_backend()}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that is not part of the repository: $PHI4MM_SHARED, or `shared` beside the repository."""
    path = Path(os.environ.get("PHI4MM_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"no reference data at {path}")
    return path


@pytest.fixture(scope="session")
def oracle(shared: Path) -> Path:
    """Arrays and tiny checkpoints of the original model."""
    path = shared / "oracle"
    if not path.is_dir():
        pytest.skip(f"no oracle at {path}")
    return path


@pytest.fixture(scope="session", params=["ckpt_hub", "ckpt_native"])
def oracle_checkpoint(oracle: Path, request: pytest.FixtureRequest) -> Path:
    """The oracle's checkpoint directory, in each layout."""
    return oracle / request.param


@pytest.fixture(scope="session")
def released_tokenizer_directory(shared: Path) -> Path:
    """The tokenizer of the released checkpoint."""
    path = shared / "tokenizer"
    if not (path / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer at {path}")
    return path
