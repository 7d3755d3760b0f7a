"""What an evaluation ran on: versions of libraries, devices, processor and memory."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = ("phi4mm-jax", "jax", "jaxlib", "flax")


def versions() -> dict[str, str]:
    """Versions of Python and of what computes the answers."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _DISTRIBUTIONS}


def hardware(devices: int, kind: str) -> dict[str, Any]:
    """The machine.

    Args:
      devices: how many the model runs on.
      kind: what they are, as `jax.Device.device_kind`.
    """
    return {"devices": devices, "kind": kind, "processor": processor(), "cores": os.cpu_count(), "memory": _memory()}


def processor() -> str:
    """The name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory() -> int | None:
    """Bytes of the host, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return None
