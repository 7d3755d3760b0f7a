"""Describes a model and how it would be run, from its configuration alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

import jax

from phi4mm_jax.config import ModelConfig, RuntimeConfig
from phi4mm_jax.runtime.buckets import round_up
from phi4mm_jax.runtime.memory import GIB, plan_memory
from phi4mm_jax.runtime.mesh import create_mesh
from phi4mm_jax.runtime.steps import Steps
from phi4mm_jax.weights.mapping import entries

_COMPONENTS = (  # name, and the leaf paths that the entries before it have left
    ("embedding and head", r"text\.embed\."),
    ("vision adapter", r"text\..*\.vision_[ab]"),
    ("speech adapter", r"text\..*\.speech_[ab]"),
    ("decoder", r"text\."),
    ("image projector", r"vision\.projector\."),
    ("image encoder", r"vision\."),
    ("speech projectors", r"audio\.\w+_projector\."),
    ("speech encoder", r"audio\."),
)


def describe(model: ModelConfig, runtime: RuntimeConfig) -> str:
    """Returns architecture, parameters by component and memory plans, as text of several lines.

    Args:
      model: the architecture.
      runtime: any configuration; its devices need not be present.
    """
    # Nothing is placed, so one device can stand for all that the mesh asks for.
    stand_ins = jax.devices()[:1] * (runtime.mesh.data * runtime.mesh.model)
    steps = Steps(model, runtime, create_mesh(runtime.mesh, stand_ins))
    engine = runtime.engine
    lengths = {round_up(min(length, engine.max_seq_len), engine.cache_buckets) for length in (1000, 4000, 130000)}
    plans = [plan_memory(steps, batch, length) for batch in (1, engine.max_batch) for length in sorted(lengths)]
    parameters, sizes = Counter[str](), Counter[str]()
    for path, leaf in steps.abstract().items():
        component = next(name for name, pattern in _COMPONENTS if re.match(pattern, path))
        parameters[component] += math.prod(leaf.shape)
        sizes[component] += math.prod(leaf.shape) * leaf.dtype.itemsize
    rows = [(name, parameters[name], sizes[name]) for name, _ in _COMPONENTS]
    rows.append(("total", parameters.total(), sizes.total()))
    unused = Counter[str]()
    for entry in entries(model, "hub"):
        if entry.skipped:
            unused[entry.skipped] += math.prod(entry.shape)
    return "\n".join(
        [
            *_architecture(model),
            "",
            f"{'component':<20}{'parameters':>16}{'GiB':>8}",
            *(f"{name:<20}{count:>16,}{size / GIB:>8.2f}" for name, count, size in rows),
            *(f"left out: {count:,} ({reason})" for reason, count in unused.items()),
            "",
            *map(str, plans),
        ]
    )


def _architecture(model: ModelConfig) -> Iterator[str]:
    text, vision, audio = model.text, model.vision, model.audio
    yield (
        f"decoder   {text.num_layers} layers, width {text.hidden_size}, MLP {text.intermediate_size}, "
        f"{text.num_heads} query and {text.num_kv_heads} kv heads of {text.head_dim}, vocabulary {text.vocab_size:,}, "
        f"context {text.max_position_embeddings:,} (long rope factors from {text.original_max_position_embeddings:,})"
    )
    yield (
        f"images    {vision.num_used_layers} of {vision.num_layers} layers, width {vision.hidden_size}, "
        f"MLP {vision.intermediate_size}, {vision.num_heads} heads; crops of {vision.image_size} px, "
        f"{vision.tokens_per_crop} tokens each, at most {vision.max_crops} and the global view"
    )
    yield (
        f"speech    {audio.num_layers} blocks, width {audio.hidden_size}, MLP {audio.intermediate_size}, "
        f"{audio.num_heads} heads; {audio.input_size} mel bins, one token per {audio.time_reduction} frames"
    )
    adapters = (("vision", model.vision_lora), ("speech", model.speech_lora))
    yield "adapters  " + ", ".join(f"{name} rank {lora.rank} (scale {lora.scale:g})" for name, lora in adapters)
