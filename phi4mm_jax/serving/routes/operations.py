"""How the server is doing."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from phi4mm_jax.serving.backend import TheBackend

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health() -> dict[str, Any]:
    """Says that the server is alive."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(backend: TheBackend, response: Response) -> dict[str, Any]:
    """Says what the server is doing; 503 until its programs are compiled."""
    if not backend.ready:
        response.status_code = 503
        response.headers["Retry-After"] = "5"
    status = "ready" if backend.ready else "warming up"
    return {"status": status, **dataclasses.asdict(backend.service.load())}


@router.get("/metrics", response_class=Response)
async def metrics(backend: TheBackend) -> Response:
    """Counts everything, for Prometheus."""
    return Response(generate_latest(backend.metrics.registry), media_type=CONTENT_TYPE_LATEST)
