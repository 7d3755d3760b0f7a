"""Compilations: kept on disk between processes, counted, and logged."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"


def enable_persistent_cache() -> None:
    """Keeps compiled programs in `~/.cache/phi4mm_jax/xla`, unless JAX already has a cache directory.

    The directory must be private to its user: JAX runs what lies in it.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(root / "phi4mm_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class CompileLog:
    """Number and seconds of the compilations seen so far."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def __call__(self, event: str, duration: float, **_: Any) -> None:
        """Listens to JAX."""
        if event == _COMPILED:
            self.count += 1
            self.seconds += duration
            logger.info("compiled a program in %.1f s", duration)


@contextmanager
def watch_compilations() -> Iterator[CompileLog]:
    """Counts the compilations (cache hits included) within a `with` block."""
    log = CompileLog()
    jax.monitoring.register_event_duration_secs_listener(log)
    try:
        yield log
    finally:
        jax.monitoring.unregister_event_duration_listener(log)
