"""Memory of the full-size programs as the real TPU compiler plans it, on a machine without a TPU.

    pip install libtpu && JAX_PLATFORMS=cpu python -m benchmarks.tpu_plan [--chip v5e] [--config tpu_v5e_1]

Compiles decode, prefill and both encoders from shapes alone, for one chip and for four. Nothing is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.dispatch import prefer
from phi4mm_jax.config import ModelConfig, RuntimeConfig
from phi4mm_jax.runtime.mesh import create_mesh, replicated
from phi4mm_jax.runtime.steps import Steps

ROWS, POSITIONS, CHUNK, CROPS, WINDOWS = 8, 2048, 512, 4, 2


def programs(steps: Steps) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields name and lowering of each program."""
    whole = replicated(steps.mesh)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def tower(name: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(leaf for path, leaf in steps.abstract().items() if path.startswith(f"{name}."))

    text, state = tower("text"), steps.state_shapes(ROWS, POSITIONS)
    rows, count = array(jnp.bool_, ROWS), array(jnp.int32, ROWS)
    one, flag = array(jnp.int32, 1), array(jnp.bool_, 1)
    tokens, is_media = array(jnp.int32, 1, CHUNK), array(jnp.bool_, 1, CHUNK)
    media = array(steps.activation_dtype, 1, CHUNK, steps.model.text.hidden_size)
    both = {"speech": rows, "vision": rows}
    side, patches = steps.model.vision.image_size, steps.model.vision.patches_per_side**2
    crops = (array(jnp.float32, CROPS, 3, side, side), array(jnp.bool_, CROPS, patches))
    windows = array(jnp.float32, WINDOWS, 8 + steps.model.audio.window_frames, steps.model.audio.input_size)
    flags, counts = array(jnp.bool_, WINDOWS), array(jnp.int32, WINDOWS)
    yield "decode, text rows", lambda: steps.decode.lower(text, state, rows, count, {}, kind="greedy")
    yield "decode, rows of every kind", lambda: steps.decode.lower(text, state, rows, count, both, kind="full")
    prompt = (tokens, media, is_media, one, one, one, flag, {"vision": flag})
    yield f"prefill, {CHUNK} tokens with media", lambda: steps.prefill.lower(text, state.caches, *prompt)
    positions = array(jnp.int32, CROPS, patches)
    yield f"image encoder, {CROPS} crops", lambda: steps.encode_images.lower(tower("vision"), *crops, positions)
    speech = (windows, flags, counts, counts, flags)
    yield f"speech encoder, {WINDOWS} windows", lambda: steps.encode_audio.lower(tower("audio"), *speech)


def main() -> None:
    """Compiles everything and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v5e", help="v5e, v6e or v5p (%(default)s)")
    parser.add_argument("--config", default="tpu_v5e_1", metavar="P", help="preset (%(default)s)")
    args = parser.parse_args()
    topology = "2x2x1" if args.chip == "v5p" else "2x2"
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=f"{args.chip}:{topology}").devices)
    print("| program | chips | arguments GiB | temporaries GiB |\n|---|---|---|---|")
    for chips in (1, 4):
        runtime = RuntimeConfig.load(args.config, mesh={"model": chips})
        mesh = create_mesh(runtime.mesh, devices)
        for name, lower in programs(Steps(ModelConfig.load("phi4mm"), runtime, mesh)):
            with prefer("tpu"), jax.set_mesh(mesh):  # the default backend here is not the target's
                memory = lower().compile().memory_analysis()
            sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
            print(f"| {name} | {chips} | {' | '.join(f'{size / 2**30:.3f}' for size in sizes)} |", flush=True)


if __name__ == "__main__":
    main()
