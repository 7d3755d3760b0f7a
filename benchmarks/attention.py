"""Attention of one token of each row over the cache, in each format: time, and bytes of live cache read per second.

    python benchmarks/attention.py [--rows 1 8] [--lengths 512 4096] [--seconds 30] [--implementations xla cpu]

Formats and backends take turns, call by call, each over enough layers that none stays in a cache. Other work on the
machine then slows all of them alike: the ratio of medians stands even where the times do not. `taskset -c 0` before it
measures one thread.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.kv import KV, encode

HEADS, KV_HEADS, WIDTH = 24, 8, 128  # of the decoder
POSITIONS = 4096
FORMATS = {"float32": "float32", "bfloat16 bits": "uint16", "int8": "int8"}
CYCLED_BYTES = 150_000_000


def layers(dtype: str, rows: int) -> list[tuple[KV, KV]]:
    """Enough random layers of a format that they do not fit a cache, however few keys are live."""
    x = np.random.default_rng(0).standard_normal((rows, KV_HEADS, POSITIONS, WIDTH), np.float32)
    first = (encode(jnp.asarray(x), dtype), encode(jnp.asarray(x[:, :, ::-1]), dtype))
    copies = max(2, CYCLED_BYTES // sum(a.nbytes for a in jax.tree.leaves(first)))
    return [first, *(jax.tree.map(jnp.copy, first) for _ in range(copies - 1))]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096], help=f"live keys, up to {POSITIONS}")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of rows (%(default)s)")
    parser.add_argument("--implementations", nargs="+", default=["xla", "cpu"], help="(%(default)s)")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, {HEADS} heads, {KV_HEADS} kv heads")
    print("| rows | keys | format | backend | minimum ms | median ms | median / first's | GB/s at the minimum |")
    print("|---|---|---|---|---|---|---|---|")

    attend = jax.jit(
        lambda q, k, v, lengths, implementation: decode_attention(
            q, k, v, lengths, scale=WIDTH**-0.5, implementation=implementation
        ),
        static_argnames="implementation",
    )
    for rows in options.rows:
        q = jnp.asarray(np.random.default_rng(1).standard_normal((rows, HEADS, WIDTH)), jnp.float32)
        caches = {name: layers(dtype, rows) for name, dtype in FORMATS.items()}
        cases = list(itertools.product(options.lengths, FORMATS, options.implementations))
        times: dict[tuple[int, str, str], list[float]] = {case: [] for case in cases}
        lengths = {length: jnp.full(rows, length, jnp.int32) for length in options.lengths}
        for length, name, implementation in cases:
            attend(q, *caches[name][0], lengths[length], implementation=implementation).block_until_ready()
        end = time.monotonic() + options.seconds
        while time.monotonic() < end:
            for (length, name, implementation), taken in times.items():
                for k, v in caches[name]:
                    start = time.perf_counter()
                    attend(q, k, v, lengths[length], implementation=implementation).block_until_ready()
                    taken.append(time.perf_counter() - start)
        for (length, name, implementation), taken in times.items():
            if name == next(iter(FORMATS)) and implementation == options.implementations[0]:
                first = statistics.median(taken)
            size = sum(a.nbytes for a in jax.tree.leaves(caches[name][0])) * length / POSITIONS
            best, usual = min(taken), statistics.median(taken)
            cells = (rows, length, name, implementation, f"{1000 * best:.2f}", f"{1000 * usual:.2f}")
            print(f"| {' | '.join(map(str, cells))} | {usual / first:.2f} | {size / best / 1e9:.1f} |", flush=True)


if __name__ == "__main__":
    main()
