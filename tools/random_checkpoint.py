"""Writes a checkpoint of random weights with the names, shapes, shards and configuration files of a real one.

    python -m tools.random_checkpoint OUT [--model configs/model/phi4mm.toml] [--layout hub|native] [--seed 0]
                                        [--tokenizer DIR]

The full-size one is 11 GB and takes about a minute; it loads, runs and benchmarks like the released model, without the
download. Weights are normal with variance 1 / fan-in, so that activations stay of order one through all layers. A leaf
has the same values in both layouts.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from phi4mm_jax.config import ConfigError, ModelConfig
from phi4mm_jax.weights.mapping import Entry
from phi4mm_jax.weights.reader import CheckpointError
from tools.checkpoint_files import ITEM_BYTES, RELEASED, write_checkpoint


class RandomValues:
    """Normal values by the gigabyte: slices of one pool, which is scaled once per standard deviation.

    The pool is read as a ring. Its length is prime, so no two rows of a matrix are alike.
    """

    LENGTH = 2**22 - 3

    def __init__(self, seed: int):
        self._seed = seed
        self._normal = np.random.default_rng(seed).standard_normal(self.LENGTH, np.float32)
        self._pool = functools.cache(self._scaled)

    def _scaled(self, mean: float, std: float) -> memoryview:
        values = (self._normal * np.float32(std) + np.float32(mean)).astype(ml_dtypes.bfloat16)
        return memoryview(values.view(np.uint16)).cast("B")

    def chunks(self, entry: Entry) -> Iterator[memoryview]:
        """Yields a tensor's bfloat16 bytes; they depend on the seed and the leaf alone."""
        pool = self._pool(*_mean_and_std(entry))
        key = zlib.crc32((entry.path or entry.name).encode())
        start = int(np.random.default_rng([self._seed, key]).integers(self.LENGTH)) * ITEM_BYTES
        left = math.prod(entry.shape) * ITEM_BYTES
        while left:
            chunk = pool[start : start + left]
            yield chunk
            left, start = left - len(chunk), 0


def _mean_and_std(entry: Entry) -> tuple[float, float]:
    """How a tensor's values are spread."""
    if entry.path.endswith(("norm.weight", "norm1.weight", "norm2.weight", "inv_std")):
        return 1.0, 0.1
    if len(entry.leaf_shape) == 1:
        return 0.0, 0.02
    fan_in = math.prod(entry.leaf_shape[1:])
    strength = 0.1 if entry.scale != 1.0 else 1.0  # an adapter's second factor: a correction, not a second model
    return 0.0, strength / math.sqrt(fan_in)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    parser.add_argument("--model", type=Path, default=RELEASED, help="TOML file with the model's sizes")
    parser.add_argument("--layout", choices=["hub", "native"], default="hub", help="names and files to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the values")
    parser.add_argument("--tokenizer", type=Path, help="directory whose tokenizer files are copied")
    options = parser.parse_args(arguments)
    try:
        write_checkpoint(
            options.out,
            ModelConfig.from_toml(options.model),
            RandomValues(options.seed),
            layout=options.layout,
            tokenizer=options.tokenizer,
            progress=True,
        )
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
