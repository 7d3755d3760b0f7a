"""What one call of a compiled program costs on the host: a decoder of the released depth and of negligible width.

    python -m benchmarks.dispatch [--repeat 300]

Decoding is called with no row active, so that nothing but the call itself is measured. Prints the minimum.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from phi4mm_jax.config import ModelConfig, RuntimeConfig
from phi4mm_jax.runtime.mesh import create_mesh
from phi4mm_jax.runtime.steps import Steps


def narrow(model: ModelConfig) -> ModelConfig:
    """Returns a model of the same number of layers and leaves, with heads of 16 and a vocabulary of 512."""
    factors = dict.fromkeys(("short_factor", "long_factor"), (1.0,) * 6)
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_heads": 8, "num_kv_heads": 2}
    tokens = dataclasses.replace(model.tokens, image=500, audio=501, pad=505, eos=(505, 506))
    return dataclasses.replace(model, text=dataclasses.replace(model.text, **sizes, **factors), tokens=tokens)


def main() -> None:
    """Measures decoding without and with an adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=300, metavar="N", help="calls")
    args = parser.parse_args()
    runtime = RuntimeConfig.auto()
    steps = Steps(narrow(ModelConfig.load("phi4mm")), runtime, create_mesh(runtime.mesh))
    weights = steps.pack({path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in steps.abstract().items()})
    state, keep, one = steps.new_state(1, 1024), np.array([True]), np.ones(1, np.int32)
    arrays = len(jax.tree.leaves(state.caches))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {len(weights.text)} weights, {arrays} cache arrays")
    for adapters in ({}, {"vision": keep}):
        fastest = float("inf")
        for _ in range(args.repeat + 1):
            start = time.perf_counter()
            state, drawn = steps.decode(weights.text, state, keep, one, adapters, kind="greedy")
            fastest = min(fastest, time.perf_counter() - start)
            jax.block_until_ready(drawn)
        print(f"decode({', '.join(adapters) or 'no adapter'}): {fastest * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
