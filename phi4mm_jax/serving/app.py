"""Joins the endpoints to an application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from phi4mm_jax.api import Phi4MM
from phi4mm_jax.runtime.memory import MemoryPlanError
from phi4mm_jax.service import QueueFullError, RequestTimeoutError
from phi4mm_jax.serving.backend import Backend
from phi4mm_jax.serving.errors import INPUT_ERRORS, as_api_error
from phi4mm_jax.serving.guards import Guards, error_response
from phi4mm_jax.serving.routes import audio, chat, completions, models, operations, page, tokens
from phi4mm_jax.serving.settings import ServerSettings
from phi4mm_jax.serving.warmup import warm_up

logger = logging.getLogger(__name__)

_TOLD = (*INPUT_ERRORS, HTTPException, RequestValidationError, QueueFullError, RequestTimeoutError, MemoryPlanError)


def create_app(model: Phi4MM, settings: ServerSettings) -> FastAPI:
    """Makes the application that serves a model.

    Args:
      model: loaded; the application has a cache of its own beside the model's.
      settings: of the server.

    Raises:
      ConfigError, MemoryPlanError: rows and context cannot be had.
    """
    backend = Backend(model, settings)
    app = FastAPI(
        title=f"phi4mm_jax: {backend.model_names[0]}",
        description="Text, images and speech in, text out, through OpenAI's HTTP API.",
        version=version("phi4mm-jax"),
        lifespan=_lifespan,
    )
    app.state.backend = backend

    async def tell(_: Request, error: Exception) -> Response:
        return error_response(as_api_error(error), backend.metrics)

    for kind in (*_TOLD, Exception):
        app.add_exception_handler(kind, tell)
    app.add_middleware(
        Guards,
        api_key=settings.api_key,
        max_body_bytes=settings.max_body_bytes,
        max_held_bytes=settings.max_held_bytes,
        metrics=backend.metrics,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    for routes in (audio, chat, completions, models, operations, page, tokens):
        app.include_router(routes.router)
    app.mount("/static", StaticFiles(directory=page.DIRECTORY))
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Warms up beside the first requests; at the end waits for the service."""
    backend: Backend = app.state.backend
    backend.ready = not backend.settings.warm_up
    warming = asyncio.create_task(_warm_up(backend)) if backend.settings.warm_up else None
    try:
        yield
    finally:
        if warming:
            warming.cancel()
            await asyncio.wait([warming])
        await asyncio.to_thread(backend.close)


async def _warm_up(backend: Backend) -> None:
    try:
        await warm_up(backend, partial(print, file=sys.stderr, flush=True))
    except Exception:
        logger.exception("the warm-up failed; the server will not say that it is ready")
