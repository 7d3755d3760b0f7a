"""microsoft/Phi-4-multimodal-instruct in JAX: text, images and speech in, text out.

Public names load on first use, so that `import phi4mm_jax.processing` or `phi4mm --help` never imports JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi4mm_jax.api import Output, Phi4MM, Piece
    from phi4mm_jax.config import ModelConfig, RuntimeConfig
    from phi4mm_jax.runtime.sampling import SamplingParams

__all__ = ["ModelConfig", "Output", "Phi4MM", "Piece", "RuntimeConfig", "SamplingParams"]

_HOMES = {
    "ModelConfig": "config",
    "Output": "api",
    "Phi4MM": "api",
    "Piece": "api",
    "RuntimeConfig": "config",
    "SamplingParams": "runtime.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
