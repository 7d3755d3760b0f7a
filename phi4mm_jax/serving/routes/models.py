"""Which models there are."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from phi4mm_jax.serving.backend import Backend, TheBackend

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def models(backend: TheBackend) -> dict[str, Any]:
    """Lists the names that the model answers to."""
    return {"object": "list", "data": [_model(name, backend) for name in backend.model_names]}


@router.get("/v1/models/{name:path}")
async def model(name: str, backend: TheBackend) -> dict[str, Any]:
    """Describes one of them."""
    backend.check_model(name)
    return _model(name, backend)


def _model(name: str, backend: Backend) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": backend.created,
        "owned_by": "phi4mm_jax",
        "max_model_len": backend.capacity.context,
    }
