"""Runs an application as a process: says where it listens, and ends well."""

from __future__ import annotations

import os
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from phi4mm_jax.api import Phi4MM
from phi4mm_jax.config import ConfigError
from phi4mm_jax.serving.app import create_app
from phi4mm_jax.serving.backend import Backend
from phi4mm_jax.serving.settings import ServerSettings


class Server(uvicorn.Server):
    """One application on one port."""

    def __init__(self, app: FastAPI, settings: ServerSettings, verbose: bool = False):
        """Prepares to listen.

        Args:
          app: from `create_app`.
          settings: where to listen and how long to wait for the last answers.
          verbose: log every request.
        """
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,  # uvicorn's own would close the handlers of whoever runs the server
            log_level="info" if verbose else "warning",
            timeout_graceful_shutdown=settings.drain_timeout_s,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen and says so."""
        await super().startup(sockets)
        if self.started:
            backend: Backend = self.config.app.state.backend
            capacity = backend.capacity
            print(
                f"{backend.model_names[0]} on {self.url}, {capacity.rows} rows x {capacity.context} tokens", flush=True
            )

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stops after what runs; a second Ctrl-C does not wait for anything."""
        if self.should_exit and sig == signal.SIGINT:
            os._exit(130)
        self.should_exit = True


def bind(settings: ServerSettings) -> socket.socket:
    """Takes the address, before anything is loaded; nobody can connect yet.

    Raises:
      ConfigError: it cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}") from None
    return listener


def serve(model: Phi4MM, settings: ServerSettings, listener: socket.socket, verbose: bool = False) -> None:
    """Serves a model until SIGINT or SIGTERM.

    Args:
      model: loaded.
      settings: of the server.
      listener: from `bind`.
      verbose: log every request.

    Raises:
      ConfigError, MemoryPlanError: see `create_app`.
    """
    Server(create_app(model, settings), settings, verbose).run([listener])
