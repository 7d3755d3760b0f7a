"""The memory plan: what a configuration will hold, checked before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax

from phi4mm_jax.config import DTypeConfig, EngineConfig, ModelConfig, RuntimeConfig
from phi4mm_jax.runtime.kv_cache import cache_bytes

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
    """Per-row history over the vocabulary."""
    workspace: int
    """Estimate of the largest program's temporaries."""
    batch: int
    """Rows that the cache is for."""
    length: int
    """Positions per row."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.sampling + self.workspace

    def __str__(self) -> str:
        parts = ("weights", "cache", "sampling", "workspace", "total")
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
        knobs = f"engine.max_batch (now {self.batch} rows) or engine.max_seq_len and max_tokens (now {self.length})"
        if self.total - self.cache > (available + self.weights if weights_loaded else available):
            knobs = "dtypes.params to a 16-bit format, or mesh.model to spread the weights over more devices"
        raise MemoryPlanError(
            f"needs {needed / GIB:.1f} GiB and the device has {available / GIB:.1f} left ({self}); lower {knobs}"
        )


def plan_memory(
    model: ModelConfig, runtime: RuntimeConfig, abstract: Mapping[str, jax.ShapeDtypeStruct], batch: int, length: int
) -> MemoryPlan:
    """Plans `batch` rows of `length` cache positions; sharded arrays count what one device holds of them."""
    devices = runtime.mesh.data * runtime.mesh.model
    weights = sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in abstract.values())
    return MemoryPlan(
        weights=weights,
        cache=cache_bytes(model.text, runtime.dtypes, batch, length) // devices,
        sampling=batch * model.text.vocab_size * (4 + 1 + 4),
        workspace=_workspace(model, runtime.dtypes, runtime.engine, batch),
        batch=batch,
        length=length,
    )


def _workspace(model: ModelConfig, dtypes: DTypeConfig, engine: EngineConfig, batch: int) -> int:
    """The widest live set of each program: residual, MLP inputs and outputs, attention scores, logits."""
    text, vision, audio = model.text, model.vision, model.audio
    wide = 4  # products accumulate in float32
    tokens = engine.prefill_buckets[-1] * engine.prefill_rows
    prefill = tokens * (3 * text.hidden_size + 4 * text.intermediate_size) * wide
    prefill += engine.prefill_block**2 * text.num_heads * 3 * wide
    logits = batch * text.vocab_size * wide * 6  # log-probabilities, penalties, noise and their sums
    patches = engine.crop_buckets[-1] * vision.patches_per_side**2
    scores = patches * vision.patches_per_side**2 * vision.num_heads * wide
    images = patches * (4 * vision.hidden_size + 2 * vision.intermediate_size) * wide + scores
    frames = engine.audio_buckets[-1] * engine.window_buckets[-1]
    speech = frames * audio.input_size // 4 * audio.conv_channels * wide * 2
    return max(prefill, logits, images, speech)


def available_memory(device: jax.Device) -> int | None:
    """Bytes that the device has left, None if it does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    meminfo = Path("/proc/meminfo")
    if device.platform == "cpu" and meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return None
