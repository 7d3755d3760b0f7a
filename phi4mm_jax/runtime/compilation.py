"""Compilations: kept on disk between processes, counted, and logged."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)

SLOW_SECONDS = 1.0
"""Compilations that take this long are logged."""

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


def set_up_compilation() -> None:
    """Keeps compiled programs in `~/.cache/phi4mm_jax/xla`, unless JAX already has a cache directory; logs the slow.

    The directory must be private to its user: JAX runs what lies in it.
    """
    _log_slow_compilations()
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if jax.config.jax_compilation_cache_dir:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(root / "phi4mm_jax" / "xla"))


@cache
def _log_slow_compilations() -> None:
    """Logs, from now on, every program that takes long to compile or to fetch from the cache."""

    def log(event: str, duration: float, fun_name: str = "a program", **_: Any) -> None:
        if event == _COMPILED and duration >= SLOW_SECONDS:
            logger.info("compiled %s in %.1f s", fun_name, duration)

    jax.monitoring.register_event_duration_secs_listener(log)


class CompileCount:
    """The compilations seen so far, cache hits included: their number, and the seconds that they and lowering took."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def __call__(self, event: str, duration: float, **_: Any) -> None:
        """Listens to JAX."""
        self.count += event == _COMPILED
        if event in (_COMPILED, _LOWERED):
            self.seconds += duration


@cache
def _of_this_process() -> CompileCount:
    log = CompileCount()
    jax.monitoring.register_event_duration_secs_listener(log)
    return log


def clock() -> float:
    """Seconds on a clock that stands still while programs are compiled, or fetched from the cache."""
    compiled = _of_this_process().seconds
    return time.perf_counter() - compiled


@contextmanager
def watch_compilations() -> Iterator[CompileCount]:
    """Counts the compilations within a `with` block: what shows that no request compiles anything anew."""
    log = CompileCount()
    jax.monitoring.register_event_duration_secs_listener(log)
    try:
        yield log
    finally:
        jax.monitoring.unregister_event_duration_listener(log)
