"""Quantizing a loaded model by what it computes on given conversations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np

from phi4mm_jax.config import ConfigError, QuantizationConfig
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.buckets import round_up
from phi4mm_jax.runtime.gptq import gptq
from phi4mm_jax.runtime.limits import cache_length, check_length
from phi4mm_jax.runtime.placement import Leaf, format_of, place_as, quantize_leaf
from phi4mm_jax.runtime.prefill import PrefillRow, lone_row, plan_prefill, prefill_arguments
from phi4mm_jax.runtime.steps import Steps, Weights
from phi4mm_jax.weights.progress import track

_MOMENT_BYTES = 2 << 30
"""Moments of inputs that are held at a time; the more, the less often the conversations are run."""


def calibrate(
    steps: Steps, leaves: dict[str, Leaf], prompts: Sequence[Prompt], config: QuantizationConfig, progress: bool = True
) -> None:
    """Quantizes a model, the decoder's projections by GPTQ from the first layer to the last, the rest without data.

    Each part of the decoder sees what the parts before it compute once they are quantized.

    Args:
      steps: programs of the model.
      leaves: as they were loaded, by path; each is replaced as it is quantized.
      prompts: conversations with their answers, like those that the model is for.
      config: what is quantized, and how.
      progress: report it on standard error.

    Raises:
      ConfigError: there are no prompts, or a leaf cannot have the format that is asked for.
      RequestError: a prompt is longer than the context.
    """
    if not prompts:
        raise ConfigError("calibration: has no conversations")
    abstract = steps.abstract()
    forms = {path: form for path, leaf in abstract.items() if (form := format_of(path, leaf, config))}
    for prompt in prompts:
        check_length(steps, len(prompt.token_ids))
    rows = [lone_row(steps, steps.pack(leaves), prompt) for prompt in prompts]
    longest = max(cache_length(steps, prompt, max_tokens=0) for prompt in prompts)
    positions = round_up(longest, steps.runtime.engine.cache_buckets)

    def quantized() -> Iterator[str]:
        """Quantizes the leaves one by one; yields the path of each."""
        projections = [path for path in forms if path.startswith("text.layers.") and path.endswith(".weight")]
        for paths in _parts(projections, abstract):
            for path, moments in _moments(steps, steps.pack(leaves), rows, positions, paths).items():
                rounded = gptq(np.asarray(leaves[path]), np.asarray(moments), forms[path])
                leaves[path] = place_as(rounded, path, abstract[path], config)
                yield path
        for path in forms.keys() - set(projections):
            leaves[path] = quantize_leaf(leaves[path], path, abstract[path], config)
            yield path

    sizes = {path: math.prod(abstract[path].shape) * abstract[path].dtype.itemsize for path in forms}
    work = {"action": "Quantizing", "of": "weights", "count": len(sizes), "total": sum(sizes.values())}
    for _ in track(quantized(), sizes.__getitem__, **work, show=progress):
        pass


def _parts(paths: Sequence[str], abstract: dict[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Cuts weights, in the order in which they are used, into parts whose moments fit `_MOMENT_BYTES`."""
    part: list[str] = []
    size = 0
    for path in paths:
        own = 4 * abstract[path].shape[1] ** 2
        if part and size + own > _MOMENT_BYTES:
            yield part
            part, size = [], 0
        part.append(path)
        size += own
    if part:
        yield part


def _moments(
    steps: Steps, weights: Weights, rows: Sequence[PrefillRow], positions: int, paths: Collection[str]
) -> dict[str, jax.Array]:
    """Sums x x^T over what goes into each of these weights: path to float32 [K, K]."""
    tower = "text."
    watched = frozenset(path.removeprefix(tower) for path in paths)
    caches = steps.new_state(1, positions).caches
    sums: dict[str, jax.Array] = {}
    for row in rows:
        for call in plan_prefill([dataclasses.replace(row)], steps.runtime.engine, positions - 1):
            valid = call.starts[:, None] + np.arange(call.size) < call.lengths[:, None]
            valid[call.count :] = False
            arguments = prefill_arguments(steps, call, all_tokens=True)
            caches, seen = steps.prefill_observed(weights.text, caches, *arguments, valid=valid, paths=watched)
            for path, moments in seen.items():
                sums[tower + path] = sums[tower + path] + moments if tower + path in sums else moments
    return sums
