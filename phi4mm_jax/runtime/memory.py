"""The memory plan: what a configuration will hold, checked before anything is allocated."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from phi4mm_jax.runtime.placement import placed_shape
from phi4mm_jax.runtime.steps import Steps

GIB = 2**30


class MemoryPlanError(ValueError):
    """The plan does not fit; the message says by how much and which setting to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes per device."""

    weights: int
    """Parameters."""
    cache: int
    """Keys and values of all rows."""
    sampling: int
    """Per-row settings and history over the vocabulary."""
    media: int
    """Encoded pictures and speech: of rows that may have to be run again, and the latest of others."""
    workspace: int
    """Estimate of the largest program's temporaries."""
    batch: int
    """Rows that the cache is for."""
    length: int
    """Positions per row."""

    @property
    def state(self) -> int:
        """What an engine holds while it is idle."""
        return self.cache + self.sampling

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.sampling + self.media + self.workspace

    def __str__(self) -> str:
        parts = ("weights", "cache", "sampling", "media", "workspace", "total")
        sizes = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in parts)
        return f"{self.batch} x {self.length} tokens, GiB per device: {sizes}"

    def check(self, available: int | None, weights_loaded: bool = False) -> None:
        """Compares the plan with what the device has left.

        Args:
          available: bytes free on the device, None if unknown (no check).
          weights_loaded: whether `available` was read after the weights were placed.

        Raises:
          MemoryPlanError: it does not fit.
        """
        needed = self.total - self.weights if weights_loaded else self.total
        if available is None or needed <= available:
            return
        if needed - self.cache > available:
            advice = (
                "quantize, take 16-bit dtypes.params, raise mesh.model to spread the weights, or lower prefill_buckets"
            )
        else:
            advice = "lower engine.max_batch, or ask for fewer rows, shorter prompts or a smaller max_tokens"
        raise MemoryPlanError(
            f"{needed / GIB:.1f} GiB are needed and the device has {available / GIB:.1f} left ({self}); {advice}"
        )


def return_freed_memory() -> None:
    """Gives what was freed back to the system: glibc would keep gigabytes of what loading needed meanwhile."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def plan_memory(steps: Steps, batch: int, length: int, media_tokens: int = 0) -> MemoryPlan:
    """Plans `batch` rows of `length` cache positions with `media_tokens` encoded tokens among them."""
    state = steps.state_shapes(batch, length)
    return MemoryPlan(
        weights=_weights(steps),
        cache=bytes_per_device(state.caches),
        sampling=bytes_per_device(dataclasses.replace(state, caches=[])),
        media=max(
            media_tokens * steps.model.text.hidden_size * steps.activation_dtype.itemsize,
            steps.runtime.engine.media_cache_mib * 2**20,
        ),
        workspace=_workspace(steps, batch),
        batch=batch,
        length=length,
    )


_known: weakref.WeakKeyDictionary[Steps, int] = weakref.WeakKeyDictionary()


def _weights(steps: Steps) -> int:
    """Bytes per device of all parameters, counted once: a busy service plans between the steps of its requests."""
    if steps not in _known:
        leaves = steps.abstract().items()
        _known[steps] = bytes_per_device(
            [placed_shape(path, leaf, steps.runtime.quantization) for path, leaf in leaves]
        )
    return _known[steps]


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of arrays given by shape, dtype and sharding."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * _bits(a.dtype) // 8 for a in leaves)


def _bits(dtype: jnp.dtype) -> int:
    return 4 if dtype == jnp.int4 else 8 * dtype.itemsize


def _workspace(steps: Steps, batch: int) -> int:
    """The widest live set of each program: residual, MLP inputs and outputs, attention scores, logits."""
    text, vision, audio = steps.model.text, steps.model.vision, steps.model.audio
    engine = steps.runtime.engine
    wide = 4  # products accumulate in float32
    tokens = engine.prefill_buckets[-1] * engine.prefill_rows
    prefill = tokens * (3 * text.hidden_size + 4 * text.intermediate_size) * wide
    prefill += engine.prefill_block**2 * text.num_heads * 3 * wide
    logits = batch * text.vocab_size * wide * 6  # log-probabilities, penalties, noise and their sums
    patches = engine.crop_buckets[-1] * vision.patches_per_side**2
    scores = patches * vision.patches_per_side**2 * vision.num_heads * wide
    images = patches * (4 * vision.hidden_size + 2 * vision.intermediate_size) * wide + scores
    frames = engine.audio_buckets[-1]
    speech = frames * audio.input_size // 4 * audio.conv_channels * wide * 2  # one window is subsampled at a time
    sub_frames = frames // audio.time_reduction * engine.window_buckets[-1]
    speech += sub_frames * 4 * (audio.hidden_size + audio.intermediate_size) * wide
    return max(prefill, logits, images, speech)


def available_memory(device: jax.Device) -> int | None:
    """Bytes that the device has left, None if it does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_memory() if device.platform == "cpu" else None


def host_memory() -> int | None:
    """Bytes that the host has left, None if it does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
