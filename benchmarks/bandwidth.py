"""What the memory of the device does, and how calls on it are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from phi4mm_jax.runtime.memory import bytes_per_device

T = TypeVar("T")


def cycled_bytes() -> int:
    """Of data that calls go through in turn: no cache holds it, and an accelerator takes about a millisecond."""
    return 150_000_000 if jax.default_backend() == "cpu" else 4_000_000_000


def programs(items: Sequence[T]) -> list[Sequence[T]]:
    """What one program works on: an item, or all on an accelerator, which else would wait for the host."""
    return [[item] for item in items] if jax.default_backend() == "cpu" else [items]


def seconds(run: Callable[..., Any], *args: Any) -> float:
    """Of a call; on an accelerator of several that are under way at once, divided by their number."""
    start = time.perf_counter()
    jax.block_until_ready([run(*args) for _ in range(_calls())])
    return (time.perf_counter() - start) / _calls()


def copy_bandwidth() -> float:
    """Bytes that this device reads and writes in a second when it goes through an array in place, at best."""
    x = jnp.zeros(cycled_bytes() // 8, jnp.int32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)  # new memory would cost a CPU more than the copy does
    x = step(x).block_until_ready()
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(_calls()):
            x = step(x)
        x.block_until_ready()
        best = min(best, (time.perf_counter() - start) / _calls())
    return 2 * x.nbytes / best


def step_bytes(leaves: Mapping[str, Any]) -> int:
    """Of weights, by path, that a decode step of text rows reads on a device: the decoder's without its adapters."""
    return bytes_per_device(
        [w for path, w in leaves.items() if path.startswith("text.") and path[-2:] not in ("_a", "_b")]
    )


def _calls() -> int:
    """That are under way at once."""
    return 1 if jax.default_backend() == "cpu" else 8
